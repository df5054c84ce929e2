"""What runs eagerly: a graph that calls our operators as functions, and reads all tensors at once, as they are then."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lorafx
from lorafx.lowering.eager import _FUNCTIONS, _TORCHS, direct, reader
from lorafx.ops import lora_linear


class Layer(nn.Module):
    """(…, 4) -> (…, 4), with a weight, a bias and a buffer."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x):
        return self.proj(x).sin() + self.shift


class Stack(nn.Module):
    """(…, 4) -> (…, 3)"""

    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x) * self.scale


def adapted(**options):
    config = {"r": 2, "target_modules": ["proj", "head"], "init_lora_weights": False}
    return lorafx.compile(Stack(**options), config, backend="eager")


def targets(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("layers", [1, 3], ids=["flat", "blocks"])
def test_it_computes_the_same_and_leaves_the_graph_as_it_is(layers):
    lora, x = adapted(layers=layers), torch.randn(5, 4)
    gm = lora.graph(x)
    before = gm.code
    runs = direct(gm)
    assert torch.equal(*runs(x), gm(x)) and gm.code == before
    assert lora_linear in targets(runs) and torch.ops.lorafx.lora_linear.default in targets(gm)
    assert torch.mul in targets(runs) and torch.ops.aten.mul.Tensor in targets(gm)
    read = [node.target for node in runs.graph.find_nodes(op="get_attr")]
    assert not any(path.endswith(("weight", "shift")) for path in read) and "scale" in read, "the root's own"
    assert layers == 1 or sorted(read) == ["captured.block_0", "head", "layers", "scale"], "the block once"


ARGUMENTS = {  # as captured graphs give them, x being (2, 3, 4)
    "add.Tensor": lambda x: ((x, x), {"alpha": 2}),
    "sub.Tensor": lambda x: ((x, 1.5), {"alpha": 2}),
    "mul.Tensor": lambda x: ((x, 3), {}),
    "div.Tensor": lambda x: ((x, 2), {}),
    "softmax.int": lambda x: ((x, -1, torch.float64), {}),
    "where.self": lambda x: ((x > 0, x, -x), {}),
    "gelu.default": lambda x: ((x,), {"approximate": "tanh"}),
    "cat.default": lambda x: (([x, x], -1), {}),
    "view.default": lambda x: ((x, [6, -1]), {}),
    "reshape.default": lambda x: ((x, [-1]), {}),
    "expand.default": lambda x: ((x[:1], [5, -1, 4]), {}),
    "contiguous.default": lambda x: ((x.mT,), {"memory_format": torch.contiguous_format}),
    "transpose.int": lambda x: ((x, 1, 2), {}),
    "permute.default": lambda x: ((x, [2, 0, 1]), {}),
    "unsqueeze.default": lambda x: ((x, -2), {}),
    "squeeze.dim": lambda x: ((x[:1], 0), {}),
    "select.int": lambda x: ((x, 1, -1), {}),
    "linear.default": lambda x: ((x, x[0], x[0, :, 0]), {}),
    "matmul.default": lambda x: ((x, x.mT), {}),
    "embedding.default": lambda x: ((x[0], torch.tensor([[0, 2]]), 1), {}),
    "layer_norm.default": lambda x: ((x, [4], x[0, 0], None, 1e-6, False), {}),
    "scaled_dot_product_attention.default": lambda x: (
        (x[None], x[None], x[None], torch.ones(3, 3).tril() > 0),
        {"scale": 0.3, "enable_gqa": False},
    ),
}


@pytest.mark.parametrize("op", _TORCHS, ids=str)
def test_torchs_own_function_takes_what_the_operator_takes(op):
    given = ARGUMENTS.get(str(op).removeprefix("aten."), lambda x: ((x,), {}))
    args, kwargs = given(torch.randn(2, 3, 4).abs())
    found, expected = _FUNCTIONS[op](*args, **kwargs), op(*args, **kwargs)
    assert torch.equal(found, expected) and found.dtype == expected.dtype and found.stride() == expected.stride()


def test_it_reads_what_the_tree_has_at_that_moment():
    lora, x = adapted(), torch.randn(5, 4)
    expected = lora(x)
    with torch.no_grad():
        lora.layers[1].proj.weight.mul_(2)
        written = lora(x)
        lora.layers[1].proj.weight = nn.Parameter(lora.layers[1].proj.weight / 2)
        lora.head.lora_A.default.weight = nn.Parameter(lora.head.lora_A.default.weight.clone())
        assert not torch.equal(written, expected) and torch.equal(lora(x), expected)
        lora.layers[1].shift = lora.layers[1].shift + 1
        assert not torch.equal(lora(x), expected)


def test_a_reader_follows_replaced_modules_and_computed_tensors():
    stack = Stack()
    read = reader(["layers", "head"], ["layers.0.proj.weight", "layers.2.shift", "head.weight", "layers.0.proj.bias"])

    def found():
        return read(stack.layers, stack.head)

    first, third = stack.layers[0].proj, stack.layers[2]
    for value, expected in zip(found(), [first.weight, third.shift, stack.head.weight, first.bias], strict=True):
        assert value is expected
    stack.layers[0] = Layer()
    stack.layers[2].shift = torch.zeros(4)
    assert found()[0] is stack.layers[0].proj.weight and found()[1] is third.shift
    parametrize.register_parametrization(stack.head, "weight", nn.Tanh())
    assert torch.equal(found()[2], stack.head.weight)
    with pytest.raises(AttributeError, match="proj"):
        del stack.layers[0].proj
        found()

"""The operator that runs a module: the same as its forward, also where a compiler does not look into it."""

import pytest
import torch
from torch import nn

from lorafx.errors import AdapterError
from lorafx.ops import own_forward as _  # noqa: F401
from lorafx.tree.own_layers import number_of, run_by_itself

operator = torch.ops.lorafx


class Layer(nn.Module):
    def __init__(self, outputs=5, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, 3, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(outputs, dtype=dtype))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias).tanh()


@pytest.fixture
def layer():
    module = Layer()
    run_by_itself(module, "weight", 5, None, lambda module: None, None)
    return module


def test_derivatives_are_those_of_the_modules_code(layer):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    number = number_of(layer)
    for run in (
        lambda x, b: operator.own_forward(x, layer.weight, b, number, 5, None),
        lambda x, b: operator.hidden_forward(x, b, number, 5, None),
    ):
        assert torch.autograd.gradcheck(run, (x, layer.bias))


def test_it_is_hidden_from_compilers(layer):
    """AOTAutograd keeps it as one operator, whose backward runs the module again."""
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    backend, number = AotEagerAndRecordGraphs(), number_of(layer)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def call(x, bias):
        return operator.own_forward(x, None, bias, number, 5, None).square().sum()

    torch.compile(call, backend=backend)(x, layer.bias).backward()
    targets = [str(node.target) for graph in backend.fw_graphs + backend.bw_graphs for node in graph.graph.nodes]
    assert "lorafx.hidden_forward.default" in targets and "lorafx.hidden_backward.default" in targets
    wanted = torch.autograd.grad(Layer.forward(layer, x).square().sum(), (x, layer.bias))
    torch.testing.assert_close((x.grad, layer.bias.grad), wanted)


def test_operators_are_registered_as_torch_wants_them(layer):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(operator.hidden_forward.default, (x, layer.bias, number_of(layer), 5, None))


def test_a_module_that_gives_something_else_is_an_error():
    layer = Layer(outputs=7)
    run_by_itself(layer, "weight", 5, None, lambda module: None, None)
    with pytest.raises(AdapterError, match="Layer gave 7 features"):
        layer(torch.randn(4, 3, dtype=torch.float64))


def test_of_row_numbers_the_shape_is_that_of_the_rows():
    rows = nn.Embedding(6, 5)
    run_by_itself(rows, "weight", 5, torch.float32, lambda module: None, None)
    number = number_of(rows)
    x = torch.randint(0, 6, (2, 3))
    fake = operator.hidden_forward(x.to("meta"), None, number.to("meta"), 5, torch.float32)
    assert fake.shape == operator.own_forward(x, rows.weight, None, number, 5, torch.float32).shape == (2, 3, 5)

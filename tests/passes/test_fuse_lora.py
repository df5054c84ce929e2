"""fuse_lora: a linear and its update are one operator, whose own backward is the equation's."""

from __future__ import annotations

import pytest
import torch
from graphs import INSERT, Chain, adapted, run, text

import lorafx
from lorafx.ops.lora_linear import reference
from lorafx.passes import ElideCasts, ElideDropout, FoldScaling, FuseLora

PLAIN = (*INSERT, ElideCasts(), ElideDropout())
fused = torch.ops.lorafx.lora_linear


def arguments(apart=False, bias=True, shape=(3, 5), dtype=torch.float64):
    torch.manual_seed(0)

    def tensor(*sizes):
        return torch.randn(*sizes, dtype=dtype, requires_grad=True)

    z = tensor(*shape, 4) if apart else None
    return tensor(*shape, 4), tensor(6, 4), tensor(6) if bias else None, z, tensor(2, 4), tensor(6, 2), 1.7


def test_before_and_after():
    lora, x = adapted(Chain(), target_modules=["second"]), torch.randn(5, 2, 4)
    assert text(run(lora, (*PLAIN, FuseLora()), x))[2:] == [
        "relu = relu(linear)",
        "second_weight = second.weight",
        "second_bias = second.bias",
        "second_lora_a_default_weight = second.lora_A.default.weight",
        "second_lora_b_default_weight = second.lora_B.default.weight",
        "lora_linear = lorafx.lora_linear(relu, second_weight, second_bias, None, second_lora_a_default_weight, "
        "second_lora_b_default_weight, 3.0)",
    ]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 3, 1)])
def test_it_is_the_equation(apart, bias, shape):
    given = arguments(apart, bias, shape)
    torch.testing.assert_close(fused(*given), reference(*given), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(fused, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(fused, given, fast_mode=True)


def test_only_what_is_asked_for_is_computed():
    given = arguments()
    for wanted in range(6):
        leaves = [
            a.detach().requires_grad_(n == wanted) if isinstance(a, torch.Tensor) else a for n, a in enumerate(given)
        ]
        if leaves[wanted] is None:
            continue
        (found,) = torch.autograd.grad(fused(*leaves).sin().sum(), leaves[wanted])
        (expected,) = torch.autograd.grad(reference(*leaves).sin().sum(), leaves[wanted])
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_what_it_gives_may_be_written_to(shape, bias, shared):
    """As `nn.ReLU(inplace=True)` does after a layer."""
    x, weight, bias, _, lora_A, lora_B, scaling = arguments(bias=bias, shape=shape)

    def run(op):
        if not shared:
            return op(x, weight, bias, None, lora_A, lora_B, scaling).mul_(3).relu_()
        first, second = torch.ops.lorafx.lora_linears(
            x, [weight] * 2, [bias] * 2, [lora_A] * 2, [lora_B] * 2, [scaling] * 2
        )
        return first.mul_(3).relu_() + second.mul_(3).relu_()

    written = run(fused)
    expected = reference(x, weight, bias, None, lora_A, lora_B, scaling).relu() * (6 if shared else 3)
    torch.testing.assert_close(written, expected, rtol=1e-13, atol=1e-13)
    for found, wanted in zip(*(torch.autograd.grad(y.sum(), (x, weight, lora_A, lora_B)) for y in (written, expected))):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_what_is_not_its_own_is_not_written_to():
    """Rows of a wider matrix, and a transposed one; backward twice."""
    given = list(arguments())
    given[0] = torch.randn(5, 9, dtype=torch.float64)[:, 2:6].requires_grad_()
    given[1] = torch.randn(4, 6, dtype=torch.float64).t().requires_grad_()
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in given]
    output = fused(*given)
    gradient = torch.randn(6, 5, dtype=torch.float64).t()
    kept = output.clone(), gradient.clone()
    wanted = [a for a in given if isinstance(a, torch.Tensor)]
    first, second = (torch.autograd.grad(output, wanted, gradient, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second)) and torch.equal(output, kept[0]) and torch.equal(gradient, kept[1])
    assert all(torch.equal(a, b) for a, b in zip(given, before) if isinstance(a, torch.Tensor))


def test_transforms_go_through():
    x, weight, bias, _, lora_A, lora_B, scaling = (
        a.detach() if isinstance(a, torch.Tensor) else a for a in arguments()
    )
    rest = weight, bias, None, lora_A
    several = torch.stack([lora_B, 2 * lora_B])
    expected = torch.stack([reference(x, *rest, one, scaling) for one in several])
    torch.testing.assert_close(torch.vmap(lambda one: fused(x, *rest, one, scaling))(several), expected)
    jacobian = torch.func.jacrev(lambda x: reference(x, *rest, lora_B, scaling))(x)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(lambda x: fused(x, *rest, lora_B, scaling))(x), jacobian)


def test_it_keeps_its_input_and_the_small_product():
    kept = []
    given = arguments(dtype=torch.float32)
    given[1].requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(*given)
    activations = [t.shape for t in kept if len(t) == 15]
    assert activations == [(15, 4), (15, 2)] and kept[0].data_ptr() == given[0].data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients_are_the_equations(backend):
    for apart in (False, True):
        given = arguments(apart)
        wanted = [a for a in given if isinstance(a, torch.Tensor)]
        compiled = torch.compile(fused, backend=backend, fullgraph=True)
        found = torch.autograd.grad(compiled(*given).sin().sum(), wanted)
        expected = torch.autograd.grad(reference(*given).sin().sum(), wanted)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_model_with_dropout_trains_as_without_the_pass():
    gradients = []
    kept = lorafx.passes.default.without("fuse_dropout")
    for passes in (kept, kept.without("fuse_lora")):
        torch.manual_seed(0)
        config = {"target_modules": "all-linear", "r": 2, "lora_dropout": 0.5, "init_lora_weights": False}
        lora = lorafx.compile(Chain().double(), config, random_state=0, pipeline=passes)
        x = torch.randn(7, 4, dtype=torch.float64)
        torch.manual_seed(1)
        lora(x).sin().sum().backward()
        gradients.append([p.grad for p in lora.parameters() if p.requires_grad])
        nodes = [node.target for node in lora.graph(x).graph.nodes]
        assert (nodes.count(fused.default) == 2) == ("fuse_lora" in str(passes))
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_several_adapters_go_on_top_of_one_another():
    lora, x = adapted(Chain().double()), torch.randn(5, 4, dtype=torch.float64)
    lora.add_adapter("other", {"r": 3, "target_modules": ["second"], "init_lora_weights": False})
    lora.set_adapter(["default", "other"])
    folded = lorafx.passes.default.without("fuse_lora")
    output = lora(x)
    assert sum(node.target is fused.default for node in lora.graph(x).graph.nodes) == 2
    lora._lorafx.dispatcher.pipeline = folded
    lora._lorafx.dispatcher.clear()
    torch.testing.assert_close(lora(x), output, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32], ids=["two dtypes", "autocast"])
def test_where_dtypes_differ_the_update_stays_as_it_is(base):
    lora = adapted(Chain().to(base), adapter_compute_dtype="float32")
    with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
        gm = lora.graph(torch.randn(5, 4, dtype=base))
    assert all(node.target is not fused.default for node in gm.graph.nodes)


def test_a_base_weight_that_trains_gets_its_gradient():
    gradients = []
    for passes in ((*PLAIN, FuseLora()), (*PLAIN, FoldScaling())):
        lora = adapted(Chain().double())
        for parameter in lora.parameters():
            parameter.requires_grad_()
        x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
        gm = lorafx.trace(lora, x)
        torch.manual_seed(0)
        lorafx.Pipeline(*passes).run(gm, lora._lorafx.context)
        gm(x).sin().sum().backward()
        gradients.append({name: p.grad for name, p in lora.named_parameters()})
    assert None not in gradients[0].values()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-12, atol=1e-12)


class Bottleneck(torch.nn.Module):
    """A base model's own update, scaled by a tensor."""

    def __init__(self):
        super().__init__()
        self.wide, self.target = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)
        self.down, self.up = torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 6, bias=False)
        self.gamma = torch.nn.Parameter(torch.randn(()))

    def forward(self, x):
        return self.target(self.wide(x) + self.up(self.down(x)) * self.gamma)


def test_an_update_that_a_tensor_scales_stays():
    lora, x = adapted(Bottleneck(), target_modules=["target"]), torch.randn(5, 4)
    gm = run(lora, (*PLAIN, FuseLora()), x)
    assert len(gm.graph.find_nodes(op="call_function", target=fused.default)) == 1
    expected = run(lora, PLAIN, x)(x)
    torch.testing.assert_close(gm(x), expected)

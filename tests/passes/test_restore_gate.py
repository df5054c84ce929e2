"""restore_gate: a gated activation written by hand is one operator, which keeps less and changes no bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import llama
from torch import nn

import lorafx
from lorafx.capture.export import trace
from lorafx.ops.gated import ACTIVATIONS, reference
from lorafx.passes import Canonicalize, ElideCasts, RestoreGate, default
from lorafx.pipeline.pipeline import Pipeline

fused = torch.ops.lorafx.gated
WRITTEN = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": nn.GELU("tanh")}


class Gated(nn.Module):
    """(batch, 8) -> (batch, 4), `combine` being given the two halves."""

    def __init__(self, combine):
        super().__init__()
        self.combine = combine

    def forward(self, x):
        return self.combine(x[..., :4], x[..., 4:8])


def restored(model, x):
    gm = trace(model, x)
    Pipeline(Canonicalize(), ElideCasts(), RestoreGate()).run(gm)
    return gm, [node for node in gm.graph.nodes if node.target is fused.default]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("swapped", [False, True])
def test_it_is_one_line(name, swapped):
    f = WRITTEN[name]
    model = Gated(lambda gate, up: up * f(gate) if swapped else f(gate) * up)
    gm, (node,) = restored(model, torch.randn(3, 8))
    assert node.args[2] == name
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    x = torch.randn(5, 8, requires_grad=True)
    found, expected = gm(x), model(x)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in (found, expected)))


@pytest.mark.parametrize(
    "combine",
    [
        lambda gate, up: F.silu(gate) * up[:, :1],
        lambda gate, up: F.silu(gate) * 2.0,
        lambda gate, up: F.silu(gate) * up.double(),
        lambda gate, up: (s := F.silu(gate)) * up + s,
        lambda gate, up: (s := F.silu(gate)) * s,
        lambda gate, up: F.relu(gate) * up,
        lambda gate, up: (F.silu(own := gate * 1), own.add_(1))[0] * up,
        lambda gate, up: (up.t().contiguous().t() * F.silu(gate)).t().reshape(-1),
    ],
    ids=[
        "another shape",
        "a number",
        "another dtype",
        "read twice",
        "squared",
        "another function",
        "written to",
        "other places",
    ],
)
def test_others_stay(combine):
    model, x = Gated(combine), torch.randn(3, 8)
    gm, found = restored(model, x)
    assert not found and torch.equal(gm(x), model(x))


def arguments(dtype=torch.float64, requires=(True, True)):
    torch.manual_seed(0)
    both = torch.randn(2, 3, 8, dtype=dtype)  # halves of one tensor: neither is contiguous
    return [half.detach().requires_grad_(needs) for half, needs in zip(both.chunk(2, -1), requires)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("requires", [(True, True), (True, False), (False, True)])
def test_it_is_the_equation(activation, requires):
    given = *arguments(requires=requires), activation
    assert torch.equal(fused(*given), reference(*given))
    assert torch.autograd.gradcheck(fused, given, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(fused, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_gives_every_bit_that_the_operators_apart_give(dtype, activation):
    gate, up = arguments(dtype)
    dy = torch.randn_like(gate)
    found, expected = ((y, *torch.autograd.grad(y, (gate, up), dy)) for y in
                       (fused(gate, up, activation), reference(gate, up, activation)))  # fmt: skip
    assert all(map(torch.equal, found, expected))


def kept_where_the_gate_is_fixed(gate, up, activation):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(gate.detach(), up, activation)
    return kept


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_keeps_its_inputs_alone_and_writes_to_none(activation):
    gate, up = arguments(torch.float32)
    dy, kept = torch.randn(2, 3, 4), []
    before = [tensor.detach().clone() for tensor in (gate, up, dy)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = fused(gate, up, activation)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]
    assert len(kept_where_the_gate_is_fixed(gate, up, activation)) == 1
    first, second = (torch.autograd.grad(y, (gate, up), dy, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, before, (gate, up, dy)))


@pytest.mark.parametrize("dependent", [lambda gate: gate, torch.sin])
def test_derivatives_of_a_gate_that_what_passes_is_made_of(dependent):
    gate = torch.randn(4, dtype=torch.float64, requires_grad=True)
    found, expected = (run(gate, dependent(gate), "silu").sum() for run in (fused, reference))
    for _ in range(3):
        (found,), (expected,) = (torch.autograd.grad(y, gate, create_graph=True) for y in (found, expected))
        torch.testing.assert_close(found, expected)
        found, expected = found.sum(), expected.sum()


def test_compiled_it_is_left_to_the_compiler():
    gate, up = arguments(torch.float32)
    found = torch.compile(lambda *given: fused(*given, "silu"), backend="aot_eager", fullgraph=True)(gate, up)
    expected = reference(gate, up, "silu")
    torch.testing.assert_close(found, expected)
    for f, e in zip(*(torch.autograd.grad(y.sin().sum(), (gate, up)) for y in (found, expected))):
        torch.testing.assert_close(f, e)


def step(pipeline):
    """The loss and gradients of a small Llama, and how many bytes its forward keeps."""
    lora = lorafx.compile(llama(), {"target_modules": ["gate_proj", "up_proj"]}, random_state=0, pipeline=pipeline)
    ids, kept = torch.arange(10)[None], {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = lora(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in lora.parameters() if p.grad is not None)], sum(kept.values()), lora.config


def test_a_model_keeps_less_and_no_bit_of_it_changes():
    results, sizes, (config, _) = zip(*map(step, (default, default + [RestoreGate()])))
    assert len(results[0]) > 2 and all(map(torch.equal, *results))
    assert sizes[0] - sizes[1] == config.num_hidden_layers * 10 * config.intermediate_size * 4

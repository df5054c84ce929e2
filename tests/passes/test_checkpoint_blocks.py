"""checkpoint_blocks: less is kept, the gradients are the same bits, and the model's own switch throws it."""

from __future__ import annotations

import weakref

import pytest
import torch
import zoo
from graphs import adapted
from modules import KINDS, Layer, Stack
from torch import nn

import lorafx
from lorafx.errors import ConfigError, PipelineError, RecomputeError
from lorafx.graph.blocks import block_calls, checkpoint_block, offload_block
from lorafx.ops import offload


def kept(lora, *call, **inputs) -> int:
    """How many elements a forward pass keeps for backward, but for parameters."""
    own = {id(p) for p in lora.parameters()}
    numbers: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (numbers.append(0 if id(t) in own else t.numel()), t)[1], lambda t: t
    ):
        lora(*call, **inputs)
    return sum(numbers)


def gradients(lora, x) -> list[torch.Tensor]:
    lora.zero_grad()
    torch.manual_seed(3)
    lora(x).square().sum().backward()
    return [p.grad for p in lora.parameters() if p.requires_grad]


def stack(dropout=0.5, **options):
    config = {"r": 2, "target_modules": ["up", "down"], "init_lora_weights": False, "lora_dropout": dropout}
    torch.manual_seed(0)
    return lorafx.compile(Stack(depth=6), config, random_state=0, **options)


def twins(layer):
    """Layers of this class with every one checkpointed, and the same model without that."""
    lora, other = (adapted(Stack(lambda number: layer()), target_modules=["up"]) for _ in range(2))
    other.load_state_dict(lora.state_dict())
    lora._lorafx.dispatcher.pipeline += (lorafx.passes.CheckpointBlocks(every=True),)
    lora._lorafx.dispatcher.clear()
    return lora, other


def test_gradients_are_the_same_bits_and_less_is_kept():
    """Dropout's random numbers too, which come from the same seed."""
    plain, checkpointed, x = stack(), stack(gradient_checkpointing=True), torch.randn(64, 4)
    expected, found = gradients(plain, x), gradients(checkpointed, x)
    assert len(found) == 24 and all(map(torch.equal, found, expected))
    assert kept(checkpointed, x) < kept(plain, x) / 3


@pytest.mark.slow
def test_compiled_layers_are_checkpointed_alike():
    """Compiled operators round otherwise."""
    plain, x = stack(0.0), torch.randn(64, 4)
    checkpointed = stack(0.0, gradient_checkpointing=True, backend="aot_eager")
    expected, found = gradients(plain, x), gradients(checkpointed, x)
    assert len(found) == 24
    torch.testing.assert_close(found, expected)
    assert kept(checkpointed, x) < kept(plain, x) / 3


@pytest.mark.slow
def test_what_layers_give_each_other_waits_on_the_host(monkeypatch):
    """Without CUDA the copies are stood in for, so that what leaves is gone and comes back as another tensor."""
    left, back = [], []
    monkeypatch.setattr(offload, "_can_move", lambda value: isinstance(value, torch.Tensor))
    monkeypatch.setattr(offload, "to_host", lambda t: (left.append(weakref.ref(t)), t.detach().clone())[1])
    monkeypatch.setattr(offload, "to_device", lambda host, device: (back.append(host), (host.clone(), None))[1])
    monkeypatch.setattr(offload, "arrived", lambda tensor, ready: tensor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="no CUDA device"):
        lora = stack(gradient_checkpointing="offload")
    x = torch.randn(64, 4)
    expected, found = gradients(stack(), x), gradients(lora, x)
    assert all(map(torch.equal, found, expected)) and len(left) == len(back) == 6
    calls = [node for node, _, _ in block_calls(lora.graph(x))]
    assert [node.target for node in calls] == [offload_block] * 6
    assert [[call.args[2:][n].name for n in call.kwargs["moves"]] for call in calls] == [
        [c.args[2].name] for c in calls
    ]

    del left[:], back[:]
    loss = lora(x).sum()
    assert [ref() is None for ref in left] == [False, *[True] * 5]  # the first is the caller's own
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(back) == 12


@pytest.mark.slow
def test_transformers_layers_wait_on_the_host_too(monkeypatch):
    """Their own flag, which is set for calls by sites, asks for plain checkpointing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    entry = zoo.ENTRIES["LlamaForCausalLM"]
    lora = lorafx.compile(entry.build().train(), {"target_modules": "all-linear"}, gradient_checkpointing="offload")
    calls = [node for node, _, _ in block_calls(lora.graph(**entry.inputs(2, 7)))]
    assert [call.target for call in calls] == [offload_block] * 2
    assert all(call.kwargs["moves"] for call in calls)


@pytest.mark.slow
def test_only_training_is_checkpointed():
    lora, x = stack(gradient_checkpointing=True), torch.randn(5, 4)
    assert all(node.target is checkpoint_block for node, _, _ in block_calls(lora.graph(x)))
    lora.eval()
    assert not any(node.target is checkpoint_block for node, _, _ in block_calls(lora.graph(x)))
    with torch.no_grad():
        assert torch.equal(lora(x), lora(x))


@pytest.mark.slow
def test_the_models_own_switch_throws_it():
    entry = zoo.ENTRIES["LlamaForCausalLM"]
    lora = lorafx.compile(entry.build().train(), {"target_modules": ["q_proj"], "init_lora_weights": False})
    inputs = entry.inputs(2, 7)
    before, loss = kept(lora, **inputs), lora(**inputs).loss
    lora.gradient_checkpointing_enable()
    assert kept(lora, **inputs) < before / 2 and torch.equal(lora(**inputs).loss, loss)
    assert "gradient_checkpointing" in lora.explain().calls[-1].why
    lora.gradient_checkpointing_disable()
    assert kept(lora, **inputs) == before


@pytest.mark.slow
def test_layers_that_all_differ_are_checkpointed_too():
    """Where they ask for it by a flag of their own, as those of transformers do."""
    different, _ = KINDS["none"]
    model = Stack(different)
    for layer in model.layers:
        layer.gradient_checkpointing = True
    lora = lorafx.compile(model, {"target_modules": ["up"]}, gradient_checkpointing=True)
    calls = list(block_calls(lora.graph(torch.randn(5, 4))))
    assert [path for _, _, path in calls] == [f"layers.{number}" for number in range(4)]
    assert all(node.target is checkpoint_block for node, _, _ in calls)


class Writing(nn.Module):
    """A layer that writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x, scale):
        scale.add_(1)
        return torch.tanh(self.up(x)) + scale


@pytest.mark.slow
def test_a_block_that_writes_into_its_inputs_runs_once():
    (lora, flat), x = twins(Writing), torch.randn(5, 4)
    torch.testing.assert_close(gradients(lora, x), gradients(flat, x))
    assert not any(node.target is checkpoint_block for node, _, _ in block_calls(lora.graph(x)))


class WritingToDropped(Layer):
    """A layer that writes into what a dropout gave, which is the layer's input itself where nothing is dropped."""

    def forward(self, x, scale):
        return (
            nn.functional.alpha_dropout(x, 0.0, training=True).add_(self.down(torch.relu(self.up(x))).detach()) * scale
        )


@pytest.mark.slow
def test_a_block_that_writes_into_what_a_dropout_gave_runs_once():
    lora, _ = twins(WritingToDropped)
    calls = [node for node, _, _ in block_calls(lora.graph(torch.randn(5, 4)))]
    assert len(calls) == 4 and not any(node.target is checkpoint_block for node in calls)


class Averaging(nn.Module):
    """A layer that keeps statistics by an operator that does not say so."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x, scale):
        return nn.functional.batch_norm(torch.tanh(self.up(x)), self.mean, self.variance, training=True) * scale


@pytest.mark.slow
def test_statistics_are_kept_once():
    (lora, other), x = twins(Averaging), torch.randn(5, 4)
    gradients(lora, x), gradients(other, x)
    assert other.layers[2].mean.any() and len(list(block_calls(lora.graph(x)))) == 4
    assert all(torch.equal(lora.get_buffer(name), buffer) for name, buffer in other.named_buffers())


class InPlace(Layer):
    def forward(self, x, scale):
        return x + self.down(nn.functional.relu(self.up(x), inplace=True))


def test_an_activation_in_place_is_no_hindrance():
    lora, _ = twins(InPlace)
    calls = list(block_calls(lora.graph(torch.randn(5, 4))))
    assert len(calls) == 4 and all(node.target is checkpoint_block for node, _, _ in calls)


@pytest.mark.slow
def test_a_layer_that_was_changed_before_backward_is_no_guess():
    lora, x = stack(gradient_checkpointing=True), torch.randn(5, 4)
    loss = lora(x).sum()
    with torch.no_grad():
        lora.layers[1].up.weight.add_(1)
    with pytest.raises(RecomputeError, match="written to after it ran"):
        loss.backward()


def test_what_is_asked_for_is_said():
    with pytest.raises(ConfigError, match="gradient_checkpointing='often'"):
        stack(gradient_checkpointing="often")
    with pytest.raises(ConfigError, match="activation_budget=2"):
        stack(activation_budget=2)
    flat = lorafx.passes.default.without("outline_blocks", "checkpoint_blocks")
    with pytest.raises(PipelineError, match="checkpoint_blocks requires `blocks`"):
        stack(gradient_checkpointing=True, pipeline=flat)

"""Blocks: one graph for several layers, on the tensors that each has when it runs."""

import pytest
import torch
from modules import Stack
from torch import nn

import lorafx
from lorafx.errors import RecomputeError
from lorafx.graph.blocks import (
    block_calls,
    blocks_of,
    call_block,
    checkpoint_block,
    is_block_call,
    is_of_block,
    repeated_modules,
)
from lorafx.passes import Canonicalize, OutlineBlocks


def outlined():
    model = Stack(depth=3)
    gm = lorafx.trace(model, torch.randn(5, 4))
    lorafx.Pipeline(Canonicalize(), OutlineBlocks()).run(gm)
    return model, gm


def test_a_block_reads_the_layer_that_it_runs_on():
    model, gm = outlined()
    (block,) = blocks_of(gm)
    x, scale = torch.randn(5, 4), torch.tensor(0.5)
    for layer in model.layers:
        assert torch.equal(call_block(block, layer, x, scale)[0], layer(x, scale))
    with torch.no_grad():
        model.layers[1].down.weight.zero_()
    assert torch.equal(call_block(block, model.layers[1], x, scale)[0], x)


def test_calls_are_found_with_their_layers():
    _, gm = outlined()
    calls = list(block_calls(gm))
    assert [path for _, _, path in calls] == ["layers.0", "layers.1", "layers.2"]
    taken = [node for node in gm.graph.nodes if is_of_block(node) and not is_block_call(node)]
    assert len(taken) == 3 and all(node.args[0] in [call for call, _, _ in calls] for node in taken)


def test_a_checkpointed_block_gives_the_same_gradients_and_notices_a_write():
    model, gm = outlined()
    (block,), layer = blocks_of(gm), model.layers[0]
    x, scale = torch.randn(5, 4, requires_grad=True), torch.tensor(0.5)
    plain, kept = call_block(block, layer, x, scale)[0], checkpoint_block(block, layer, x, scale)[0]
    for a, b in zip(*(torch.autograd.grad(y.sum(), [x, layer.up.weight]) for y in (plain, kept))):
        assert torch.equal(a, b)
    kept = checkpoint_block(block, layer, x, scale)[0]
    with torch.no_grad():
        layer.up.weight.add_(1)
    with pytest.raises(RecomputeError, match="were written to after it"):
        kept.sum().backward()


def test_layers_are_numbered_siblings_of_which_two_are_alike():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixed = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
            self.inner = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()])})

    model = Odd()
    assert repeated_modules(model) == list(model.inner["layers"])

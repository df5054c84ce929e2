"""effects: what writes stays and is noticed, in blocks as elsewhere."""

import torch
from torch import nn

from lorafx.capture.export import trace_part
from lorafx.graph import NoMatch, Rule
from lorafx.graph.blocks import block_calls
from lorafx.graph.effects import drop_dead, must_stay, written_inputs

aten = torch.ops.aten


class Filling(nn.Module):
    """Adds to a state what it makes of x, and gives nothing."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 3)

    def forward(self, x, state):
        state.add_(self.up(x).sum(0))


class Filled(nn.Module):
    """(…, 4) and states (2, 3) -> the states, opened by a gate that they were before: its lines are around layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Filling() for _ in range(2))

    def forward(self, x, states):
        gate = torch.sigmoid(states)
        for number, layer in enumerate(self.layers):
            layer(x, states[number])
        return gate * states


def captured():
    with torch.no_grad():
        model, args = Filled(), (torch.randn(5, 4), torch.zeros(2, 3))
        return model, args, trace_part(model, "", args, {}, once=True)


def test_a_block_that_only_fills_what_it_is_given_stays_and_fills_it():
    model, (x, states), gm = captured()
    drop_dead(gm)
    gm.recompile()
    calls = [node for node, _, _ in block_calls(gm)]
    assert len(calls) == 2 and all(must_stay(node, gm) for node in calls) and not any(node.users for node in calls)
    assert written_inputs(gm) == {1}
    own = states.clone()
    with torch.no_grad():
        assert torch.equal(gm(x, states), model(x, own)) and torch.equal(states, own)
    assert states.any() and not torch.equal(states[0], states[1])


def test_what_a_block_writes_to_between_a_patterns_lines_keeps_it():
    def gated(x):
        return aten.mul.Tensor(aten.sigmoid.default(x), x)

    def one(x):
        return aten.silu.default(x)

    _, _, gm = captured()
    (product,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    refused = Rule(gated, one).find(product)
    assert isinstance(refused, NoMatch) and "written to" in refused.reason

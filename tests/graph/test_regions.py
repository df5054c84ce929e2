"""Regions: which parts of a graph are calls of sibling modules, and which of them compute the same."""

import pytest
import torch
from modules import KINDS, Layer, Stack
from torch import nn

import lorafx
from lorafx.graph.regions import Region, is_size, repeated_calls, signature
from lorafx.passes import Canonicalize
from lorafx.pipeline import Pipeline


def graph(model, x=None):
    gm = lorafx.trace(model, torch.randn(5, 4) if x is None else x)
    Pipeline(Canonicalize()).run(gm)
    return gm


def found(gm, known=()) -> list[list[Region]]:
    return list(repeated_calls(gm, known))


def test_layers_are_one_family_with_what_goes_in_and_out():
    gm = graph(Stack(depth=3))
    ((first, second, third),) = found(gm)
    assert [region.path for region in (first, second, third)] == ["layers.0", "layers.1", "layers.2"]
    assert sorted(first.own.values()) == ["down.weight", "up.bias", "up.weight"]
    (x,) = gm.graph.find_nodes(op="placeholder")
    assert first.inputs[0] is x and second.inputs == (first.nodes[-1], first.inputs[1])
    assert first.outputs == (first.nodes[-1],) and first.nodes[-1].target is torch.ops.aten.add.Tensor
    assert all("layers.1." in str(n.meta["nn_module_stack"]) or n in second.nodes for n in second.nodes)


@pytest.mark.slow
def test_equal_signatures_are_equal_computations():
    for make, expected in KINDS.values():
        calls = found(graph(Stack(make)))
        groups: dict = {}
        for region in calls[0] if calls else ():
            groups.setdefault(region.signature(), []).append(int(region.path.rpartition(".")[2]))
        several = [group for group in groups.values() if expected]
        assert several == expected


@pytest.mark.slow
def test_where_none_is_like_another_there_is_no_family_unless_one_is_known():
    gm = graph(Stack(KINDS["none"][0]))
    assert found(gm) == []
    (layers,) = found(graph(Stack(lambda number: Layer(inner=6))))
    known = {layers[0].signature()}  # layer 0 of "none" is as wide
    ((*regions,),) = found(gm, known)
    assert [region.path for region in regions] == [f"layers.{n}" for n in range(4)]


def test_those_that_ask_for_checkpointing_are_a_family_in_any_case():
    model = Stack(KINDS["none"][0])
    model.layers[2].gradient_checkpointing = True
    assert len(found(graph(model))) == 1


def test_a_result_may_be_wanted_that_nobody_uses_outside():
    ((first, *_),) = found(graph(Stack()))
    inner = first.nodes[1]
    assert Region(first.path, first.nodes, frozenset({inner})).outputs == (inner, first.nodes[-1])


@pytest.mark.parametrize("act", [torch.relu, lambda x: x.relu().sin().cos()], ids=["two and four", "three and four"])
def test_what_runs_in_the_middle_of_a_layer_keeps_it_inline(act):
    gm = graph(Stack(lambda number: Layer(act=act), depth=3))
    ((first, *_),) = found(gm)
    middle = first.nodes[-5]
    with gm.graph.inserting_after(middle):
        between = gm.graph.call_function(torch.ops.aten.neg.default, (middle,))
    between.meta["val"] = middle.meta["val"]
    assert found(gm) == []


class Few(nn.Module):
    """A layer of one operator more than the functions in `steps`."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def forward(self, x, scale):
        x = x * scale
        for step in self.steps:
            x = step(x)
        return x


@pytest.mark.parametrize(("steps", "groups"), [((torch.sin,), 0), ((torch.sin, torch.cos), 1)])
def test_a_layer_has_three_operators_or_more(steps, groups):
    assert len(found(graph(Stack(lambda number: Few(steps))))) == groups


class Nested(nn.Module):
    """Layers that differ, of parts that are alike."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Stack(depth=2 + number) for number in range(2))
        for stack in self.layers:
            stack.head = nn.Linear(4, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_where_layers_differ_their_parts_are_looked_at():
    paths = [[region.path for region in family] for family in found(graph(Nested()))]
    assert paths == [["layers.0.layers.0", "layers.0.layers.1"], [f"layers.1.layers.{n}" for n in range(3)]]


class Borrowing(Stack):
    def forward(self, x):
        return super().forward(x @ self.layers[1].up.weight.t() @ self.layers[1].up.weight)


class Reader(Layer):
    """A layer that reads another's weight."""

    def __init__(self, lender):
        super().__init__()
        self.lender = (lender,)  # not its own module

    def forward(self, x, scale):
        return x + self.down(torch.relu(x @ self.lender[0].up.weight.t())) * scale


def test_a_layer_that_borrows_a_weight_is_no_region():
    assert [len(family) for family in found(graph(Borrowing()))] == [4], "the weight is its own where the layer runs"
    model = Stack(depth=3)
    model.layers[2] = Reader(model.layers[0])
    assert found(graph(model)) == []


def test_a_layer_of_two_operators_is_too_small():
    assert found(graph(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))) == []


def test_sizes_are_no_operators_of_a_layer():
    class Sized(nn.Module):
        def forward(self, x):
            return x * (x.shape[0] + 2)

    gm = graph(Sized())
    kinds = {str(node.target): is_size(node) for node in gm.graph.nodes if node.op == "call_function"}
    assert kinds["aten.mul.Tensor"] is False and any(kinds.values())


def test_a_signature_tells_numbers_shapes_and_places_apart():
    class Two(nn.Module):
        def forward(self, x, y):
            return x - y, y - x, torch.sub(x, y, alpha=2), (x - y).sum(0)

    gm = lorafx.trace(Two(), torch.randn(5, 4), torch.randn(5, 4))
    x, y = gm.graph.find_nodes(op="placeholder")
    a, b, c, d = gm.graph.output_node().all_input_nodes
    assert signature([x, y], [a]) == signature([y, x], [b]) != signature([x, y], [b])
    assert signature([x, y], [a]) != signature([x, y], [c]), "alpha"
    assert signature([x, y], [a]) != signature([d], [d])
    assert signature([x, y], [d.args[0], d]) != signature([x, y], [d.args[0]])
    assert signature([y], [a], {x: "known"}) == signature([y], [a], {x: "known"}) != signature([y], [a], {x: "other"})

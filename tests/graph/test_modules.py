"""Graph modules over a live tree: they read its tensors where they are, and own only what is theirs alone."""

import copy
import pickle

import pytest
import torch
from graphs import Chain
from modules import Stack
from torch import nn

import lorafx
from lorafx.graph.blocks import LAYERS, blocks_of
from lorafx.graph.modules import CAPTURED, accepts, by_leaves, copied, copied_graph, over, refresh
from lorafx.passes import Canonicalize, OutlineBlocks
from lorafx.pipeline import Pipeline


class WithConstants(nn.Module):
    """A plain tensor, a buffer, and a constant that only the graph has."""

    def __init__(self):
        super().__init__()
        self.layer, self.factor = nn.Linear(4, 3), torch.full((3,), 2.0)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x):
        return self.layer(x) * self.factor + self.shift * torch.tensor([1.0, 2.0, 3.0])


def test_what_the_tree_has_is_read_there_and_the_rest_is_the_graphs():
    model, x = WithConstants(), torch.randn(5, 4)
    gm = lorafx.trace(model, x)
    reads = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    assert {"layer.weight", "layer.bias", "factor", "shift"} < reads
    assert all(path.startswith(f"{CAPTURED}.") for path in reads - {"layer.weight", "layer.bias", "factor", "shift"})
    assert gm.layer is model.layer and not list(gm.get_submodule(CAPTURED).parameters())
    assert gm.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(gm(x), model(x))


def test_what_the_tree_replaces_is_seen():
    model, x = WithConstants(), torch.randn(5, 4)
    gm = lorafx.trace(model, x)
    model.layer.weight = nn.Parameter(torch.zeros(3, 4))
    model.shift = torch.full((3,), 7.0)
    assert torch.equal(gm(x), model(x))
    model.layer, model.factor = nn.Linear(4, 3), torch.full((3,), 5.0)
    assert not torch.equal(gm(x), model(x))
    refresh(gm, model)
    assert torch.equal(gm(x), model(x))


def test_a_copy_may_be_rewritten():
    model, x = Stack(depth=3), torch.randn(5, 4)
    gm = lorafx.trace(model, x)
    Pipeline(Canonicalize(), OutlineBlocks()).run(gm)
    gm.meta["note"] = 1
    other = copied(gm, model)
    ((block,), (its,)) = blocks_of(gm), blocks_of(other)
    assert its is not block and its.meta[LAYERS] == block.meta[LAYERS] and its.meta[LAYERS] is not block.meta[LAYERS]
    assert its.up is model.layers[0].up and other.meta["note"] == 1
    before = [str(node) for node in block.graph.nodes]
    (relu,) = its.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.tanh.default
    its.recompile()
    assert [str(node) for node in block.graph.nodes] == before and torch.equal(gm(x), model(x))
    assert not torch.allclose(other(x), model(x))


def test_a_copied_graph_has_the_same_nodes_and_metadata():
    gm = lorafx.trace(Chain(), torch.randn(5, 4))
    other = copied_graph(gm.graph)
    for a, b in zip(gm.graph.nodes, other.nodes, strict=True):
        assert a is not b and (a.op, a.target, a.name) == (b.op, b.target, b.name)
        assert a.op == "output" or (a.meta == b.meta and a.meta is not b.meta)
    x = torch.randn(2, 4)
    assert torch.equal(over(other, gm, gm.get_submodule(CAPTURED))(x), gm(x))


def test_a_graph_is_copied_with_its_tensors_and_never_pickled():
    model, x = Stack(depth=3), torch.randn(5, 4)
    gm = lorafx.trace(model, x)
    Pipeline(Canonicalize(), OutlineBlocks()).run(gm)
    other = copy.deepcopy(gm)
    assert {id(tensor) for tensor in other.parameters()}.isdisjoint(map(id, model.parameters()))
    assert torch.equal(other(x), gm(x))
    with torch.no_grad():
        model.layers[1].up.weight.zero_()
    assert not torch.equal(other(x), gm(x)) and torch.equal(gm(x), model(x))
    for each in (gm, other):
        with pytest.raises(lorafx.errors.CaptureError, match="a graph is not pickled"):
            pickle.dumps(each)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, pair, *, scale):
        return {"out": self.layer(pair["x"]) * scale, "pair": pair["y"] + 1}


def test_by_leaves_it_is_called_with_leaves_and_gives_leaves():
    model, x, y, scale = Nested(), torch.randn(5, 4), torch.randn(2), torch.tensor(3.0)
    gm = lorafx.trace(model, {"x": x, "y": y}, scale=scale)
    found, expected = by_leaves(gm)(x, y, scale), model({"x": x, "y": y}, scale=scale)
    assert len(found) == 2 and torch.equal(found[0], expected["out"]) and torch.equal(found[1], expected["pair"])
    assert gm({"x": x, "y": y}, scale=scale).keys() == expected.keys()


def test_guards_say_which_calls_a_graph_is_for():
    class Cut(nn.Module):
        def forward(self, x):
            return x[:, :3] if x.shape[1] > 4 else x

    gm = lorafx.trace(Cut(), torch.randn(5, 7))
    assert accepts(gm, (torch.randn(2, 9),), {}) and accepts(gm, (torch.randn(2, 5),), {})
    assert not accepts(gm, (torch.randn(2, 4),), {})

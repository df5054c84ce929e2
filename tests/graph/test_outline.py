"""Outlining: a region becomes a call of a block, and a call of a block becomes its operators again."""

import operator

import pytest
import torch
from graphs import text
from modules import Stack

import lorafx
from lorafx.graph import Provenance, made_by
from lorafx.graph.blocks import LAYERS, block_calls, blocks_of, call_block
from lorafx.graph.modules import CAPTURED, copied
from lorafx.graph.outline import (
    add_outputs,
    block_of,
    inline_call,
    keep_block,
    list_layers,
    replace_region,
    run_instead,
    signature_of,
)
from lorafx.graph.regions import Region, repeated_calls
from lorafx.passes import Canonicalize
from lorafx.pipeline import Pipeline

MAKER = Provenance("test")


def graph(depth=3):
    torch.manual_seed(0)
    model = Stack(depth=depth)
    gm = lorafx.trace(model, torch.randn(5, 4))
    Pipeline(Canonicalize()).run(gm)
    (regions,) = repeated_calls(gm)
    return model, gm, regions


def outlined(depth=3):
    """A stack whose layers all run one block."""
    model, gm, regions = graph(depth)
    block = block_of(gm, regions[0])
    for region in reversed(regions):  # what a region is given is what others have made
        replace_region(gm, region, block, MAKER)
    list_layers(gm)
    gm.graph.lint()
    gm.recompile()
    return model, gm, block


def test_a_block_has_the_layers_own_names_and_places():
    model, gm, regions = graph()
    block = block_of(gm, regions[1])
    reads = [node.target for node in block.graph.find_nodes(op="get_attr")]
    assert reads == ["up.weight", "up.bias", "down.weight"] and block.up is model.layers[1].up
    assert [n.op for n in block.graph.nodes][:2] == ["placeholder", "placeholder"]
    for node in block.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        (*_, (path, _)) = node.meta["nn_module_stack"].values()
        assert path in ("up", "down")
    assert signature_of(block) == regions[1].signature() == regions[0].signature()
    assert gm.get_submodule(CAPTURED).block_0 is block and block.meta["name"] == "block_0"


def test_layers_run_one_block_on_their_own_parameters():
    model, gm, block = outlined()
    assert blocks_of(gm) == [block] and block.meta[LAYERS] == ["layers.0", "layers.1", "layers.2"]
    calls = [node for node, _, _ in block_calls(gm)]
    assert all(made_by(call) == MAKER and call.target is call_block for call in calls)
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    assert [n for n in gm.graph.find_nodes(op="get_attr") if "up" in str(n.target)] == []
    parts = [node for node in gm.graph.nodes if node.target is operator.getitem]
    assert all(part.args[1] == 0 and part.meta["val"].shape[1] == 4 for part in parts) and len(parts) == 3
    for size in (5, 3):
        x = torch.randn(size, 4)
        assert torch.equal(gm(x), model(x))


def test_inlined_it_is_the_flat_graph_again():
    model, flat, _ = graph()
    _, gm, _ = outlined()
    for call, block, layer in list(block_calls(gm)):
        inline_call(gm, call, block, layer, MAKER)
    list_layers(gm)
    gm.graph.lint()
    gm.recompile()
    assert blocks_of(gm) == [] and "block_0" not in gm.get_submodule(CAPTURED)._modules
    kinds = [sorted(str(node.target) for node in each.graph.nodes if node.op != "call_module") for each in (gm, flat)]
    assert kinds[0] == kinds[1] and len(text(gm)) == len(text(flat))
    made = [node for node in gm.graph.nodes if node.op == "call_function" and made_by(node) == MAKER]
    paths = {path for node in made for path, _ in list(node.meta["nn_module_stack"].values())[-1:]}
    assert {"layers.0.up", "layers.2.down"} <= paths
    x = torch.randn(3, 4)
    assert torch.equal(gm(x), model(x))


def test_a_layer_may_run_another_block():
    model, gm, block = outlined()
    other = keep_block(gm, copied(block, model.layers[1]))
    assert other.meta["name"] == "block_1"
    (relu,) = other.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.tanh.default
    other.recompile()
    run_instead(next(call for call, _, layer in block_calls(gm) if layer == "layers.1"), other)
    list_layers(gm)
    gm.recompile()
    assert block.meta[LAYERS] == ["layers.0", "layers.2"] and other.meta[LAYERS] == ["layers.1"]
    x, (a, b, c) = torch.randn(3, 4), model.layers
    scale = x.mean()
    b.act = torch.tanh
    assert torch.equal(gm(x), model(x)) and torch.equal(gm(x), model.head(c(b(a(x, scale), scale), scale)))


def test_a_result_that_is_wanted_too_is_given():
    model, gm, block = outlined(2)
    add_outputs(gm, block, [1])
    block.recompile()
    for call, _, _ in block_calls(gm):
        assert [tuple(value.shape)[1:] for value in call.meta["val"]] == [(4,), (6,)]
    x, scale = torch.randn(3, 4), torch.tensor(2.0)
    output, hidden = call_block(block, model.layers[1], x, scale)
    assert torch.equal(hidden, torch.relu(model.layers[1].up(x))) and torch.equal(output, model.layers[1](x, scale))


def test_a_region_that_computes_something_else_is_not_taken_for_the_block():
    _, gm, regions = graph()
    block = block_of(gm, regions[0])
    shorter = Region(regions[1].path, regions[1].nodes[:-1])
    with pytest.raises(ValueError, match="zip"):
        replace_region(gm, shorter, block)


def test_a_block_that_ignores_an_input_is_like_no_region():
    _, _, block = outlined()
    (relu,) = block.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    with block.graph.inserting_before(next(iter(block.graph.nodes))):
        block.graph.placeholder("ignored")
    assert relu in block.graph.nodes and signature_of(block) is None

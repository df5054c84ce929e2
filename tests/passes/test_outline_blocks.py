"""outline_blocks: modules that compute the same run one graph, what differs is told apart, all bits are the same."""

from __future__ import annotations

import operator

import pytest
import torch
import zoo
from graphs import adapted
from modules import KINDS, Layer, Stack, cases
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorafx
from lorafx.graph.blocks import LAYERS, block_calls, blocks_of
from lorafx.graph.printing import graph_lines
from lorafx.passes import Canonicalize, InlineBlocks, OutlineBlocks
from lorafx.pipeline import Context, Pipeline

FLAT = lorafx.passes.default.without("outline_blocks", "checkpoint_blocks")


def layers_of(lora, *call):
    """The layers that each block serves, by number."""
    return [[int(path.rpartition(".")[2]) for path in b.meta[LAYERS]] for b in blocks_of(lora.graph(*call))]


def test_before_and_after():
    gm = lorafx.trace(Stack(depth=2), torch.randn(5, 4))
    before = [line.partition("  #")[0] for line in graph_lines(gm)]
    Pipeline(Canonicalize(), OutlineBlocks()).run(gm)
    after = [line.partition("  #")[0] for line in graph_lines(gm)]
    assert sum("= linear(" in line for line in before) == 5
    assert [line for line in after if "call_block" in line or line.startswith("getitem")] == [
        "call_block_1 = call_block(captured_block_1, layers_0, x, mean)",
        "getitem_1 = getitem(call_block_1, 0)",
        "call_block = call_block(captured_block_0, layers_1, getitem_1, mean)",
        "getitem = getitem(call_block, 0)",
    ]
    here = after.index("block_0, run by layers.0, layers.1:")
    assert after[here + 1 :] == [
        "    x = input",
        "    mean = input",
        "    up_weight = up.weight",
        "    up_bias = up.bias",
        "    linear = linear(x, up_weight, up_bias)",
        "    relu = relu(linear)",
        "    down_weight = down.weight",
        "    linear_1 = linear(relu, down_weight)",
        "    mul = mul.Tensor(linear_1, mean)",
        "    add = add.Tensor(x, mul)",
        "    return (add,)",
    ]


class Counting(nn.Module):
    """(batch, length, 4) -> the same: a layer that asks for the length, and for what it makes of it."""

    def __init__(self, number):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale):
        length = x.shape[1]
        return torch.relu(self.linear(x)) * torch.arange(2 * length, dtype=x.dtype)[:length, None]


def test_sizes_are_computed_once_after_the_guards_and_given_to_layers():
    model = Stack(Counting, depth=3)
    gm = lorafx.trace(model, torch.randn(2, 7, 4))
    with gm.graph.inserting_before(gm.graph.output_node()):
        constant = gm.graph.call_function(operator.add, (2, 3))
    constant.meta["val"] = 5
    OutlineBlocks().rewrite(gm, Context())
    names = [node.name for node in gm.graph.nodes if node.op != "get_attr"]
    assert [name.rstrip("_0123456789") for name in names[:4]] == ["x", "_guards_fn", "sym_size_int", "mul"]
    assert [len(call.args) for call, _, _ in block_calls(gm)] == [5, 5, 5]
    assert names[-2] == constant.name, "a number that is made of no input stays where it is"
    gm.recompile()
    for length in (7, 5):
        x = torch.randn(3, length, 4)
        assert torch.equal(gm(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", cases(KINDS, quick=["alternating"]))
def test_layers_fall_into_kinds(kind):
    make, expected = KINDS[kind]
    torch.manual_seed(0)
    lora, x = adapted(Stack(make), target_modules=["up", "down"]), torch.randn(5, 4)
    assert layers_of(lora, x) == [group for group in expected if len(group) > 1]  # one that is alone stays inline
    assert_as_flat(lora, x)


def assert_as_flat(lora, *call):
    """Outputs and gradients are those of the flat graph, bit for bit."""
    results = []
    for pipeline in (FLAT, lorafx.passes.default):
        lora._lorafx.dispatcher.pipeline = pipeline
        lora._lorafx.dispatcher.clear()
        lora.zero_grad()
        torch.manual_seed(1)
        output = lora(*call)
        output.square().sum().backward()
        results.append((output.detach(), {n: p.grad for n, p in lora.named_parameters() if p.requires_grad}))
    (flat, expected), (ours, gradients) = results
    assert torch.equal(ours, flat) and gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


ADAPTERS = {
    "some layers": ({"layers_to_transform": [1, 2], "layers_pattern": "layers"}, [[0, 3], [1, 2]]),
    "two ranks": ({"rank_pattern": {r"layers\.[01]\.up": 3}}, [[0, 1], [2, 3]]),
    "two scalings": ({"alpha_pattern": {r"layers\.3\.up": 9}}, [[0, 1, 2], [3]]),
    "biases": ({"bias": "lora_only"}, [[0, 1, 2, 3]]),
    "a saved layer": ({"modules_to_save": ["layers.1.down"]}, [[0, 2, 3], [1]]),
    "dropout": ({"lora_dropout": 0.5}, [[0, 1, 2, 3]]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ADAPTERS)
def test_layers_whose_adapters_differ_are_told_apart(case):
    config, expected = ADAPTERS[case]
    torch.manual_seed(0)
    lora, x = adapted(Stack(), target_modules=["up", "down"], **config), torch.randn(5, 4)
    assert layers_of(lora, x) == expected
    assert_as_flat(lora, x)


@pytest.mark.slow
def test_modes_of_single_layers_are_told_apart():
    lora = adapted(Stack(), target_modules=["up"], lora_dropout=0.5)
    lora.layers[2].eval()
    assert layers_of(lora, torch.randn(5, 4)) == [[0, 1, 3], [2]]


@pytest.mark.slow
def test_a_graph_with_blocks_sees_what_happens_to_layers():
    lora, x = adapted(Stack(), target_modules=["up", "down"]), torch.randn(5, 4)
    before = lora(x)
    with torch.no_grad():
        lora.layers[2].up.lora_B.default.weight.add_(1)
    assert not torch.equal(lora(x), before) and len(lora.explain().calls) == 1
    lora.layers[3].down.weight = nn.Parameter(torch.zeros(4, 6), requires_grad=False)
    lora.layers[3].down.lora_B.default.weight.data.zero_()
    changed = lora(x)
    lora._lorafx.dispatcher.clear()
    assert torch.equal(lora(x), changed)


@pytest.mark.slow
def test_merging_and_two_adapters_go_through_blocks():
    torch.manual_seed(0)
    lora, x = adapted(Stack().double(), target_modules=["up", "down"]), torch.randn(5, 4).double()
    lora.add_adapter("other", {"r": 3, "target_modules": ["up"], "init_lora_weights": False})
    lora.set_adapter(["default", "other"])
    both = lora(x)
    assert_as_flat(lora, x)
    lora.merge_adapter(["other"])
    torch.testing.assert_close(lora(x), both)
    assert layers_of(lora, x) == [[0, 1, 2, 3]]
    lora.unmerge_adapter()
    assert torch.equal(lora(x), both)


class Shared(Stack):
    """One layer that runs several times."""

    def forward(self, x):
        for _ in range(3):
            for layer in self.layers:
                x = layer(x, 1.0)
        return self.head(x)


@pytest.mark.slow
def test_a_layer_that_runs_again_is_the_same_block():
    lora, x = adapted(Shared(depth=2), target_modules=["up"]), torch.randn(5, 4)
    gm = lora.graph(x)
    assert [path for _, _, path in block_calls(gm)] == ["layers.0", "layers.1"] * 3 and len(blocks_of(gm)) == 1
    assert_as_flat(lora, x)


class Interleaved(nn.Module):
    """Two stacks that take turns, and a weight of the first that the second borrows."""

    def __init__(self, borrows):
        super().__init__()
        self.a, self.b = (nn.ModuleList(Layer() for _ in range(2)) for _ in range(2))
        if borrows:
            for layer in self.b:
                layer.up.weight = self.a[0].up.weight

    def forward(self, x):
        for first, second in zip(self.a, self.b):
            x = second(first(x, 1.0), 2.0)
        return x


@pytest.mark.slow
@pytest.mark.parametrize(("borrows", "layers"), [(False, [["a.0", "a.1"], ["b.0", "b.1"]]), (True, [])])
def test_two_stacks_that_take_turns(borrows, layers):
    lora, x = adapted(Interleaved(borrows), target_modules=["down"]), torch.randn(5, 4)
    assert_as_flat(lora, x)
    assert [block.meta[LAYERS] for block in blocks_of(lora.graph(x))] == layers


def test_blocks_are_the_layers():
    lora = adapted(Stack(), target_modules=["up"])
    assert lora.blocks == list(lora.layers)
    lora = adapted(Interleaved(borrows=False), target_modules=["up"])
    assert lora.blocks == [*lora.a, *lora.b]
    assert adapted(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), target_modules=["0"]).blocks == []


@pytest.mark.slow
def test_compile_time_passes_run_once_for_all_layers():
    counts = []
    for depth in (2, 12):
        lora = adapted(Stack(depth=depth), target_modules=["up", "down"])
        gm = lorafx.trace(lora, torch.randn(5, 4))
        steps = {step.name: step for step in lorafx.passes.default.run(gm, lora._lorafx.context)}
        assert steps["insert_adapters"].rewrites == 2 * depth == steps["insert_adapters"].sites
        (block,) = blocks_of(gm)
        counts.append(len(block.graph.nodes))
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BertForSequenceClassification"])
def test_inlined_again_it_is_the_flat_graph(name):
    entry = zoo.ENTRIES[name]
    lora = lorafx.compile(entry.build().train(), {"target_modules": entry.targets, "init_lora_weights": False})
    inputs = entry.inputs(2, 7)
    results = []
    for pipeline in (lorafx.passes.default, lorafx.passes.default + (InlineBlocks(),), FLAT):
        gm = lorafx.trace(lora, **inputs)
        pipeline.run(gm, lora._lorafx.context)
        assert bool(blocks_of(gm)) == (pipeline is lorafx.passes.default)
        results.append((len(gm.graph.nodes), gm(**inputs).loss))
    assert results[1][0] == results[2][0]
    assert torch.equal(results[0][1], results[1][1]) and torch.equal(results[1][1], results[2][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CLIPModel"])
def test_outlined_models_compute_the_same_bits(name):
    entry = zoo.ENTRIES[name]
    losses = []
    for pipeline in (None, FLAT):
        config = {"target_modules": entry.targets, "init_lora_weights": False}
        lora = lorafx.compile(entry.build().train(), config, random_state=0, pipeline=pipeline)
        inputs = entry.inputs(2, 7)
        output = lora(**inputs)
        output.loss.backward()
        losses.append((output.loss, [p.grad for p in lora.parameters() if p.grad is not None]))
        assert bool(blocks_of(lora.graph(**inputs))) == (pipeline is None)
    assert torch.equal(losses[0][0], losses[1][0])
    assert all(map(torch.equal, losses[0][1], losses[1][1])) and len(losses[0][1]) == len(losses[1][1])


@pytest.mark.slow
def test_layers_that_are_sites_themselves_stay_inline():
    model = nn.Sequential(*(Conv1D(4, 4) for _ in range(3)))
    lora, x = adapted(model, target_modules=["0", "1", "2"]), torch.randn(5, 2, 4)
    assert blocks_of(lora.graph(x)) == []
    assert_as_flat(lora, x)


class Within(nn.Module):
    """Layers that have numbered layers within, as MobileBERT's have: (n, 6) -> (n, 6)."""

    def __init__(self, depth: int):
        super().__init__()
        self.query = nn.Linear(6, 6)
        self.feed = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(depth))

    def forward(self, x):
        x = x + torch.tanh(self.query(x))
        for feed in self.feed:
            x = x + feed(x)
        return x


@pytest.mark.slow
@pytest.mark.parametrize(("outer", "inner"), [(1, 3), (2, 2), (3, 3)])
def test_of_layers_within_layers_the_outermost_are_blocks(outer, inner):
    model, x = nn.Sequential(*(Within(inner) for _ in range(outer))), torch.randn(5, 6)
    lora = lorafx.compile(model, {"r": 2, "target_modules": r".*(query|feed\.\d\.2)", "init_lora_weights": False})
    y = lora(x)
    y.sum().backward()
    assert all(p.grad is not None for p in lora.parameters() if p.requires_grad)
    (block,) = blocks_of(lora.graph(x))
    assert len(block.meta[LAYERS]) == (outer if outer > 1 else inner)
    lora.merge_adapter()
    torch.testing.assert_close(model(x), y)

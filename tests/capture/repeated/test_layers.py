"""Repeated layers are traced once, and the graph is the one that tracing all of them gives."""

from __future__ import annotations

import copy
import queue
from collections.abc import Mapping

import pytest
import torch
import zoo
from modules import cases
from torch import nn
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

import lorafx
from lorafx.capture.caches import register_caches
from lorafx.capture.export import trace_part
from lorafx.errors import CaptureError
from lorafx.graph.blocks import block_calls, blocks_of
from lorafx.passes import Canonicalize, ElideCasts, InlineBlocks
from lorafx.pipeline import Pipeline


class Layer(nn.Module):
    """(…, 4) -> (…, 4), and what `act` makes of the layer's number and what is in between."""

    def __init__(self, number=0, act=lambda number, x: x.relu(), inner=6):
        super().__init__()
        self.up, self.down = nn.Linear(4, inner), nn.Linear(inner, 4, bias=False)
        self.number, self.act = number, act

    def forward(self, x, scale, kept=None):
        inner = self.act(self.number, self.up(x))
        if kept is not None:
            kept[self.number] = inner
        return x + self.down(inner) * scale


class Stack(nn.Module):
    def __init__(self, make=Layer, depth=5):
        super().__init__()
        self.layers = nn.ModuleList(make(number) for number in range(depth))
        self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def run(self, layer, x, scale):
        return layer(x, scale)

    def forward(self, x):
        x = self.embed(x)
        scale = x.mean()
        for layer in self.layers:
            x = self.run(layer, x, scale)
        return self.head(x)


class Keeping(Stack):
    """What each layer has in between is kept by the layer's number, and added at the end."""

    def forward(self, x):
        x = self.embed(x)
        kept, scale = {}, x.mean()
        for layer in self.layers:
            x = layer(x, scale, kept)
        return self.head(x) + sum(kept[n].sum() * (n + 1) for n in sorted(kept))


class HalfWithoutGrad(Stack):
    def run(self, layer, x, scale):
        with torch.set_grad_enabled(layer.number > 1):
            return layer(x, scale)


class Again(Stack):
    def forward(self, x):
        return super().forward(super().forward(x)[..., :1] + x)


class Sized(Stack):
    """Sizes of what a layer makes are used outside it."""

    def forward(self, x):
        x = self.embed(x)
        kept, scale = {}, x.mean()
        for layer in self.layers:
            x = layer(x, scale, kept)
            x = x * (kept[layer.number].shape[0] + kept[layer.number].shape[1])
        return self.head(x)


class Borrowing(Stack):
    """A layer's weight is read outside the layer, before or after the layer itself."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, x):
        weight = self.layers[2].up.weight
        return super().forward(x @ weight.t() @ weight) if self.first else super().forward(x) @ weight[:3, :3]


class Holding(nn.Module):
    """A layer that keeps its weight in a list too."""

    def __init__(self, number):
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.kept = [self.up.weight]

    def forward(self, x, scale):
        return x + nn.functional.linear(x, self.kept[0]) * scale


class Branching(nn.Module):
    """A layer with an operator that takes functions."""

    def __init__(self, number):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, scale):
        return torch.cond(x.sum() > 0, lambda x: self.up(x), lambda x: self.down(x), (x,)) * scale


class InPlace(nn.Module):
    """A layer that writes to what it is given."""

    def __init__(self, number):
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x, scale):
        x += self.up(x.clone()) * scale.detach()
        return x


class Norm(nn.Module):
    """A layer that writes to its own buffers."""

    def __init__(self, number):
        super().__init__()
        self.up, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x, scale):
        return self.norm(self.up(x)) * scale


def chosen(number, x):
    return x.relu() if number != 3 else x.tanh()


def in_place(number, x):
    return (x + 1).mul_(2.0) if number != 3 else (x + 1).add_(1.0)


def in_autocast(number, x):
    with torch.autocast("cpu", torch.bfloat16, enabled=number == 2):
        x = x @ x.t() @ x
    return x.float()


def of_data(number, x):
    return x * x[x > 0].numel()


def views(number, x):
    first, second = x.chunk(2, -1)
    return torch.cat([first.sigmoid() if number == 1 else first.exp(), second], -1)


ALL = [0, 1, 2, 3, 4]
MODELS = {  # and the layers that are blocks, as they come from tracing
    "equal": (Stack, ALL),
    "a number in an operator": (lambda: Stack(lambda n: Layer(n, lambda n, x: x * n)), []),
    "a number that chooses": (lambda: Stack(lambda n: Layer(n, chosen)), [0, 1, 2, 4]),
    "two kinds in turn": (lambda: Stack(lambda n: Layer(n, inner=6 + n % 2)), ALL),
    "in-place operators within": (lambda: Stack(lambda n: Layer(n, in_place)), [0, 1, 2, 4]),
    "views of one result": (lambda: Stack(lambda n: Layer(n, views)), [0, 2, 3, 4]),
    "autocast in one": (lambda: Stack(lambda n: Layer(n, in_autocast)), []),
    "sizes that data decides": (lambda: Stack(lambda n: Layer(n, of_data)), []),
    "dropout": (lambda: Stack(lambda n: Layer(n, lambda n, x: nn.functional.dropout(x, 0.5))), ALL),
    "results by number": (Keeping, ALL),
    "sizes used outside": (Sized, ALL),
    "half of them without gradients": (HalfWithoutGrad, [3, 4]),
    "a weight borrowed before": (lambda: Borrowing(True), ALL),
    "a weight borrowed after": (lambda: Borrowing(False), ALL),
    "a weight in a list": (lambda: Stack(Holding), []),
    "operators that take functions": (lambda: Stack(Branching), []),
    "each twice": (Again, ALL + ALL),
    "writing to inputs": (lambda: Stack(InPlace), []),
    "writing to buffers": (lambda: Stack(Norm), []),
}


QUICK = ["writing to buffers"]


def flat(gm):
    """Each operator with its arguments, when blocks are inline."""
    Pipeline(Canonicalize(), ElideCasts(), InlineBlocks(), Canonicalize(), ElideCasts()).run(gm)
    reads = [str(node.target) for node in gm.graph.find_nodes(op="get_attr") if "captured" not in str(node.target)]
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and n.target is not torch.ops.aten.sym_size.int]
    return [(str(n.target), str(n.meta["val"])) for n in nodes], set(reads)


@pytest.mark.parametrize("name", cases(MODELS, quick=QUICK))
def test_it_is_the_graph_that_tracing_all_layers_gives(name):
    make, expected = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(5, 4)
    graphs = [trace_part(model, "", (x,), {}, once=once) for once in (True, False)]
    layers = [int(path.rpartition(".")[2]) for _, _, path in block_calls(graphs[0])]
    assert layers == expected
    for size in (5, 3):
        outputs = []
        for gm in graphs:
            torch.manual_seed(1)
            model.zero_grad()
            output = gm(torch.randn(size, 4))
            output.sum().backward()
            outputs.append([output, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert all(map(torch.equal, *outputs)) and len(outputs[0]) == len(outputs[1])
    ours, all_traced = map(flat, graphs)
    assert ours == all_traced


# One of each way in which layers repeat: two stacks, two kinds in turn, experts, stages, plain torch's own encoder,
# code that goes by sites; tests/peft/test_zoo.py has the numbers of all others.
WHOLE = [
    *("T5ForConditionalGeneration", "Gemma3ForCausalLM", "MixtralForCausalLM", "SwinForImageClassification"),
    *("TransformerEncoder", "DebertaV2ForSequenceClassification"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_come_out_as_without(name):
    """The same operators, by the same bits: as captured with blocks, inlined again, and captured without."""
    entry = zoo.ENTRIES[name]
    torch.manual_seed(0)
    model, call = entry.build().train(), entry.inputs(2, 7)
    args, kwargs = ((), dict(call)) if isinstance(call, Mapping) else (tuple(call), {})
    register_caches(model)
    try:
        all_traced = trace_part(model, "", args, kwargs)
    except CaptureError as error:
        pytest.skip(f"it goes by sites: {str(error)[:80]}")
    ours = trace_part(model, "", args, kwargs, once=True)
    expected, found = (seeded(gm, args, kwargs) for gm in (all_traced, ours))
    assert all(map(torch.equal, found, expected)) and len(found) == len(expected)
    operators, reads = flat(ours)
    assert all(map(torch.equal, seeded(ours, args, kwargs), expected))
    all_operators, all_reads = flat(all_traced)
    assert sorted(operators) == sorted(all_operators) and reads == all_reads


def seeded(gm, args, kwargs):
    """The tensors that a graph gives, its random numbers from one seed."""
    torch.manual_seed(1)
    args, kwargs = copy.deepcopy((args, kwargs))
    return [leaf for leaf in pytree.tree_leaves(gm(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]


def test_how_much_is_traced_does_not_depend_on_depth(monkeypatch):
    traced, proxy_call = [], proxy_tensor.proxy_call
    monkeypatch.setattr(proxy_tensor, "proxy_call", lambda *args: traced.append(args[2]) or proxy_call(*args))
    counts = []
    for depth in (3, 12):
        traced.clear()
        trace_part(Stack(depth=depth), "", (torch.randn(5, 4),), {}, once=True)
        counts.append(len(traced))
    assert counts[0] == counts[1] > 0


def test_the_python_of_every_layer_runs():
    seen = queue.SimpleQueue()  # a list would be seen to change
    model = Stack(lambda n: Layer(n, lambda n, x: seen.put(n) or x.relu()))
    trace_part(model, "", (torch.randn(5, 4),), {}, once=True)
    assert [seen.get() for _ in ALL] == ALL and seen.empty()


def test_layers_with_a_common_weight_stay_inline():
    model = Stack()
    model.layers[3].up.weight = model.layers[1].up.weight
    gm = trace_part(model, "", (torch.randn(5, 4),), {}, once=True)
    assert [path for _, _, path in block_calls(gm)] == ["layers.0", "layers.2", "layers.4"]


class Turning(Layer):
    """A layer that multiplies by one of two tables, as layers take turns with local and global positions."""

    def __init__(self, number, tables):
        super().__init__(number)
        self.table = tables[number % 2]

    def forward(self, x, scale):
        return super().forward(x, scale) * self.table.weight


def test_a_buffer_that_some_layers_share_is_theirs():
    tables = [nn.Module() for _ in range(2)]
    for number, table in enumerate(tables):
        table.register_buffer("weight", torch.full((4,), 1.0 + 4 * number))
    model, x = Stack(lambda number: Turning(number, tables)), torch.randn(5, 4)
    gm = trace_part(model, "", (x,), {}, once=True)
    assert len(list(block_calls(gm))) == 5 and len(blocks_of(gm)) == 1
    assert torch.equal(gm(x), model(x))


@pytest.mark.slow
def test_a_part_that_is_called_by_itself():
    model = nn.ModuleDict({"stack": Stack()})
    lora = lorafx.compile(model, {"target_modules": ["up"], "init_lora_weights": False})
    x = torch.randn(5, 4)
    output = lora["stack"](x)
    (program,) = lora._lorafx.dispatcher
    assert [path for _, _, path in block_calls(program.gm)] == [f"stack.layers.{n}" for n in ALL]
    flat_pipeline = lorafx.passes.default.without("outline_blocks", "checkpoint_blocks")
    other = lorafx.compile(model, {"target_modules": ["up"], "init_lora_weights": False}, pipeline=flat_pipeline)
    other.load_state_dict(lora.state_dict())
    assert torch.equal(other["stack"](x), output)


@pytest.mark.slow
def test_a_captured_block_is_split_where_adapters_differ_and_inlined_where_they_reach_out():
    lora = lorafx.compile(Stack(), {"target_modules": ["up"], "rank_pattern": {r"layers\.[01]\.up": 3}})
    gm = lora.graph(torch.randn(5, 4))
    assert [[int(path[7:]) for path in block.meta["layers"]] for block in blocks_of(gm)] == [[0, 1], [2, 3, 4]]
    again = lora.graph(torch.randn(6, 4))
    assert again is gm
    lora.add_adapter("other", lorafx.LoraConfig(target_modules=["down"]))
    lora.set_adapter("other")
    assert len(blocks_of(lora.graph(torch.randn(5, 4)))) == 1  # from the same captured graph
    assert len(blocks_of(gm)) == 2


class InTwoLines(Layer):
    def forward(self, x, scale):
        inner = self.up(x)
        return self.down(self.act(self.number, inner)) * scale


def test_what_is_traced_after_a_departure_says_where_it_comes_from():
    gm = trace_part(Stack(lambda n: InTwoLines(n, chosen)), "", (torch.randn(5, 4),), {}, once=True)
    (up,) = (
        n for n in gm.graph.nodes if [str(read.target) for read in n.all_input_nodes[1:2]] == ["layers.3.up.weight"]
    )
    assert "inner = self.up(x)" in up.stack_trace and "self.act(" not in up.stack_trace
    assert [path for path, _ in up.meta["nn_module_stack"].values()] == ["", "layers.3", "layers.3.up"]

"""Small models and a text form of graphs, for tests of single passes."""

import torch
from torch import nn
from torch.fx import GraphModule

import lorafx
from lorafx.adapters.low_rank import LowRank
from lorafx.graph.printing import graph_lines
from lorafx.pipeline import Context, Pipeline

_names = [each.name for each in lorafx.passes.default]
PREPARE = lorafx.passes.default[: _names.index("insert_adapters")]
INSERT = lorafx.passes.default[: len(PREPARE) + 1]


def in_float32(passes):
    """The same passes, with adapters' products in float32."""
    return [lorafx.passes.InsertAdapters("float32") if each.name == "insert_adapters" else each for each in passes]


class Chain(nn.Module):
    """(…, 4) -> (…, 3): two linear layers, the first without a bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6, bias=False)
        self.second = nn.Linear(6, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def adapted(model: nn.Module, adapter_compute_dtype=None, **config) -> lorafx.AdaptedModel:
    """An adapted model whose B is not zero."""
    chosen = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **config}
    return lorafx.compile(model, chosen, random_state=0, adapter_compute_dtype=adapter_compute_dtype)


def change(lora: lorafx.AdaptedModel, name: str, site) -> dict[str, torch.Tensor]:
    """What an adapter adds to a site's base parameters, by their name, in float64."""
    adapter = lora._lorafx.adapters[name]
    tensors = {suffix: tensor.double() for suffix, tensor in adapter.tensors_at(lora, site).items()}
    at = adapter.operands(site, tensors, adapter.numbers(lora, site))
    deltas = {role: adapter.kind.delta(role, at) for role in adapter.kind.changes(site, adapter.config)}
    return {role: delta.dense() if isinstance(delta, LowRank) else delta for role, delta in deltas.items()}


def context(lora: lorafx.AdaptedModel) -> Context:
    """What the pipeline of an adapted model is given."""
    return lora._lorafx.context


def run(lora: lorafx.AdaptedModel, passes, *args, **kwargs) -> GraphModule:
    """A captured call after some passes."""
    gm = lorafx.trace(lora, *args, **kwargs)
    Pipeline(*passes).run(gm, context(lora))
    return gm


def text(gm: GraphModule) -> list[str]:
    """A graph, a line a node, without inputs, guards, output and shapes."""
    lines = [line.partition("  # ")[0] for line in graph_lines(gm)]
    return [line for line in lines if " = input" not in line and "guards_fn" not in line and "return " not in line]

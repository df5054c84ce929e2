"""fuse_loss: an output head and the cross entropy of its logits become one operator, which never holds the logits.

cross_entropy(softcap(k · (x Wᵀ + b)), labels)  ->  linear_cross_entropy(x, W, b, …, labels, …)
logits that the graph also returns              ->  defer(head, dtype, x, W, …): computed when they are read

The operator computes logits chunk by chunk (`lorafx/ops/linear_cross_entropy.py`); deferred logits are explained in
`lorafx/ops/deferral.py`. The head is found by following the loss's input backwards: through casts that lose nothing,
views and slices of rows, a soft cap, a scale. An adapted head is `lora_linear`, so `fuse_lora` comes first. A loss that
is not fused has the reason in its meta.

Gain (`tests/bench/loss_head.py`, two CPU cores): a step of an 8-layer Llama, vocabulary 32k, 1024 tokens, peaks at 0.60
of PEFT's memory in float32 and 0.48 in bfloat16; without this pass at 1.03 and 1.02.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lorafx import ops  # noqa: F401, defines torch.ops.lorafx
from lorafx.graph import (
    INHERITED,
    MADE_BY,
    SITE,
    Match,
    NoMatch,
    Provenance,
    Rule,
    describe,
    fake_mode_of,
    marks_of,
    match,
    within_vmap,
    writes,
)
from lorafx.graph.blocks import LAYERS
from lorafx.graph.modules import CAPTURED
from lorafx.graph.outline import graph_of
from lorafx.graph.regions import Region
from lorafx.ops.deferral import NOT_FUSED, defer
from lorafx.pipeline import Context, Pass

aten = torch.ops.aten
_MEAN, _SUM = 1, 2  # as aten numbers reductions


def loss(logits, labels, class_weights, reduction, ignore_index, label_smoothing):
    return aten.cross_entropy_loss.default(logits, labels, class_weights, reduction, ignore_index, label_smoothing)


def softcapped(logits, softcap):
    return aten.mul.Tensor(aten.tanh.default(aten.div.Tensor(logits, softcap)), softcap)


def multiplied(logits, factor):
    return aten.mul.Tensor(logits, factor)


def divided(logits, divisor):
    return aten.div.Tensor(logits, divisor)


def frozen(x, weight, bias):
    return aten.linear.default(x, weight, bias)


def adapted(x, weight, bias, z, lora_A, lora_B, scaling):
    return torch.ops.lorafx.lora_linear.default(x, weight, bias, z, lora_A, lora_B, scaling)


def fused(
    x, weight, bias, hidden, lora_B, scaling, labels, reduction, ignore_index, label_smoothing, softcap, scale, dtype
):
    total = torch.ops.lorafx.linear_cross_entropy.default(
        x, weight, bias, hidden, lora_B, scaling, labels, reduction, ignore_index, label_smoothing, softcap, scale
    )
    return aten.to.dtype(total, dtype)


RULE = Rule(loss, fused)  # `_way_back` finds values for the names that `loss` lacks

_SAME = (aten.contiguous.default, aten.clone.default)
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_ALIKE = (aten.slice.Tensor, aten.flatten.using_ints)  # their arguments do not depend on the last dimension's size


@dataclass
class _Way:
    """The way back from a loss to its head: the nodes on it, and what they do to the head's result."""

    nodes: list[Node]  # from the loss to the head
    bindings: dict[str, Any]
    rows: list[Node] = field(default_factory=list)  # views and slices, the last first
    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class FuseLoss(Pass):
    """Afterwards no logits are computed for a loss alone, and those that the graph returns are deferred.

    A loss stays if the graph uses the logits otherwise; if it has class weights, soft labels or `reduction="none"`; if
    its head is no single product, or has several adapters, or one of another dtype.
    """

    exact = True
    requires = frozenset({"adapters"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        count = 0
        for node in gm.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
            way = _way_back(node, may_give=LAYERS not in gm.meta)
            if isinstance(way, _Way) and _is_written_after(way.nodes[-1], gm):
                way = NoMatch(way.nodes[-1], "something is written in place after the head")
            if isinstance(way, NoMatch):
                node.meta[NOT_FUSED] = str(way)
            else:
                _fuse(gm, way, self.name)
                count += 1
        return count


# --- the way back ----------------------------------------------------------------------------------------------------


def _way_back(anchor: Node, may_give: bool) -> _Way | NoMatch:
    """How the input of a loss comes from its head, or why it cannot be fused."""
    found = match(loss, anchor)
    assert isinstance(found, Match)
    reason = _reason_against(found.bindings)
    if reason:
        return NoMatch(anchor, reason)
    way, node = _Way([anchor], dict(found.bindings)), found.bindings["logits"]
    if node.target is aten.transpose.int and node.meta["val"].ndim == 3 and _swaps_last(node):
        way.nodes.append(node)  # (N, classes, tokens)
        node = node.args[0]
    elif node.meta["val"].ndim != 2:
        return NoMatch(anchor, "its classes are not the last dimension")
    while not isinstance(head := _head(node), Match):
        step = _step_back(node, way)
        if isinstance(step, NoMatch):
            return step
        node = step
    way.nodes.append(node)
    way.bindings |= head.bindings
    needed = _needed_otherwise(way, may_give)
    return way if needed is None else needed


def _reason_against(bound: dict[str, Any]) -> str | None:
    if within_vmap(bound["logits"]):
        return "it is within a vmap"
    logits, labels = bound["logits"].meta["val"], bound["labels"].meta["val"]
    if bound["class_weights"] is not None:
        return "it has class weights"
    if bound["reduction"] not in (_MEAN, _SUM):
        return "it is not reduced"
    if labels.dtype != torch.int64 or labels.ndim != logits.ndim - 1:
        return "its labels are no class numbers"
    return None


def _swaps_last(node: Node) -> bool:
    return {dim % 3 for dim in node.args[1:]} == {1, 2}  # type: ignore[operator]


def _head(node: Node) -> Match | NoMatch:
    found = match(frozen, node) or match(adapted, node)
    if isinstance(found, Match) and not isinstance(found.bindings["weight"].meta["val"].shape[0], int):
        return NoMatch(node, "the number of classes is not fixed")
    return found


def _step_back(node: Node, way: _Way) -> Node | NoMatch:
    """One step from the loss towards its head, noted in `way`."""
    capped = match(softcapped, node)
    if isinstance(capped, Match) and way.softcap is None and way.scale == 1.0 and _is_number(capped, "softcap"):
        way.softcap = float(capped.bindings["softcap"])
        way.nodes += [node, node.args[0], node.args[0].args[0]]  # type: ignore[union-attr, list-item]
        return capped.bindings["logits"]
    scaled = match(multiplied, node) or match(divided, node)
    if isinstance(scaled, Match) and _is_number(scaled, "factor", "divisor"):
        bound = scaled.bindings
        way.scale *= bound["factor"] if "factor" in bound else 1 / bound["divisor"]
        way.nodes.append(node)
        return bound["logits"]
    if not (node.op == "call_function" and _keeps_classes(node)):
        return NoMatch(node, f"its logits come from {node.target}")
    way.nodes.append(node)
    if node.target not in (*_SAME, *_CASTS):
        way.rows.append(node)
    return node.args[0]  # type: ignore[return-value]


def _is_number(found: Match, *names: str) -> bool:
    return all(isinstance(found.bindings[name], (int, float)) for name in names if name in found.bindings)


def _keeps_classes(node: Node) -> bool:
    """Whether a node only views, copies or leaves out rows, or is a cast that loses nothing."""
    if node.target in _SAME:
        return True
    if node.target not in (*_CASTS, *_VIEWS, *_ALIKE):
        return False
    now, before = node.meta["val"], node.args[0].meta["val"]  # type: ignore[union-attr]
    if node.target in _CASTS:
        return torch.promote_types(now.dtype, before.dtype) == now.dtype and now.device == before.device
    if node.target in (*_VIEWS, aten.flatten.using_ints):
        return isinstance(now.shape[-1], int) and now.shape[-1] == before.shape[-1]
    dim = node.args[1] if len(node.args) > 1 else 0
    return dim % now.ndim != now.ndim - 1  # type: ignore[operator]


def _needed_otherwise(way: _Way, may_give: bool) -> NoMatch | None:
    """Why the logits have to be computed as they are, if they do."""
    inside = {*way.nodes}
    for node in way.nodes[1:]:
        others = [user for user in node.users if user not in inside]
        if any(user.op != "output" for user in others):
            return NoMatch(node, f"its logits are also used by {others[0].name}")
        if others and not may_give:
            return NoMatch(node, "its logits are what a layer gives")
        if others and _rows_between(way, node):
            return NoMatch(node, "its logits are given in another shape")
    return None


def _rows_between(way: _Way, node: Node) -> bool:
    """Whether there are views or slices, or a transpose, between the head and a node."""
    after = way.nodes[way.nodes.index(node) :]
    return any(other in way.rows or other.target is aten.transpose.int for other in after)


def _is_written_after(head: Node, gm: GraphModule) -> bool:
    """Whether anything is written to after the head runs: its input, which is now read later, might be changed then."""
    return any(node > head and writes(node, gm) for node in gm.graph.nodes)


# --- the way forward -------------------------------------------------------------------------------------------------


def _fuse(gm: GraphModule, way: _Way, name: str) -> None:
    anchor, head, bound, mode = way.nodes[0], way.nodes[-1], way.bindings, fake_mode_of(gm)
    where = Provenance(name, head.meta[SITE].name if SITE in head.meta else "")
    marks = marks_of(head)

    def add(target: Any, *args: Any) -> Node:
        node = gm.graph.call_function(target, args)
        describe(node, anchor, where, gm, mode)
        return node

    _give_later(gm, way, where)
    with gm.graph.inserting_before(anchor):
        taken = _taken(way)
        x, z = (_same_rows(bound.get(which), taken, add) for which in ("x", "z"))
        hidden = add(aten.linear.default, z or x, bound["lora_A"]) if "lora_A" in bound else None
    fresh = {"lora_B": None, "scaling": 0.0, **bound, "x": x, "hidden": hidden, "softcap": way.softcap}
    fresh |= {"scale": float(way.scale), "dtype": anchor.meta["val"].dtype}
    result, new = RULE.apply(gm, Match(anchor, tuple(way.nodes)), where, mode, fresh)
    if new[-1].meta["val"].dtype == new[-2].meta["val"].dtype:  # the cast changes nothing
        result.replace_all_uses_with(new[-2])
        gm.graph.erase_node(result)
    new[-2].meta |= marks


def _taken(way: _Way) -> list[Node]:
    """The views and slices that choose rows, in order; views after the last slice only flatten."""
    forward = way.rows[::-1]
    slices = [number for number, node in enumerate(forward) if node.target is aten.slice.Tensor]
    return forward[: slices[-1] + 1] if slices else []


def _same_rows(node: Node | None, taken: list[Node], add: Any) -> Node | None:
    """The rows of the head's input (`node`) that belong to the rows of its output which the loss takes."""
    for step in taken if node is not None else ():
        if step.target in _ALIKE:
            node = add(step.target, node, *step.args[1:])
        else:
            width = node.meta["val"].shape[-1]  # type: ignore[union-attr]
            node = add(aten.reshape.default, node, [*step.args[1][:-1], width])  # type: ignore[index, misc]
    return node


def _give_later(gm: GraphModule, way: _Way, where: Provenance) -> None:
    """Defer those values on the way that the graph returns."""
    output, captured = gm.graph.output_node(), gm.get_submodule(CAPTURED)
    for node in (node for node in way.nodes[1:] if output in node.users):
        head, inputs = _head_graph(way.nodes[way.nodes.index(node) :])
        name = f"head_{sum(child.startswith('head_') for child in captured._modules)}"
        captured.add_module(name, head)
        inherited = {key: node.meta[key] for key in INHERITED if key in node.meta} | {MADE_BY: where}
        value: Tensor = node.meta["val"]
        with gm.graph.inserting_before(output):
            spot = gm.graph.get_attr(f"{CAPTURED}.{name}")
            later = gm.graph.call_function(defer, (spot, value.dtype, *inputs))
        spot.meta, later.meta = inherited | {"val": head}, inherited | {"val": value}
        output.replace_input_with(node, later)


def _head_graph(nodes: list[Node]) -> tuple[GraphModule, list[Node]]:
    """The graph from the head, the last of `nodes`, to the value of the first of them; and its inputs."""
    region = Region("", tuple(reversed(nodes)))  # the head is first, and so are its x and weight among the inputs
    graph = graph_of(region)
    output = graph.output_node()
    output.args = (output.args[0][region.outputs.index(nodes[0])],)  # type: ignore[index]
    return GraphModule(nn.Module(), graph), list(region.inputs)

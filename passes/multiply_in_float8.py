"""multiply_in_float8: linear layers whose weight is held in float8 multiply in float8, forward and backward.

linear(x, from_float8(Q, s), b)                      ->  float8_linear(x, Q, s, b)
lora_linear(x, from_float8(Q, s), b, z, A, B, c)     ->  float8_lora_linears(x, [Q], [s], [b], z, [A], [B], [c])[0]
lora_linears(x, [from_float8(Q, s), …], …)           ->  float8_lora_linears(x, [Q, …], [s, …], …)

No weight is made dense, and a GPU multiplies float8 up to twice as fast as bfloat16. It is not in the default pipeline
because it rounds activations and gradients to float8, too (`lorafx/ops/float8.py`; docs/performance.md has what that
does to training); the adapters' products see them unrounded. On a CPU the same numbers are multiplied in float32. It
goes at the end, and the base is converted first:

    model = lorafx.to_float8(model.requires_grad_(False))
    lorafx.compile(model, config, pipeline=lorafx.passes.default + [lorafx.passes.MultiplyInFloat8()])
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lorafx import ops  # noqa: F401, defines torch.ops.lorafx
from lorafx.errors import ConfigError
from lorafx.graph import Match, Provenance, Rule, arguments, describe, fake_mode_of, made_by, marks_of, within_vmap
from lorafx.ops.float8 import LEAST_CAPABILITY, capability, multiplies
from lorafx.ops.modes import autocast_dtype
from lorafx.pipeline import Context, Pass
from lorafx.torch_private.graphs import is_erased, name_of

aten, own = torch.ops.aten, torch.ops.lorafx
_one, _several, _dense = own.lora_linear.default, own.lora_linears.default, own.from_float8.default


def dense(x, weight, scale, dtype, bias):
    return aten.linear.default(x, own.from_float8.default(weight, scale, dtype), bias)


def dense_by_own_kernel(x, weight, scale, dtype, bias):
    return own.linear.default(x, own.from_float8.default(weight, scale, dtype), bias)


def in_float8(x, weight, scale, bias):
    return own.float8_linear.default(x, weight, scale, bias)


def _check(found: Match) -> str | None:
    weight = next(node for node in found.nodes if node.target is _dense)
    return None if _fits(found.bindings["x"], weight) else "x has another dtype, or is within a vmap"


RULES = Rule(dense, in_float8, _check), Rule(dense_by_own_kernel, in_float8, _check)


@dataclass(frozen=True)
class MultiplyInFloat8(Pass):
    """Afterwards no weight in float8 is made dense for a linear layer.

    Raises `ConfigError` on a CUDA device that has no products of float8.
    """

    requires = frozenset({"adapters"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        dense = gm.graph.find_nodes(op="call_function", target=_dense)
        for node in dense:
            _require_products(node.meta["val"].device)
        count = sum(rule.apply_everywhere(gm, self.name) for rule in RULES)
        for node in list(gm.graph.nodes):
            if node.target in (_one, _several) and (places := _places(node)):
                self._rewrite(gm, node, places)
                count += 1
        for node in dense:
            if not node.users and not is_erased(node):
                gm.graph.erase_node(node)
        return count

    def _rewrite(self, gm: GraphModule, node: Node, places: list[int]) -> None:
        """Write an operator for the layers at `places` of an adapted linear, and one for the rest of them."""
        rest = [place for place in range(len(_weights(node))) if place not in places]
        joint = self._written(gm, node, own.float8_lora_linears.default, _in_float8(node, places))
        now = {place: (joint, number) for number, place in enumerate(places)}
        if rest:
            other = self._written(gm, node, _several, (arguments(node)["x"], *_roles(node, rest)))
            now |= {place: (other, number) for number, place in enumerate(rest)}
        if node.target is _one:
            part = self._written(gm, node, operator.getitem, now[0])
            part.meta |= marks_of(node)
            node.replace_all_uses_with(part)
        for read in list(node.users):  # of several layers, each user reads one
            read.args = now[read.args[1]]  # type: ignore[index]
        gm.graph.erase_node(node)

    def _written(self, gm: GraphModule, before: Node, target: Any, args: tuple[Any, ...]) -> Node:
        maker = made_by(before) or Provenance(self.name)
        with gm.graph.inserting_before(before):
            node = gm.graph.create_node("call_function", target, args, {}, name_of(target))
        describe(node, before, Provenance(self.name, maker.site, maker.adapter), gm, fake_mode_of(gm))
        return node


def _require_products(device: torch.device) -> None:
    if device.type == "cuda" and not multiplies(device):
        raise ConfigError(
            f"{MultiplyInFloat8.name}: {device} has compute capability {'.'.join(map(str, capability(device)))}, and "
            f"products of float8 need {'.'.join(map(str, LEAST_CAPABILITY))}; leave the pass out there"
        )


def _weights(node: Node) -> list[Node]:
    """The weights of an adapted linear, or of several."""
    given = arguments(node)
    return [given["weight"]] if node.target is _one else given["weights"]


def _places(node: Node) -> list[int]:
    """Which layers of an adapted linear have their weight in float8."""
    x, weights = arguments(node)["x"], enumerate(_weights(node))
    return [place for place, weight in weights if weight.target is _dense and _fits(x, weight)]


def _fits(x: Node, dense: Node) -> bool:
    """Whether x has the dtype of a weight made dense, and autocast would not change that."""
    value = x.meta["val"]
    return (
        not within_vmap(x)
        and value.dtype == dense.meta["val"].dtype
        and autocast_dtype(value.device.type) in (None, value.dtype)
    )


def _in_float8(node: Node, places: list[int]) -> tuple[Any, ...]:
    """The arguments of `float8_lora_linears` for some layers of an adapted linear."""
    given = arguments(node)
    weights, *others = _roles(node, places)
    read = [[weight.args[at] for weight in weights] for at in (0, 1)]
    biases, *adapters = others
    return given["x"], *read, biases, given.get("z"), *adapters, given.get("dropout", 0.0)


def _roles(node: Node, places: list[int]) -> list[list[Any]]:
    """Weights, biases, As, Bs and scalings of some layers of an adapted linear."""
    given = arguments(node)
    if node.target is _one:
        return [[given[role]] for role in ("weight", "bias", "lora_A", "lora_B", "scaling")]
    return [[given[role][at] for at in places] for role in ("weights", "biases", "lora_As", "lora_Bs", "scalings")]

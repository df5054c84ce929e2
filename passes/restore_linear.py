"""restore_linear: a product with a transposed parameter is the linear operator again.

x Wᵀ               ->  linear(x, W)         as some models write it by hand: `input @ self.weight.T`
view(view(x) W + b)  ->  linear(x, Wᵀ, b)     as GPT-2's Conv1D has it, on the rows of x
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lorafx.graph import Match, Rule
from lorafx.graph.description import interface_key
from lorafx.graph.effects import drop_dead
from lorafx.pipeline import Context, Pass

aten = torch.ops.aten


def product(multiply: Callable[..., Any], transpose: Callable[..., Any]) -> Callable[..., Any]:
    """The pattern for x Wᵀ, written with these two operators."""

    def written(x, weight):
        return multiply(x, transpose(weight))

    return written


def product_of_axes(x, weight, a, b):
    return aten.matmul.default(x, aten.transpose.int(weight, a, b))


def product_and_bias(transpose: Callable[..., Any]) -> Callable[..., Any]:
    """The pattern for b + x Wᵀ as one operator."""

    def written(x, weight, bias):
        return aten.addmm.default(bias, x, transpose(weight))

    return written


def addmm_of_rows(x, weight, bias, flat, shape):
    return aten.view.default(aten.addmm.default(bias, aten.view.default(x, flat), weight), shape)


def linear(x, weight):
    return aten.linear.default(x, weight)


def linear_of_axes(x, weight, a, b):
    return aten.linear.default(x, weight)


def linear_with_bias(x, weight, bias):
    return aten.linear.default(x, weight, bias)


def turned_linear(x, weight, bias, flat, shape):
    return aten.linear.default(x, aten.t.default(weight), bias)


def _is_a_matrix_of_the_model(found: Match) -> str | None:
    weight = found.bindings["weight"]
    if not isinstance(weight, Node) or not _is_of_the_model(weight) or weight.meta["val"].ndim != 2:
        return "what is transposed is no matrix of the model"
    if {found.bindings.get("a", 0) % 2, found.bindings.get("b", 1) % 2} != {0, 1}:
        return "the axes do not trade places"
    bias = found.bindings.get("bias")
    if bias is not None and bias.meta["val"].ndim != 1:
        return "what is added is no bias"
    return None


def _is_of_the_model(node: Node) -> bool:
    """Whether a node reads an attribute of the model, or is a cast of one."""
    read = node.args[0] if node.target == aten.to.dtype else node
    return isinstance(read, Node) and read.op == "get_attr"


def _keeps_the_rows(found: Match) -> str | None:
    x, weight = found.bindings["x"].meta["val"], found.bindings["weight"].meta["val"]
    before, after = interface_key(x)[0], interface_key(found.anchor.meta["val"])[0]
    if before[:-1] != after[:-1] or (before[-1], after[-1]) != interface_key(weight)[0]:
        return "rows are put together in another way than they were taken apart"
    return _is_a_matrix_of_the_model(found)


MULTIPLIED, TRANSPOSED = (aten.matmul, aten.mm), (aten.t, aten.numpy_T, aten.mT)
RULES = (
    *(Rule(product(m.default, t.default), linear, _is_a_matrix_of_the_model) for m in MULTIPLIED for t in TRANSPOSED),
    Rule(product_of_axes, linear_of_axes, _is_a_matrix_of_the_model),
    *(Rule(product_and_bias(t.default), linear_with_bias, _is_a_matrix_of_the_model) for t in TRANSPOSED),
    Rule(addmm_of_rows, turned_linear, _keeps_the_rows),
)


@dataclass(frozen=True)
class RestoreLinear(Pass):
    """Afterwards no product with a transposed matrix of the model is left, nor one of rows that come from a view."""

    exact = True
    requires = frozenset({"canonical"})
    establishes = frozenset({"linear"})

    def rewrite(self, gm: GraphModule, context: Context) -> int:
        count = sum(rule.apply_everywhere(gm, self.name) for rule in RULES)
        if count:
            drop_dead(gm)  # the sizes that views were given
        return count

"""Values of nodes, recomputed on fake tensors: what a rewrite claims of a new node, and the verifier of a changed one.

To ask torch what an operator makes of symbolic sizes takes milliseconds, and most that is asked has been asked before:
projections of a layer are alike, and what is emitted is verified. So answers are kept while a pipeline runs. A mode of
fake tensors must not keep them: views know their base in C++, where no garbage is collected, and would keep the mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..torch_private.graphs import schema_of
from ..torch_private.tracing import FakeTensorMode, detect_fake_mode, enable_python_dispatcher, real
from .description import operand_key, traced_tensor_key

_Answers = dict[Hashable, tuple[Any, list[Any]]]  # by mode, operator and what it was given
_ANSWERS: ContextVar[_Answers | None] = ContextVar("answers", default=None)


@contextlib.contextmanager
def each_asked_once() -> Iterator[None]:
    """Within it, what an operator gives of values that torch does not tell apart is computed once."""
    before = _ANSWERS.set({})
    try:
        yield
    finally:
        _ANSWERS.reset(before)


def fake_mode_of(gm: GraphModule) -> FakeTensorMode:
    """The fake tensor mode the graph was captured in, or a new one for a graph that carries no values."""
    values = [node.meta["val"] for node in gm.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    return detect_fake_mode(values) or FakeTensorMode(allow_non_fake_inputs=True)


def resolve(gm: torch.nn.Module, path: str) -> Any:
    """The object at a dotted path below `gm`; AttributeError if there is none."""
    value: Any = gm
    for atom in path.split("."):
        value = getattr(value, atom)
    return value


def fake_value(node: Node, gm: GraphModule, mode: FakeTensorMode) -> Any:
    """The value of `node`, recomputed on fake tensors, which have shape, dtype and device but no numbers.

    Nodes of the same operator, on values that torch does not tell apart, may be given one and the same value.
    """
    if node.op == "get_attr":
        tensor = resolve(gm, str(node.target))
        return mode.from_tensor(real(tensor), static_shapes=True) if isinstance(tensor, Tensor) else tensor
    args = map_arg(node.args, lambda n: n.meta["val"])
    kwargs = map_arg(node.kwargs, lambda n: n.meta["val"])
    answers = _ANSWERS.get()
    if answers is None or not isinstance(node.target, OpOverload) or schema_of(node.target).is_mutable:
        return _computed(node.target, args, kwargs, mode)
    keep: list[Any] = []
    key = mode, node.target, operand_key((args, dict(kwargs)), traced_tensor_key, keep)
    if key in answers:
        return answers[key][0]
    value = _computed(node.target, args, kwargs, mode)
    if _is_told_by_its_arguments(value):
        answers[key] = value, keep
    return value


def _computed(target: Any, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    # Without the python dispatcher, composite operators fail on symbolic sizes.
    with mode, enable_python_dispatcher(), torch.no_grad():
        return target(*args, **kwargs)


def _is_told_by_its_arguments(value: Any) -> bool:
    """Whether a value has no number, and no size, that only the numbers in tensors say."""
    leaves = pytree.tree_leaves(value)
    kinds = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    known = (getattr(leaf, "constant", None) is not None for leaf in leaves if isinstance(leaf, Tensor))
    return not any(known) and not any(free_unbacked_symbols(leaf) for leaf in leaves if isinstance(leaf, kinds))

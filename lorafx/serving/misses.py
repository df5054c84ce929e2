"""Misses: in what a new kind of call differs from those that programs are kept for, and what keeps differing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils import _pytree as pytree

from ..capture.arguments import argument_names
from ..errors import warn
from .call_key import Call, CallKey, Leaf
from .programs import Program

OFTEN = 4  # so many programs for the sake of one thing alone are too many


class Misses:
    """Counts what made a new program necessary, where that was one thing alone."""

    def __init__(self) -> None:
        self.arguments: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()

    def why(self, program: Program, kept: Iterable[Program]) -> str:
        """Why a new program is needed, by the most similar one that is kept."""
        return _text_of(_nearest(program, kept))

    def learn(self, program: Program, kept: Iterable[Program]) -> str:
        """Count what made another graph necessary; the result is a reason against it, if there is one.

        An argument's constant that keeps changing is warned of. A model whose attributes keep changing goes by sites,
        where its own Python reads them, so that no graph is captured in each step.
        """
        arguments, attributes = _nearest(program, kept) or ([], [])
        if len(arguments) == 1 and not attributes:
            self._count_constant(program, arguments[0].partition(":")[0])
        if not arguments:
            self.attributes.update(attributes)
        often = next((name for name in attributes if self.attributes[name] > OFTEN), None)
        return f"the attribute {often} keeps changing, and a graph has it as a constant" if often else ""

    def _count_constant(self, program: Program, name: str) -> None:
        if name not in program.names or len(program.key.leaves[program.names.index(name)]) != 2:
            return
        self.arguments[name] += 1
        if self.arguments[name] == OFTEN:
            warn(
                f"the argument {name} has had {OFTEN + 1} values so far, and a graph is captured for each. Pass it as "
                "a tensor, or as one value, to capture once."
            )


Differences = tuple[list[str], list[str]]  # of arguments and modes, and of attributes


def _nearest(program: Program, kept: Iterable[Program]) -> Differences | None:
    """In what a program differs from the most similar one of its part that is kept; None if there is none."""
    same_part = [other for other in kept if other.key.part == program.key.part]
    found = [(list(_arguments(program, other)), _attributes(program, other)) for other in same_part]
    return min(found, key=lambda both: len(both[0]) + len(both[1])) if found else None


def _text_of(found: Differences | None) -> str:
    if found is None:
        return "the first call"
    arguments, attributes = found
    if not arguments and not attributes:
        return "other sizes than the kept graph serves"
    every = [*arguments, *(f"the attribute {name}" for name in attributes)]
    more = [f"and {len(every) - 3} more"] if len(every) > 3 else []
    return "; ".join([*every[:3], *more])


def leaf_names(call: Call) -> tuple[str, ...]:
    """What to call each leaf of a call: as `input_ids`, or `past_key_values.layers.0.keys`."""
    positional = argument_names(call.tree.get_submodule(call.path).forward, call.args)
    paths, _ = pytree.tree_flatten_with_path((dict(zip(positional, call.args)), dict(call.kwargs)))
    return tuple(".".join(_atom(k) for k in path[1:]) for path, _ in paths)


def _atom(key: Any) -> str:
    return str(next((getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)), key))


def _attributes(new: Program, old: Program) -> list[str]:
    """The attributes in which the model differs, if both programs depend on them."""
    now, before = new.key.attributes, old.key.attributes
    return [] if now is None or before is None or now is before else list(now.differences(before))


def _arguments(new: Program, old: Program) -> Iterator[str]:
    """In what else a call differs from an earlier one of the same part, a phrase each."""
    now, before = dict(zip(new.names, new.key.leaves)), dict(zip(old.names, old.key.leaves))
    for name in [*now, *(name for name in before if name not in now)]:
        if now.get(name) != before.get(name):
            yield f"{name}: {_leaf_text(before.get(name))} → {_leaf_text(now.get(name))}"
    if new.key.structure != old.key.structure and now == before:
        yield "the arguments' structure"
    yield from _modes(new.key, old.key)


def _modes(new: CallKey, old: CallKey) -> Iterator[str]:
    for field in ("grad", "inference", "autocast", "defaults", "adapters", "merged", "full"):
        if getattr(new, field) != getattr(old, field):
            yield f"{field}: {_text(getattr(old, field))} → {_text(getattr(new, field))}"
    if new.layout != old.layout:
        yield "the model's modes (train or eval), dtypes, devices, hooks or modules"


def _leaf_text(leaf: Leaf | None) -> str:
    if leaf is None:
        return "not given"
    if len(leaf) == 2:
        return repr(leaf[1]) if not isinstance(leaf[1], str) else leaf[1]
    _, dtype, device, requires_grad, sizes = leaf
    shape = ", ".join("n" if size == 2 else str(size) for size in sizes)  # type: ignore[attr-defined]
    gradient = ", requires grad" if requires_grad else ""
    return f"({shape}) {str(dtype).removeprefix('torch.')} on {device}{gradient}"


def _text(value: Any) -> str:
    if isinstance(value, (tuple, frozenset)):
        return ", ".join(sorted(map(_text, value))) or "none"
    return str(value).removeprefix("torch.")

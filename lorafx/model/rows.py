"""Rows: a call in which each row of the batch has its own adapter, `adapter_names=["a", "b", "__base__"]`.

Here names become numbers. A graph has all adapters that rows may choose, and the numbers are a tensor that it is given,
so that other rows are other numbers and no other graph. Where an adapter acts on some tokens of a row alone
(`activation.py`), there is a number for each token.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.by_row import ROWS, first_tensor
from ..adapters.naming import BASE
from ..errors import AdapterError
from ..pipeline import Context
from ..serving.call_key import in_one_order
from ..serving.choosing import Choice, choosing
from ..tree.lookup import module_at
from ..tree.mirror import STATE
from ..tree.wrappers import innermost
from .activation import OFFSETS, by_token, require_no_guidance, started, tokens_of, waiting, waits
from .state import State

NAMES = "adapter_names"  # PEFT's keyword of a call
_FEW = 16  # so many adapters are in every graph with rows, also more if there are as many rows


def chosen(state: State, names: Any, repeats: bool = False) -> Choice:
    """What rows choose by these names. Raises `AdapterError` for a name that is not there, or cannot be chosen so."""
    if not isinstance(names, (list, tuple)) or not all(name is None or isinstance(name, str) for name in names):
        raise AdapterError(f"{NAMES} is a list with the name of an adapter for each row of the batch, not {names!r}")
    choice = Choice(state, tuple(None if name == BASE else name for name in names), repeats)
    wanted = named(choice)
    if missing := [name for name in wanted if name not in state.adapters]:
        known = ", ".join(map(repr, (*state.adapters, BASE)))
        raise AdapterError(f"{NAMES}: there is no adapter {', '.join(map(repr, missing))}; rows can choose {known}")
    if state.ledger.names:
        raise AdapterError(
            f"{', '.join(map(repr, state.ledger.names))} merged into the weights, which all rows share; call "
            "`unmerge_adapter()` before a call in which rows, or tokens, have adapters of their own"
        )
    whole = [name for name in wanted if state.adapters[name].replaced]
    if whole and len(set(choice.names)) > 1:
        base = next(iter(state.adapters[whole[0]].replaced))
        raise AdapterError(
            f"{NAMES}: {whole[0]!r} has a {base} of its own (`modules_to_save` or `bias`), and rows of "
            "other adapters have not; give its rows a call of their own"
        )
    return choice


def named(choice: Choice) -> list[str]:
    return list(dict.fromkeys(name for name in choice.names if name is not None))


def as_chosen(choice: Choice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Context, dict[str, Any]]:
    """What acts in a call of which each row has chosen, and the arguments by name with the rows' numbers among them."""
    state: State = choice.state
    first = first_tensor((*args, *kwargs.values()))
    repeats = _repeats(choice, first)
    wanted = named(choice)
    if state.disabled or not state.adapters:
        return state.context, kwargs
    if any(state.adapters[name].replaced for name in wanted):  # then all rows have the same
        return Context((state.adapters[wanted[0]],)), kwargs
    adapters = {name: each for name, each in state.adapters.items() if not each.replaced}
    if len(adapters) > max(_FEW, len(choice.names)) or (choice.starts is not None and len(wanted) == 1):
        adapters = {name: adapters[name] for name in adapters if name in wanted}
    numbers = {name: number for number, name in enumerate(adapters, 1)}
    chosen = [numbers.get(name, 0) for name in choice.names for _ in range(repeats)]  # type: ignore[arg-type]
    assert first is not None, "it has as many rows as there are names"
    rows = torch.tensor(chosen, dtype=torch.int64, device=first.device)
    if choice.starts is not None:
        rows = by_token(rows, choice, repeats, args, kwargs)
    return Context(tuple(adapters.values()), numbers=tuple(numbers.values())), kwargs | {ROWS: rows}


def acting_in(tree: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Context, dict[str, Any]]:
    """What acts in a call of an adapted model, and the arguments by name that its graph is given."""
    choice, kwargs = choice_of(tree, "", args, kwargs)
    if choice is None:
        return vars(tree)[STATE].context, kwargs
    return as_chosen(choice, args, in_one_order(type(tree), kwargs))


def _repeats(choice: Choice, first: Tensor | None) -> int:
    """How often each row that has chosen comes in a batch. Raises `AdapterError` if names and rows do not fit."""
    names, rows = len(choice.names), 0 if first is None else first.shape[0]
    if names and rows and (rows == names or (choice.repeats and rows % names == 0)):
        return rows // names
    raise AdapterError(f"{NAMES} has {names} names, and the batch has {rows} rows: name an adapter for each")


def choice_of(
    tree: nn.Module,
    path: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outer: Choice | None = None,
    generates: bool = False,
) -> tuple[Choice | None, dict[str, Any]]:
    """What a call has rows choose, of a module of an adapted model or of its `generate`, and its other keywords.

    Rows choose by `adapter_names`, or by those of the call that this one is within (`outer`); or all have the active
    adapter, where that acts on some of their tokens. None if nothing is chosen.
    """
    state: State = vars(tree)[STATE]
    names, offsets, others = None, None, kwargs
    if NAMES in kwargs or OFFSETS in kwargs:
        meant = inspect.signature(type(innermost(module_at(tree, path))).forward).parameters
        own = {name: kwargs[name] for name in (NAMES, OFFSETS) if name in kwargs and name not in meant}
        names, offsets = own.get(NAMES), own.get(OFFSETS)
        others = {name: value for name, value in kwargs.items() if name not in own}
    if outer is not None and names is None and offsets is None and (outer.starts is not None or not waits(outer)):
        return outer, others
    active = waiting(state) if names is None and outer is None else ""
    if names is None and outer is None and not active:
        return None, others
    given = in_one_order(type(tree) if generates else type(module_at(tree, path)), others)
    first = first_tensor((*args, *given.values()))
    if active:
        names = [active] * len(tokens_of(args, given))
    elif names is None and outer is not None:
        names = [name for name in outer.names for _ in range(_repeats(outer, first))]
    choice = replace(chosen(state, names, repeats=generates), unnamed=bool(active))
    if generates and first is not None:  # before beams make several rows of each
        _repeats(replace(choice, repeats=False), first)
    if not waits(choice):
        return choice, others
    if generates:
        require_no_guidance(tree, args, others)
    return started(choice, args, given, offsets), others


def generating(generate: Callable[..., Any]) -> Callable[..., Any]:
    """A model's method `generate`, all of whose calls have for each row the adapter that it is given for it."""

    @functools.wraps(generate)
    def with_rows(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        choice, kwargs = choice_of(self, "", args, kwargs, generates=True)
        with contextlib.nullcontext() if choice is None else choosing(choice):
            return generate(self, *args, **kwargs)

    return with_rows


def loss_by_adapter(losses: Tensor, adapter_names: Sequence[str]) -> dict[str, Tensor]:
    """The mean loss of each adapter's rows, by name: what the adapter would have as its loss if it were alone.

    `losses` are (rows,), one a row, and `adapter_names` what the call was given. The sum of the result trains each
    adapter as it would be trained alone. Rows of the base alone are left out. Raises `AdapterError` if there are not as
    many names as rows.
    """
    if losses.ndim != 1 or len(losses) != len(adapter_names):
        raise AdapterError(f"{len(adapter_names)} names and losses of shape {tuple(losses.shape)}: there is one a row")
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(adapter_names):
        rows.setdefault(name, []).append(row)
    return {name: losses[own].mean() for name, own in rows.items() if name != BASE}

"""Activation: on which tokens of a call an adapter acts that waits for an invocation (`alora_invocation_tokens`).

It acts on a row from the last occurrence of the invocation on. That is looked for in the ids of each call. `generate`
looks in its prompts, and has the adapter act on all that comes after: places are counted from where its cache begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..serving.choosing import Choice
from .state import State

# PEFT's keyword of a call: of each row how many of its last tokens an adapter acts on, or None.
OFFSETS = "alora_offsets"
_NEVER = torch.iinfo(torch.int64).max  # where an adapter starts that has no invocation


def invocation(state: State, name: str | None) -> tuple[int, ...]:
    """What an adapter waits for; nothing if it acts on all tokens."""
    adapter = state.adapters[name] if name is not None else None
    return () if adapter is None else adapter.kind.invocation(adapter.config)


def waits(choice: Choice) -> bool:
    """Whether an adapter that some row has chosen waits for an invocation."""
    return any(invocation(choice.state, name) for name in set(choice.names))


def waiting(state: State) -> str:
    """The name of the active adapter if that waits for an invocation; empty if none does.

    Raises `AdapterError` if it is active along with others.
    """
    found = next((name for name in state.acting if invocation(state, name)), "")
    if found and len(state.acting) > 1:
        raise AdapterError(
            f"{found!r} acts from its invocation on, and only alone: make it the one active adapter, or name one for "
            "each row of a call (`adapter_names`)"
        )
    return found


def started(choice: Choice, args: Sequence[Any], kwargs: Mapping[str, Any], offsets: Any) -> Choice:
    """The choice with where each row's adapter starts: by the ids of a call, or as `offsets` count from its end."""
    tokens, names = tokens_of(args, kwargs), choice.names
    prompt = _prompt(tokens, kwargs) if choice.repeats else None
    before = 0 if prompt is None else prompt - tokens.shape[1]
    starts = torch.zeros(len(names), dtype=torch.int64, device=tokens.device)
    for name in dict.fromkeys(names):
        if wanted := invocation(choice.state, name):
            if offsets is None and tokens.is_floating_point():
                raise AdapterError(
                    f"{name!r} acts from its invocation on, which is looked for in `input_ids`, and there are none: "
                    f"pass `{OFFSETS}`, of each row how many of its last tokens the adapter acts on"
                )
            mine = torch.tensor([other == name for other in names], device=tokens.device)
            found = _found(tokens, wanted) if offsets is None else _told(tokens, offsets)
            starts = torch.where(mine, torch.where(found == _NEVER, found, found + before), starts)
    return replace(choice, starts=starts, prompt=prompt)


def require_no_guidance(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise `AdapterError` where `generate` is to read other tokens than its prompts, too, and what comes after."""
    own = getattr(model, "generation_config", None)
    config = next((each for each in (*args, kwargs.get("generation_config")) if hasattr(each, "guidance_scale")), own)
    if kwargs.get("guidance_scale", getattr(config, "guidance_scale", None)) not in (None, 1):
        raise AdapterError(
            "`guidance_scale` has `generate` read other tokens than the prompts, and nobody can tell on which of these "
            "an adapter acts that waits for its invocation: generate without it, or by an adapter that acts on all"
        )


def by_token(numbers: Tensor, choice: Choice, repeats: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The number of each token's adapter, (rows, tokens), of those of rows; 0 before the adapter starts.

    Each row that has chosen comes `repeats` times.
    """
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise AdapterError("`logits_to_keep` as a tensor chooses tokens of which nobody can tell whether adapters act")
    assert choice.starts is not None, "it is made by `started`"
    tokens, starts = tokens_of(args, kwargs), choice.starts.repeat_interleave(repeats)
    first = 0 if choice.prompt is None else _past(tokens, kwargs, choice.prompt)
    places = torch.arange(tokens.shape[1], device=tokens.device) + first
    return torch.where(places >= starts[:, None], numbers[:, None], 0)


def tokens_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """A call's ids (rows, tokens), or what is embedded in their place (rows, tokens, features)."""
    given = (*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds")))
    found = next((each for each in given if isinstance(each, Tensor) and each.ndim > 1), None)
    if found is None:
        raise AdapterError("an adapter that acts from its invocation on needs a call with the tokens of each row")
    return found


def _found(ids: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Where the last occurrence of some tokens begins in each row of ids, (rows,)."""
    if ids.shape[1] < len(wanted):
        return ids.new_full(ids.shape[:1], _NEVER, dtype=torch.int64)
    found = (ids.unfold(1, len(wanted), 1) == torch.tensor(wanted, device=ids.device)).all(-1)
    places = torch.where(found, torch.arange(found.shape[1], device=ids.device), -1).amax(1)
    return torch.where(places < 0, _NEVER, places)


def _told(tokens: Tensor, offsets: Any) -> Tensor:
    """Where adapters begin in each row that act on so many of its last tokens, None for none, (rows,)."""
    given, rows = offsets.tolist() if isinstance(offsets, Tensor) else offsets, tokens.shape[0]
    if not isinstance(given, (list, tuple)) or not all(each is None or isinstance(each, Integral) for each in given):
        raise AdapterError(f"`{OFFSETS}` is a list with a number, or None, for each row of the batch, not {offsets!r}")
    if len(given) != rows:
        raise AdapterError(f"`{OFFSETS}` has {len(given)} numbers, and the batch {rows} rows: give one for each")
    places = [_NEVER if each is None else tokens.shape[1] - int(each) for each in given]
    return torch.tensor(places, device=tokens.device)


def _prompt(tokens: Tensor, kwargs: Mapping[str, Any]) -> int:
    """How many tokens there are once `generate` has read its prompts.

    Beside a cache, it is given all of them or those that the cache does not have: a mask is of all in any case.
    """
    mask = kwargs.get("attention_mask")
    return mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else tokens.shape[1]


def _past(tokens: Tensor, kwargs: Mapping[str, Any], prompt: int) -> Any:
    """How many tokens come before those of a call that `generate` makes, by its cache if that can tell.

    If it cannot, as the states of recurrent models, fewer tokens than the prompts have are some that come after these.
    """
    length = getattr(kwargs.get("past_key_values"), "get_seq_length", None)
    if length is not None:
        return length()
    return prompt if tokens.shape[1] < prompt else 0

"""One family of errors, and warnings. Messages name the place, the user's source line if it is known, and what can be
done."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable
from typing import Any

from torch.fx import Node

# Packages whose code is not where somebody looks for what a warning is about.
_NOT_THE_USERS = frozenset({"lorafx", "torch", "transformers", "accelerate", "trl", "contextlib", "functools"})


class LorafxError(Exception):
    """Base class of everything lorafx raises on purpose."""


class ConfigError(LorafxError, ValueError):
    """A config or option that cannot be served: a wrong value, or a field that lorafx does not implement yet."""


class MissingNameError(LorafxError, ImportError):
    """A name that PEFT has and lorafx has not; the message says what to use instead."""


class SelectionError(ConfigError):
    """`target_modules` (or a related field) picks nothing, or something that cannot be adapted."""


class CaptureError(LorafxError, RuntimeError):
    """A call of the model could not be turned into a graph, or a graph does not fit the call that it was kept for."""


class UncoveredOperatorError(CaptureError):
    """A graph reads a selected weight through an operator that no reading covers."""


class PipelineError(LorafxError, ValueError):
    """A pipeline whose text does not parse, whose passes stand in a wrong order, or one of whose passes fails."""


class DeferredError(LorafxError, RuntimeError):
    """Deferred logits were asked for after an input of theirs was changed, or asked for a gradient of their own."""


class VerifyError(LorafxError, RuntimeError):
    """A graph broke an invariant; a pipeline's message names the pass that did it."""


class AdapterError(LorafxError, ValueError):
    """An adapter name that is unknown, taken or unusable, or an action the adapter's state forbids."""


class CheckpointError(LorafxError, ValueError):
    """A folder of an adapter or a base that cannot be read or written; the message names the file and the key."""


class RecomputeError(LorafxError, RuntimeError):
    """A checkpointed layer cannot run again in backward, because it was changed after it ran."""


class MergeError(LorafxError, RuntimeError):
    """A merge or unmerge that was refused; no weight has been changed."""


def warn(message: str) -> None:
    """Warn, at the line of the user's that led here: the innermost one outside of lorafx and what calls models."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and _package(frame.f_globals) in _NOT_THE_USERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)


def _package(names: dict[str, Any]) -> str:
    """The package that a function with these globals is of; code that lorafx or torch wrote has none."""
    return str(names.get("__name__", "torch")).partition(".")[0]


def user_line(node: Node) -> str:
    """The innermost source line of the model that `node` was captured from, or a remark that there is none."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    places = [i for i, line in enumerate(lines) if line.startswith("File ")]
    if not places:
        return "(no source line was recorded)"
    outside_torch = [i for i in places if "/torch/nn/" not in lines[i]]
    where = (outside_torch or places)[-1]
    code = lines[where + 1] if where + 1 < len(lines) and where + 1 not in places else ""
    return f"{lines[where]}: {code}".rstrip(": ")


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """The names most like one that is not there, in words: those that end in it, or that are spelt much like it."""
    names, last = list(dict.fromkeys(known)), name.rpartition(".")[2]
    lasts = {each: each.rpartition(".")[2] for each in names}
    near = [each for each in names if name and each.endswith(f".{name}")]
    near = near or difflib.get_close_matches(name, names, cutoff=0.7)
    alike = difflib.get_close_matches(last, {*lasts.values()}, n=1, cutoff=0.7)
    near = near or [each for each in names if lasts[each] in alike]
    return f"nearest: {', '.join(near[:3])}" if near else otherwise

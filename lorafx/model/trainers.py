"""What trainers ask of a model with adapters. They look for PEFT's class, so an adapted model passes for an instance.

transformers, trl and accelerate ask `isinstance(model, peft.PeftModel)` before they save, resume, load the best
checkpoint or look for a reference model. `isinstance` looks at an object's type and then at its `__class__`, which
here is the type with `PeftModel` added at the end of its method resolution order. The type itself has nothing of
PEFT's: no method is inherited. Nor is peft imported here: whoever asks has done that.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.peft_itself import refuse_peft_itself
from ..adapters.slots import differences
from ..errors import AdapterError
from ..files.model_card import CARD, say_it_is_an_adapter
from ..files.written_config import name_of
from .part import Part


class SeenAsPeft(nn.Module):
    """The part of an adapted model by which `isinstance(model, peft.PeftModel)` holds."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        peft = getattr(sys.modules.get("peft"), "PeftModel", None)
        return type(self) if peft is None else _seen_as(type(self), peft)  # type: ignore[arg-type]

    @__class__.setter
    def __class__(self, cls: type) -> None:
        object.__dict__["__class__"].__set__(self, cls)


class _Also(type):
    """The metaclass of a class with one more class, `claims`, at the end of its method resolution order.

    Inheriting from it could ask for an order that is impossible.
    """

    def mro(cls) -> list[type]:
        """The ordinary order; then the claimed base and its own bases."""
        order = super().mro()
        claimed = next((vars(each)["claims"] for each in order if "claims" in vars(each)), object)
        rest = [base for base in claimed.__mro__ if base not in order]
        return [*order[:-1], *rest, object]


@functools.cache
def _seen_as(cls: type, peft: type) -> type:
    if issubclass(cls, peft):
        return cls
    metaclass = type("Also", (_Also, type(cls)), {}) if type(cls) is not type else _Also
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "claims": peft}
    return metaclass(cls.__name__, (cls,), names)


class Trainable(Part):
    """What else trainers call on PEFT's models, and so on an adapted one."""

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Say in a folder's model card that it holds an adapter."""
        say_it_is_an_adapter(Path(output_dir) / CARD, name_of(self.tree))


class Inner:
    """A model's inner model, with `model` as one more attribute: in PEFT `base_model.model` is the whole base model.

    What the inner model lacks is the model's, as `base_model.update_and_allocate` and `base_model.set_adapter`.
    """

    def __init__(self, inner: nn.Module, model: nn.Module):
        vars(self).update(inner=inner, model=model)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.inner)

    def __getattr__(self, name: str) -> Any:
        inner, model = vars(self)["inner"], vars(self)["model"]
        return getattr(inner if hasattr(inner, name) else model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return other is self.inner or vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(self.inner)

    def __repr__(self) -> str:
        return repr(self.inner)


def with_model(base_model: property) -> property:
    """transformers' property `base_model`, changed so that `base_model.model` is the adapted model, as in PEFT."""

    def inner_of(tree: nn.Module) -> Any:
        refuse_peft_itself("the methods `get_layer_status()` and `get_model_status()` of the model")
        inner = base_model.__get__(tree)
        return inner if inner is tree else Inner(inner, tree)

    return property(inner_of)


def with_one_hook(enable: Callable[[Any], None]) -> Callable[[Any], None]:
    """transformers' `enable_input_require_grads`, which adds a hook each time, changed so that the last one goes.

    trl's DPOTrainer has it called in every step.
    """

    @functools.wraps(enable)
    def enable_input_require_grads(tree: Any) -> None:
        tree.disable_input_require_grads()
        enable(tree)

    return enable_input_require_grads


def name_self(tree: nn.Module) -> None:
    """Give a model that is its own `base_model` (T5's do) the attribute `model`, for `base_model.model`."""
    if getattr(tree, "base_model", None) is tree and not hasattr(tree, "model"):
        tree.__dict__["model"] = tree


def require_same(known: Adapter, found: Adapter) -> None:
    """Raise `AdapterError` if the adapter `known` cannot take over the values of `found`, read from a file."""
    differ = differences(known, found)
    if known.tensors != found.tensors or known.replaced != found.replaced:
        differ.append("the modules it adapts")
    if differ:
        raise AdapterError(
            f"there is an adapter {known.name!r} already, which differs from the one to load in {', '.join(differ)}; "
            "delete it or choose another name"
        )

"""AdaptedModel: a mirror of the base model's modules, with adapters beside what they adapt and graphs for calls."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from inspect import getattr_static, isfunction
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from ..adapters.storages import keep_own_layers, prepare_base
from ..capture.caches import register_caches
from ..errors import warn
from ..serving.dispatcher import Dispatcher
from ..serving.whole_process import prepare_process
from ..torch_private.compilers import not_traced, uncompiled
from ..torch_private.tensors import ENTRANCE
from ..tree.holdings import leads_to
from ..tree.mirror import MIRRORED_AS, STATE, mirrored, show_own_forward
from ..tree.originals import Originals
from ..tree.replication import Ranges, layers_of_others, replicated
from .adaptation import Adaptation, of
from .calls import WITHIN_DYNAMO, PartCall, serve
from .like_peft import INSTEAD
from .names import Offered, OwnNamesFirst
from .optimizers_of_peft import LAYERS, shown_to_peft
from .rows import generating
from .state import State
from .trainers import SeenAsPeft, name_self, with_model, with_one_hook

if TYPE_CHECKING:  # for a type checker the model has the whole interface; in truth each name that its base leaves free
    _Interface = Adaptation
else:

    class _Interface:
        pass


class AdaptedModel(OwnNamesFirst, SeenAsPeft, _Interface):
    """A base model with adapters, called exactly like the base model and an instance of its class.

    Made by `lorafx.compile` and `lorafx.load`. Parameters have the base model's names; an adapter's tensors hang below
    the module they adapt (`…q_proj.lora_A.default.weight`). The base object keeps its own structure and forward and
    shares the weights. Each kind of call is captured as a graph when it keeps coming, rewritten by the pipeline, and
    kept; a call that cannot be captured runs by sites (`capture` of `compile`).

    Methods and properties are those of `lorafx.of(model)`. A name that the base model uses itself is the base's here.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Calling the class makes a plain model of the base's class, as `sequential[:2]` does. See `compile`."""
        return getattr(cls, MIRRORED_AS)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (getattr(type(self), MIRRORED_AS),), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As ever; in a process that has only loaded the model, and made none, as one that `torch.load` gave."""
        getattr(type(self), MIRRORED_AS).__setstate__(self, state)
        _prepare(state[STATE].base)

    def __copy__(self) -> AdaptedModel:
        other = _empty(getattr(type(self), MIRRORED_AS))
        other.__setstate__(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedModel:
        other = memo[id(self)] = _empty(getattr(type(self), MIRRORED_AS))
        other.__setstate__(copy.deepcopy(self.__dict__, memo))
        return other

    def __repr__(self) -> str:
        return repr(of(self))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As ever; for PEFT's optimizers under names by which they find what they take for layers."""
        return shown_to_peft(self, super().named_parameters(*args, **kwargs))

    def __setattr__(self, name: str, value: Any) -> None:
        """As ever; but a model that is given another forward is still served with its adapters."""
        if isinstance(value, MethodType) and isinstance(value.__func__, PartCall):  # as accelerate puts one back
            value = value.__func__
        if name == "forward" and not leads_to(value, lambda held: _serves(held, self)):
            vars(self)["forward"] = value
            value = PartCall(self, "")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """As ever; what PEFT's models have and lorafx's do not is an error that says what to use."""
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name == LAYERS:
                return vars(self)[STATE].layers_of_peft
            if name in INSTEAD:
                raise AttributeError(f"a model adapted by lorafx has no `{name}`. Instead: {INSTEAD[name]}") from None
            raise


for _name in dir(Adaptation):
    if not _name.startswith("_"):
        setattr(AdaptedModel, _name, Offered(_name))


def _serves(value: Any, tree: nn.Module) -> bool:
    """Whether it is what serves the model's calls, which a forward that somebody gives the model may be around."""
    return value is type(tree).forward or (isinstance(value, PartCall) and value.tree is tree and not value.path)


def adapt(base: nn.Module, dispatcher: Dispatcher, autocast_adapter_dtype: bool, layers: Ranges) -> AdaptedModel:
    """An AdaptedModel over `base` with no adapter yet; over a mirror of it that has these layers, if it has others."""
    base, replicas = (base, None) if layers in ((), layers_of_others(base)) else replicated(base, layers)
    tree = mirrored(base)
    keep_own_layers(tree)
    _prepare(base)
    tree.__class__ = _class_for(type(tree))  # type: ignore[arg-type]
    flags = {path: parameter.requires_grad for path, parameter in base.named_parameters(remove_duplicate=False)}
    tree.__dict__[STATE] = State(base, dispatcher, autocast_adapter_dtype, flags, Originals(base), replicas)
    tree.requires_grad_(False)
    if "forward" in vars(tree):  # a library has replaced the forward of the model object itself
        tree.__dict__["forward"] = PartCall(tree, "")  # type: ignore[arg-type]
    name_self(tree)
    if not isinstance(getattr_static(type(tree), "save_pretrained"), Offered):
        warn(
            f"{type(base).__name__} has a `save_pretrained` of its own, which knows of no adapters: these are saved by "
            "`lorafx.of(model).save_pretrained(folder)`"
        )
    return tree  # type: ignore[return-value]


def _prepare(base: nn.Module) -> None:
    """What a process needs before it serves a model.

    What leaves a call finds its way back, pytrees know the model's caches, and its layers leave weights alone.
    """
    prepare_process()
    register_caches(base)
    prepare_base(base)


def _empty(base: type[nn.Module]) -> AdaptedModel:
    """An AdaptedModel without attributes, for copy and pickle to fill."""
    return object.__new__(_class_for(base))  # type: ignore[arg-type]


# What an adapted model is for Python, whatever its base says of itself.
_ALWAYS = ("__new__", "__reduce__", "__setstate__", "__copy__", "__deepcopy__", "__repr__")
_CALLS = ("__call__", ENTRANCE)  # the second is what `Module.compile` has compiled
# These libraries say how any model of theirs is saved and given adapters; of an adapted model lorafx says so.
_LIBRARIES = (
    *("transformers.modeling_utils", "transformers.integrations.", "transformers.utils.", "huggingface_hub."),
    *("diffusers.models.modeling_utils", "diffusers.loaders.", "sentence_transformers."),
)


def _call_as_it_is(model: AdaptedModel, compile_config: Any = None) -> Any:
    """What `generate` is to call with a static cache, which transformers would compile: the model, as it is.

    Its graphs are compiled already, as `compile` was told to. torch would compile lorafx's own Python with them.
    """
    return model.__call__


def _calling(base: type[nn.Module], name: str) -> Callable[..., Any]:
    """How an adapted model is called: as its base is (hooks, then `forward`), with nothing for Dynamo to look into.

    Within torch.compile it is the rewritten graph that is compiled, as that says. This belongs to the class that is
    made, for in `AdaptedModel` a base's `super().__call__` would find it again.
    """

    @not_traced(WITHIN_DYNAMO)
    def call(self: AdaptedModel, *args: Any, **kwargs: Any) -> Any:
        return getattr(base, name)(self, *args, **kwargs)

    return call


@functools.cache
def _class_for(base: type[nn.Module]) -> type[AdaptedModel]:
    """AdaptedModel behind a model's class, under the same name: libraries look models up by it.

    What the model's class defines comes before what AdaptedModel does, in Python's order and so for every name.
    """

    @not_traced(WITHIN_DYNAMO)
    @functools.wraps(uncompiled(base.forward))
    def forward(self: AdaptedModel, *args: Any, **kwargs: Any) -> Any:
        show_own_forward(self, None)
        return serve(self, "", args, kwargs)

    names = {name: vars(AdaptedModel)[name] for name in _ALWAYS}
    names |= {name: _calling(base, name) for name in _CALLS}
    names |= {"forward": forward, "__module__": base.__module__, MIRRORED_AS: base}
    libraries = [vars(cls) for cls in base.__mro__ if cls.__module__.startswith(_LIBRARIES)]
    names |= {
        name: value
        for name, value in vars(AdaptedModel).items()
        if not name.startswith("__") and any(name in library for library in libraries)
    }
    if isfunction(getattr(base, "generate", None)):
        names["generate"] = generating(base.generate)  # type: ignore[attr-defined]
    if _is_of_transformers(base):
        names["base_model"] = with_model(base.base_model)  # type: ignore[attr-defined]
        names["get_compiled_call"] = _call_as_it_is
        names["enable_input_require_grads"] = with_one_hook(base.enable_input_require_grads)  # type: ignore[attr-defined]
    return type(base.__name__, (AdaptedModel,) if base is nn.Module else (base, AdaptedModel), names)


def _is_of_transformers(base: type[nn.Module]) -> bool:
    """Whether a class is one of transformers' models, whose base takes seconds to import."""
    if "transformers.modeling_utils" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    return issubclass(base, PreTrainedModel)

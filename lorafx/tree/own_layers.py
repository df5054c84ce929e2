"""Own layers: modules of a tree that always run their own forward, because only their code can read their weight.

Quantised layers are such. In graphs one operator stands for the whole forward (`ops/own_forward.py`). It is told which
module to run by a number, a tensor beside the module's own, since that is what a graph can read.
"""

from __future__ import annotations

import functools
import inspect
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..errors import AdapterError, CaptureError
from ..torch_private.tensors import enabled_torch_function
from .hooks import RUNNING

NUMBER = "lorafx_number"  # on an own layer: the tensor that has its number
TOKEN = "lorafx_token"  # on an own layer without tensors: one that stands for its weight

_LAYERS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()  # graphs of all trees know layers by number


@dataclass(frozen=True)
class OwnForward:
    """The forward of an own layer in an adapted model: the operator, so that adapters see one.

    `parameter` is what the module calls its weight; its result has `features`, in `dtype`, or in that of the input if
    that is None. `prepare` is run with the module before its own code is; `dense` gives the weight, for kinds that
    compute with it, of the module and the parameter's name. `factor` is there where a gradient dy goes through the
    layer as dy W: it gives W in the dtype of that product, of the module and the dtype of x. `replaced` has the
    `forward` that was an attribute of the module before, if there was one, as of a PartCall.
    """

    module: nn.Module = field(repr=False)
    parameter: str
    features: int
    dtype: torch.dtype | None
    prepare: Callable[[nn.Module], None]
    dense: Callable[[nn.Module, str], Tensor]
    factor: Callable[[nn.Module, torch.dtype], Tensor] | None = None
    replaced: dict[str, Any] = field(default_factory=dict)

    lorafx = True

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        weight, bias = getattr(self.module, self.parameter, None), self.module._parameters.get("bias")
        number = self.module._buffers.get(NUMBER)  # only what a capture looks at has it there
        captured, mode = number is not None, RUNNING.mode
        # Only those who look for sites are shown the weight, which may be of a class that operators do not know.
        shown = captured or (mode is not None and id(weight) in mode.tensors.weights)
        x = self._input(args, kwargs)
        if x is None and not shown:
            return self._own(self.module)(*args, **kwargs)
        if x is None:
            error = CaptureError if captured else AdapterError
            raise error(
                f"{type(self.module).__name__}, whose weight only its own code reads, is called with more than one "
                "tensor, and no adapter can act there"
            )
        number = number_of(self.module) if number is None else number
        given = weight if shown else None
        return torch.ops.lorafx.own_forward.default(x, given, bias, number, self.features, self.dtype)

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The one tensor that the module is given, by position or by name; None if it is given anything else."""
        name = _input_name(type(self.module))  # type: ignore[arg-type]
        if len(args) + len(kwargs) != 1 or (kwargs and name not in kwargs):
            return None
        value = args[0] if args else kwargs[name]
        return value if isinstance(value, Tensor) else None

    def _own(self, module: nn.Module) -> Callable[..., Any]:
        forward = self.replaced.get("forward")
        return MethodType(type(module).forward, module) if forward is None else forward

    def run(self, x: Tensor, bias: Tensor | None) -> Any:
        """What the module itself computes, with this bias, which may be an adapter's copy."""
        self.prepare(self.module)
        module = self.module
        if bias is not module._parameters.get("bias"):  # a twin, for others may run the module meanwhile
            twin = object.__new__(type(module))
            own = getattr(module, "compute_dtype", None) or x.dtype
            cast = None if bias is None else bias.to(own)
            twin.__dict__ = {**vars(module), "_parameters": {**module._parameters, "bias": cast}}
            module = twin
        mode, RUNNING.mode = RUNNING.mode, None  # what the code does with its weight is nobody's to see
        try:
            with enabled_torch_function():
                return self._own(module)(x)
        finally:
            RUNNING.mode = mode


@functools.cache
def _input_name(cls: type[nn.Module]) -> str:
    """What a class's forward calls its first argument."""
    return next(iter(list(inspect.signature(cls.forward).parameters)[1:]), "")


def own_forward_of(module: nn.Module) -> OwnForward | None:
    """The module's forward if it is an own layer; what serves calls of a part of a model stands before it."""
    forward = vars(module).get("forward")
    while forward is not None and not isinstance(forward, OwnForward):
        forward = getattr(forward, "replaced", {}).get("forward")
    return forward if isinstance(forward, OwnForward) else None


def run_by_itself(
    module: nn.Module,
    parameter: str,
    features: int,
    dtype: torch.dtype | None,
    prepare: Callable[[nn.Module], None],
    dense: Callable[[nn.Module, str], Tensor],
    factor: Callable[[nn.Module, torch.dtype], Tensor] | None = None,
) -> None:
    """Make a module of a tree an own layer (see `OwnForward`)."""
    if own_forward_of(module) is None:
        replaced = {name: value for name, value in vars(module).items() if name == "forward"}
        module.__dict__["forward"] = OwnForward(module, parameter, features, dtype, prepare, dense, factor, replaced)


def number_of(module: nn.Module) -> Tensor:
    """The tensor that has an own layer's number: a copy of a model has numbers of its own."""
    number = vars(module).get(NUMBER)
    if number is None or _LAYERS.get(int(number)) is not module:
        # of no other process either, which may load an exported model
        number = torch.tensor(secrets.randbits(62), device="cpu")
        _LAYERS[int(number)] = module
        module.__dict__[NUMBER] = number
    return number


def token_of(module: nn.Module) -> Tensor:
    """The tensor that stands for the weight of an own layer without tensors."""
    return module.__dict__.setdefault(TOKEN, torch.empty(0))


def layer_of(number: Tensor) -> nn.Module:
    """The own layer of a number. Raises `AdapterError` if there is none here, or no longer."""
    module = _LAYERS.get(int(number))
    if module is None:
        raise AdapterError(
            "a quantised layer that this graph runs is not there: its model is deleted, or in another process; "
            "what is exported of a quantised model runs next to that model alone"
        )
    return module


def show_own_layers(bare: nn.Module, tree: nn.Module) -> None:
    """Have a mirror of `tree`, which is to be captured, run the operator in the place of own layers.

    It gets tensors without values for theirs, which a tracer could not look at.
    """
    named = tree.named_modules(remove_duplicate=False)
    own = [(path, module, forward) for path, module in named if (forward := own_forward_of(module)) is not None]
    twins = dict(bare.named_modules(remove_duplicate=False)) if own else {}
    for path, module, forward in own:
        if path not in twins:
            continue
        twin = twins[path]
        if forward.parameter == TOKEN:
            twin._buffers[TOKEN] = token_of(module)
        twin.__dict__ = {name: value for name, value in vars(twin).items() if name not in (NUMBER, TOKEN)}
        for tensors in (twin._parameters, twin._buffers):
            tensors.update({name: _stand_in(t) for name, t in tensors.items() if t is not None and name != "bias"})
        twin._buffers[NUMBER] = number_of(module)
        twin.__dict__["forward"] = replace(forward, module=twin)


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same size, for the model may ask for that, of one number."""
    empty = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty

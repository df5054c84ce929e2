"""Own layers: modules of a tree that always run their own forward, because only their code can read their weight.

Quantised layers are such. In graphs one operator stands for the whole forward (`ops/own_forward.py`). It is told which
module to run by a number, a tensor beside the module's own, since that is what a graph can read.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..torch_private.tensors import enabled_torch_function

NUMBER = "lorafx_number"  # on an own layer: the tensor that has its number
TOKEN = "lorafx_token"  # on an own layer without tensors: one that stands for its weight

_LAYERS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()  # graphs of all trees know layers by number
_NUMBERS = itertools.count(1)
_SWAPPING = threading.RLock()


@dataclass(frozen=True)
class OwnForward:
    """The forward of an own layer in an adapted model: the operator, so that adapters see one.

    `parameter` is what the module calls its weight; its result has `features`, in `dtype`, or in that of the input if
    that is None. `prepare` is run with the module before its own code is. `replaced` has the `forward` that was an
    attribute of the module before, if there was one, as of a PartCall.
    """

    module: nn.Module = field(repr=False)
    parameter: str
    features: int
    dtype: torch.dtype | None
    prepare: Callable[[nn.Module], None]
    replaced: dict[str, Any] = field(default_factory=dict)

    lorafx = True

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = getattr(self.module, self.parameter, None), self.module._parameters.get("bias")
        number = self.module._buffers.get(NUMBER)  # only what a capture looks at has it there
        number = number_of(self.module) if number is None else number
        return torch.ops.lorafx.own_forward.default(x, weight, bias, number, self.features, self.dtype)

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the module itself computes, with this bias."""
        self.prepare(self.module)
        forward = self.replaced.get("forward")
        with enabled_torch_function(), _with_bias(self.module, bias):
            return type(self.module).forward(self.module, x) if forward is None else forward(x)


def own_forward_of(module: nn.Module) -> OwnForward | None:
    """The module's forward if it is an own layer; what serves calls of a part of a model stands before it."""
    forward = vars(module).get("forward")
    while forward is not None and not isinstance(forward, OwnForward):
        forward = getattr(forward, "replaced", {}).get("forward")
    return forward if isinstance(forward, OwnForward) else None


def run_by_itself(
    module: nn.Module, parameter: str, features: int, dtype: torch.dtype | None, prepare: Callable[[nn.Module], None]
) -> None:
    """Make a module of a tree an own layer (see `OwnForward`)."""
    if own_forward_of(module) is None:
        replaced = {name: value for name, value in vars(module).items() if name == "forward"}
        module.__dict__["forward"] = OwnForward(module, parameter, features, dtype, prepare, replaced)


def number_of(module: nn.Module) -> Tensor:
    """The tensor that has an own layer's number: a copy of a model has numbers of its own."""
    number = vars(module).get(NUMBER)
    if number is None or _LAYERS.get(int(number)) is not module:
        number = torch.tensor(next(_NUMBERS))
        _LAYERS[int(number)] = module
        module.__dict__[NUMBER] = number
    return number


def token_of(module: nn.Module) -> Tensor:
    """The tensor that stands for the weight of an own layer without tensors."""
    return module.__dict__.setdefault(TOKEN, torch.empty(0))


def layer_of(number: Tensor) -> nn.Module:
    """The own layer of a number."""
    return _LAYERS[int(number)]


def show_own_layers(bare: nn.Module, tree: nn.Module) -> None:
    """Have a mirror of `tree`, which is to be captured, run the operator in the place of own layers.

    It gets tensors without values for theirs, which a tracer could not look at.
    """
    twins = dict(bare.named_modules(remove_duplicate=False))
    for path, module in tree.named_modules(remove_duplicate=False):
        forward = own_forward_of(module)
        if forward is None or path not in twins:
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
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


@contextlib.contextmanager
def _with_bias(module: nn.Module, bias: Tensor | None) -> Iterator[None]:
    """Have a module use another bias than its own, as an adapter's copy."""
    own: Any = module._parameters.get("bias")
    if bias is own:
        yield
        return
    with _SWAPPING:
        module._parameters["bias"] = bias  # type: ignore[assignment]
        try:
            yield
        finally:
            module._parameters["bias"] = own

"""Parameters that a config names itself: weights that stack those of experts, and matrices that no layer class owns.

PEFT's `target_parameters`. A weight of three dimensions has an A and a B for each expert, one of two dimensions is read
as a linear layer reads its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ..errors import SelectionError
from .config import AdapterConfig, is_named, is_saved
from .readings import EXPERTS, LINEAR, TRANSPOSED_EXPERTS, Reading
from .storages import DENSE, weights_of

_UNQUANTISED = (
    "load the model dequantised (`dequantize=True` of its quantisation config), or adapt other layers, beside which "
    "it stays as it is"
)


class Named(NamedTuple):
    """A parameter that a config names: the path of its module, its name there, and how it is read."""

    module: str
    parameter: str
    reading: Reading


def named_parameters(model: nn.Module, config: AdapterConfig) -> list[Named]:
    """The parameters that `config.parameters` names, in the order of the module tree.

    Raises `SelectionError` for one that cannot be adapted so, and for a name that the model does not have.
    """
    found = [
        Named(path, name, _reading(f"{path}.{name}".lstrip("."), name, module, parameter))
        for path, module in model.named_modules(remove_duplicate=False)
        for name, parameter in module._parameters.items()
        if parameter is not None and is_named(config.parameters, f"{path}.{name}".lstrip("."))
    ]
    names = [f"{each.module}.{each.parameter}".lstrip(".") for each in found]
    if missing := [each for each in config.parameters if not any(is_named((each,), name) for name in names)]:
        _require_not_packed(model, missing)
        near = ", ".join(dict.fromkeys(_ending(path, name) for path, _, name in _stacked(model)))
        raise SelectionError(
            f"`target_parameters` names {', '.join(missing)}, which the model does not have"
            + (f"; parameters that stack those of experts: {near}" if near else "")
        )
    return found


def _reading(path: str, name: str, module: nn.Module, parameter: nn.Parameter) -> Reading:
    layer = next(((reading, storage) for known, reading, storage in weights_of(module) if known == name), None)
    if layer is not None and layer != (LINEAR, DENSE):
        raise SelectionError(
            f"`target_parameters` names {path}, the weight of a {type(module).__name__}: put the module into "
            "`target_modules` instead, which also knows how such a layer reads it"
        )
    if path == name:
        raise SelectionError(
            f"`target_parameters` names {path}, which is the model's own and no layer's: as in PEFT, no adapter can be "
            "beside that; put the model into a module of yours, which gives it a name"
        )
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        raise SelectionError(
            f"`target_parameters` names {path}, which {type(module).__name__} keeps as {parameter.dtype}: "
            f"{_UNQUANTISED}"
        )
    if parameter.ndim == 2:
        return LINEAR
    if parameter.ndim == 3:
        return TRANSPOSED_EXPERTS if getattr(module, "is_transposed", False) else EXPERTS
    raise SelectionError(
        f"`target_parameters` names {path} of {parameter.ndim} dimensions; it is for matrices, and for stacks of them; "
        "train it as a whole by `modules_to_save`"
    )


def _require_not_packed(model: nn.Module, missing: list[str]) -> None:
    """Raise `SelectionError` for a name of what is no parameter but a library's own object, as experts in MXFP4 are."""
    for name in missing:
        last = name.rpartition(".")[2]
        for path, module in model.named_modules():
            if last in vars(module) and is_named((name,), f"{path}.{last}".lstrip(".")):
                raise SelectionError(
                    f"`target_parameters` names {path}.{last}, which {type(module).__name__} keeps as "
                    f"{type(vars(module)[last]).__name__}, for its own code alone: {_UNQUANTISED}"
                )


def experts_left(model: nn.Module, config: AdapterConfig) -> str:
    """What asks for the stacked weights of experts that a config could name, and does not; empty if there are none.

    Weights that it excludes or trains as a whole are none that it could name.
    """
    if config.parameters or not config.takes_parameters:
        return ""
    names = dict.fromkeys(
        _ending(path, name)
        for path, module, name in _stacked(model)
        if "experts" in type(module).__name__.lower()
        and not any(is_named(config.exclude_modules, each) for each in (path, f"{path}.{name}"))
        and not is_saved(config.modules_to_save or (), path)
    )
    return f"`target_parameters={[*names]}`" if names else ""


def _stacked(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The parameters with three dimensions, but for those of layers: each module's path, the module, the name there."""
    for path, module in model.named_modules():
        known = {name for name, *_ in weights_of(module)}
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 3 and name not in known:
                yield path, module, name


def _ending(path: str, name: str) -> str:
    """A parameter's name with that of its module."""
    return f"{path.rpartition('.')[2]}.{name}".lstrip(".")

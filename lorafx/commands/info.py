"""`lorafx info`: what an adapter's files say, without a model."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..adapters.config import AdapterConfig, defaults_of
from ..files import checkpoint
from ..tables import table
from .refusals import refusing

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Tensors:
    """Tensors whose keys differ in the numbers of layers alone, written `*`, and their norms, layer by layer."""

    key: str
    shapes: tuple[tuple[int, ...], ...]
    norms: tuple[float, ...]

    @property
    def sparks(self) -> str:
        """A character for each norm, as high as that is in proportion to the largest."""
        top = max(self.norms) or 1.0
        return "".join(_BARS[round(norm / top * (len(_BARS) - 1))] for norm in self.norms)


@refusing
def info(
    adapter: Annotated[str, typer.Argument(help="folder or Hub id of an adapter in PEFT's format")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, with the norm of each tensor")] = False,
    plot: Annotated[Path | None, typer.Option(help="also draw the norms into this PNG file")] = None,
) -> int:
    """Tell of an adapter: its base, its config, its size, and the norms of its tensors layer by layer.

    Example: lorafx info adapter/
    """
    found = checkpoint.read(adapter, weights_only=True)
    groups = list(_groups(found))
    if plot is not None:
        _draw(groups, plot)
    facts = {
        "base": found.config.base_model_name_or_path,
        "kind": found.config.peft_type,
        "options": _options(found.config),
        "parameters": sum(tensor.numel() for tensor in found.tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in found.tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values()}),
    }
    if as_json:
        print(json.dumps(facts | {"tensors": [dataclasses.asdict(group) for group in groups]}, indent=2))
        return 0
    print(table(adapter, ("what", "value"), [(name, _words(value)) for name, value in facts.items()]))
    columns = ("tensor", "layers", "shape", "norm: least", "median", "most", "layer by layer")
    print(table("tensors", columns, map(_row, groups)))
    print(f"load it with lorafx.load(model, {adapter!r})")
    return 0


def _groups(found: checkpoint.Checkpoint) -> Iterable[Tensors]:
    named: dict[str, list[str]] = {}
    for key in sorted(found.tensors, key=_numbers_apart):
        named.setdefault(_starred(key.removeprefix(checkpoint.PREFIX)), []).append(key)
    for name, keys in named.items():
        tensors = [found.tensors[key] for key in keys]
        shapes = tuple(dict.fromkeys(tuple(tensor.shape) for tensor in tensors))
        yield Tensors(name, shapes, tuple(torch.linalg.vector_norm(tensor.float()).item() for tensor in tensors))


def _starred(path: str) -> str:
    """A path with `*` for the numbers of layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def _numbers_apart(key: str) -> list[tuple[int, int, str]]:
    """Sorts keys so that layer 10 comes after layer 9."""
    return [(0, int(atom), "") if atom.isdigit() else (1, 0, atom) for atom in key.split(".")]


def _options(config: AdapterConfig) -> dict[str, Any]:
    """What the config says that its kind's defaults do not; of paths that differ in layers alone, one."""
    usual = defaults_of(type(config))
    given = {name: value for name, value in config.options.items() if value != usual[name]}
    given = {name: value for name, value in given.items() if value not in (None, [], ())}  # as PEFT has what is unset
    return {name: _shortened(value) for name, value in given.items()}


def _shortened(value: Any) -> Any:
    names = isinstance(value, tuple) and all(isinstance(each, str) for each in value)
    return [*dict.fromkeys(map(_starred, value))] if names else value


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={each!r}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _row(group: Tensors) -> tuple[Any, ...]:
    least, median, most = min(group.norms), statistics.median(group.norms), max(group.norms)
    shapes = " ".join(str(shape) for shape in group.shapes)
    return group.key, len(group.norms), shapes, *(f"{norm:.4g}" for norm in (least, median, most)), group.sparks


def _draw(groups: Iterable[Tensors], path: Path) -> None:
    from matplotlib import pyplot  # an extra: only a plot needs it

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for group in groups:
        axes.plot(range(len(group.norms)), group.norms, marker="o", markersize=3, label=group.key)
    axes.set(xlabel="layer", ylabel="Frobenius norm")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

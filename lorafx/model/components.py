"""Principal components of what the layers of a model are given, found batch by batch."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import AdapterError
from .preprocessing import given, rows_of

# From what a layer is given, what is said of the batch, and the layer's name, to rows (n, in) to look at.
Chosen = Callable[[Any, Any, str], Tensor]
_ROUNDING = 1e-5  # of its mean, by which rows may differ that would be one, without rounding


def rows_of_tokens(layer_input: Tensor, mask: Tensor | None, layer_name: str) -> Tensor:
    """(batch, length, in), or any (…, in) without a mask -> (n, in): the rows that count."""
    if mask is None:
        return rows_of(layer_input)
    if mask.shape != layer_input.shape[:-1]:
        raise AdapterError(
            f"{layer_name} is given a tensor {tuple(layer_input.shape)}, and which tokens count is told by one "
            f"{tuple(mask.shape)}: give a `prepare_layer_inputs_fn` that chooses its rows"
        )
    return layer_input[mask]


def all_rows(layer_input: Tensor, given: Any, layer_name: str) -> Tensor:
    """(…, in) -> (n, in)"""
    return rows_of(layer_input)


@dataclass
class Components:
    """The principal components of rows that come in batches (Ross et al., 2008): directions (k, in), values (k,)."""

    most: int
    count: int = 0
    spread: Any = 0.0  # the sum of squared distances of all rows to their mean
    mean: Any = 0.0
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    directions: Tensor = field(default_factory=lambda: torch.empty(0))
    steady: Tensor = field(default_factory=lambda: torch.empty(0))  # how little each direction has turned, a cosine

    def update(self, rows: Tensor) -> None:
        """Take rows (n, in) in, of which there have to be as many as components."""
        if len(rows) < self.most:
            return
        n, mean, before = len(rows), rows.mean(0), self.directions
        centred = rows - mean
        apart = math.sqrt(self.count * n / (self.count + n)) * (self.mean - mean)
        known = [self.values[:, None] * before, apart[None]] if self.count else []
        stack = torch.cat([centred, *known])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            _, values, directions = torch.svd_lowrank(stack, min(2 * self.most, *stack.shape), niter=4)
        self.values, self.directions = values[: self.most], directions.t()[: self.most]
        first = self.directions.new_zeros(self.most)
        self.steady = F.cosine_similarity(self.directions, before).abs() if self.count else first
        self.spread = self.spread + centred.square().sum() + apart.square().sum()
        self.mean = (self.count * self.mean + n * mean) / (self.count + n)
        self.count += n

    @property
    def explained(self) -> Tensor:
        """Which share of the rows' variance each component explains, (k,); none where rows differ by rounding alone."""
        rounding = self.count * (_ROUNDING * self.mean).square().sum()
        return self.values.square() / self.spread if self.spread > rounding else torch.zeros_like(self.values)


class Looks(contextlib.ExitStack):
    """Within the `with` block, what modules are given is looked at. Those that are given one tensor share the look."""

    def __init__(self, base: nn.Module, most: Mapping[str, int], rows: Chosen | Mapping[str, Chosen] | None):
        super().__init__()
        self.base, self.rows, self.given = base, rows, None
        self.leaders: dict[str, str] = {}
        self.found = {name: Components(most[name]) for name in most}
        self._last: tuple[Any, str] = None, ""

    def __enter__(self) -> Looks:
        for name in self.found:
            look = functools.partial(self._look, name)
            hook = self.base.get_submodule(name).register_forward_pre_hook(look, with_kwargs=True)
            self.callback(hook.remove)
        return self

    def _look(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, (last, leader) = given(args, kwargs), self._last
        shares = x is last and self.rows is rows_of_tokens  # any other function may choose by the layer's name
        leader = self.leaders.setdefault(name, leader if shares else name)
        self._last = x, leader
        if leader == name:
            chosen = self.rows.get(name) if isinstance(self.rows, Mapping) else self.rows
            rows = (chosen or all_rows)(x.detach(), self.given, name).float()
            if not rows.isfinite().all():
                raise AdapterError(f"{name}: the data gives numbers that are not finite there")
            self.found[name].update(rows)

    def components(self, ranks: Mapping[str, int], start: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """A (rank, in) by name, with as many rows in all as `ranks`; None while components that are needed turn."""
        found = {name: self.found[self.leaders[name]] for name in self.leaders}
        if len(found) < len(self.found) or not all(each.count for each in found.values()):
            return None
        given = Counter(_best(found, ranks, start["rho"]))
        if not given or any((found[name].steady[: given[name]] < start["tau"]).any() for name in found):
            return None
        return {name: _rows(each, given[name], start["whiten"]) for name, each in found.items()}

    def lacking(self) -> str:
        """Why there are no components yet."""
        few = [name for name in self.found if not self.found[self.leaders.get(name, name)].count]
        if few:
            return (
                f"there was none that gave {', '.join(few[:5])} at least {self.found[few[0]].most} rows that count: "
                "give larger ones that reach all layers, or exclude these"
            )
        return "the components still turn, or what layers are given never varies: lower `tau`, or give larger batches"


def _best(found: Mapping[str, Components], ranks: Mapping[str, int], rho: float) -> list[str]:
    """Names of layers, one for each component that explains most of its layer's inputs, as many as there are ranks."""
    pairs = [(float(share), name) for name in found for share in found[name].explained[: round(rho * ranks[name])]]
    best = sorted((pair for pair in pairs if pair[0] > 0), key=lambda pair: -pair[0])
    return [name for _, name in best[: sum(ranks.values())]]


def _rows(found: Components, r: int, whiten: bool) -> Tensor:
    rows = found.directions[:r]
    return rows / found.values[:r, None].sqrt() if whiten else rows.clone()

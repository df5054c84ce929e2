"""What a kind is: an adapter family's equation, its tensors, their start values, and the merged weight.

An equation wraps the base operator, which stays where it is:

    y = after(operator(before(x)), x)

`before` and `after` are plain functions over `torch.ops.aten`. They are traced, and their operators are written into
the graph. What else they need is in their last argument, `Operands`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError
from ...ops import linear as _operator  # noqa: F401, defines it
from ...ops.modes import autocast_dtype
from ..combining import Combination
from ..config import AdapterConfig, defaults_of
from ..low_rank import LowRank
from ..readings import CONV1D, LINEAR, Operator
from ..readings.reading import names_of
from ..site import Selection, Site
from .adalora_allocator import Allocator

aten = torch.ops.aten
SCALING = "scaling"  # the number that multiplies an update; a tensor once it was changed, see `adapter.scaled`


class Spec(NamedTuple):
    """A tensor of an adapter at a site: what PEFT's files call it, after the module's path, and its shape.

    One that is `fixed` is a buffer, which nothing trains. One that is not `saved` has no place in files: `init` makes
    it again, from the config, without the weight. It holds floats, unless it has a `dtype` of its own, as row numbers
    do.
    """

    suffix: str
    shape: tuple[int, ...]
    of_bias: bool = False  # it acts like the module's bias, so it is not for another module that shares the weight
    as_kept: bool = False  # an equation is given it in its own dtype, and not cast to that of the activations
    fixed: bool = False
    saved: bool = True
    dtype: torch.dtype | None = None


@dataclass(eq=False)
class Operands:
    """What a kind's functions are given besides x and y, at one site.

    The adapter's tensors and numbers are attributes, by the names that the kind gives them (`at.lora_A`, `at.scaling`).
    In an equation, `operator` is the one that reads the weight, `bound` its other arguments by name, `training` whether
    the site's module is in training mode, and `weight` the dense weight, for a kind that `reads_weight`. For `merged`
    there is no operator, and the tensors have the dtype of what it is given: float32 or float64.
    """

    site: Site
    config: Any
    tensors: Mapping[str, Any]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    operator: Operator | None = None
    bound: Mapping[str, Any] = field(default_factory=dict)
    training: bool = False
    weight: Any = None

    def __getattr__(self, name: str) -> Any:
        for known in (self.tensors, self.numbers):
            if name in known:
                return known[name]
        raise AttributeError(f"there is no {name!r} at {self.site.name}: {[*self.tensors, *self.numbers]}")

    @property
    def is_turned(self) -> bool:
        """Whether the operator reads the weight transposed, with A and B in each other's place."""
        return self.operator is not None and self.operator.transposed != self.site.reading.transposed

    def narrow(self, x: Any, a: Any) -> Any:
        """The operator with A in place of its weight: (…, in) -> (…, r), or (batch, in, …) -> (batch, r, …)."""
        assert self.operator is not None
        return self.operator.narrow(x, a, **self.operator.given(self.operator.narrow, dict(self.bound)))

    def wide(self, h: Any, b: Any, bias: Any = None) -> Any:
        """From the r features of `narrow` to a result of the base operator's shape, by B; plus `bias`, (out,)."""
        assert self.operator is not None
        given = self.operator.given(self.operator.wide, {**self.bound, "update_bias": bias})
        return self.operator.wide(h, b, **given)

    def full(self, x: Any, weight: Any) -> Any:
        """The operator with another weight, and without a bias: of the shape of W, or (out, in) for any matrix."""
        assert self.operator is not None
        function = self.operator.full or self.operator.narrow
        return function(x, weight, **self.operator.given(function, dict(self.bound)))

    def operate(self, x: Any) -> Any:
        """What the operator gives of another x: of its shape. For a kind that `reads_weight`."""
        assert self.operator is not None
        given = dict(self.bound) if self.site.storage.whole else {**self.bound, "weight": self.weight}
        return self.operator.pattern(**{name: given[name] for name in names_of(self.operator.pattern)} | {"x": x})

    def inputs(self, v: Any) -> Any:
        """A tensor of one number for each input, (in,), so that x can be multiplied by it."""
        assert self.operator is not None
        return self.operator.inputs(v)

    def outputs(self, v: Any) -> Any:
        """A tensor of one number for each output, (out,), so that the operator's result can be multiplied by it."""
        assert self.operator is not None
        return self.operator.outputs(v, **self.operator.given(self.operator.outputs, dict(self.bound), 1))

    def own_bias(self) -> Any:
        """The operator's bias, in the shape in which it can be taken from the result; None without one."""
        assert self.operator is not None
        bias, gives_part = self.bound.get("bias"), len(names_of(self.operator.outputs)) > 1
        return bias if bias is None or gives_part else self.operator.outputs(bias)  # that of a part is given

    def matrix(self, weight: Any) -> Any:
        """The dense weight as (out, in · kernel), whatever way it is stored."""
        return aten.t.default(weight) if self.site.reading.transposed else aten.flatten.using_ints(weight, 1)

    def like_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`: (out, in · kernel) in the shape of the dense weight."""
        return matrix.t() if self.site.reading.transposed else matrix.reshape(self.site.weight_shape)

    def dropout(self, x: Any, p: float) -> Any:
        """x with a share p of it zeroed and the rest divided by 1 - p, in training; not where x holds row numbers."""
        assert self.operator is not None
        return x if self.operator.lookup else aten.dropout.default(x, p, self.training)

    def product(self, a: Tensor, b: Tensor) -> LowRank | Tensor:
        """B A as a change of the dense weight, in the weight's shape: most readings multiply when rows are asked for.

        It can be multiplied by a number; `dense()` of a `LowRank` is the tensor itself.
        """
        return self.site.reading.product(a, b, self.site.weight_shape)


class Kind:
    """An adapter family. A subclass is one file; `lorafx.adapters.kinds.register` makes it known.

    `config` is its config class, which also says its PEFT type. `additive` says that the kind adds a ΔW to the weight
    that does not depend on the weight: then `delta` is all that merging needs, and such adapters can be merged in any
    order. `reads_weight` says that its equation needs the dense weight, `starts_from_weight` that its start values do.
    `derives` says that backward gives the equation's derivative, and holds nothing in it fixed that moves.
    `adds_penalty` says that a call's loss has the penalty in it, which else somebody adds (`get_penalty`).
    `only_beside_its_own` says that the adapters beside one have to take the same from the same base weights.
    `saves_embeddings` says that PEFT writes an adapted embedding's base weight to files, too. A kind with a name for
    `whole` has no equation: it trains copies of whole modules, which files have under that name. `about_values` are
    fields of a config that only say something of the values, as which of them are zeros.
    """

    config: ClassVar[type[AdapterConfig]]
    additive: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False
    starts_from_weight: ClassVar[bool] = False
    derives: ClassVar[bool] = True
    adds_penalty: ClassVar[bool] = True
    only_beside_its_own: ClassVar[bool] = False
    saves_embeddings: ClassVar[bool] = True
    whole: ClassVar[str] = ""
    about_values: ClassVar[tuple[str, ...]] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is unpickled, is the kind that is registered: kinds are told apart by identity."""
        from . import kind_called  # which imports this

        return kind_called, (defaults_of(self.config)["peft_type"], type(self).__qualname__)

    # --- what there is -----------------------------------------------------------------------------------------------

    def serves(self, config: Any) -> bool:
        """Whether this is the kind of a config of its class: kinds may share one, and a field says which is meant."""
        return True

    def settled(self, config: Any, model_type: str | None) -> Any:
        """The config with what it leaves to the model's architecture; `ConfigError` where nothing is known of that."""
        return config

    def check(self, site: Site, config: Any) -> None:
        """Raise `ConfigError` if the config cannot be served at this site."""

    def remarks(self, selection: Selection, config: Any) -> Iterator[str]:
        """What to warn of when an adapter is made at these sites: what its config asks for in vain, say."""
        return iter(())

    def tensors(self, site: Site, config: Any) -> dict[str, Spec]:
        """The suffix and shape of each tensor at a site, by the name that the equation gives it."""
        raise NotImplementedError

    def shared(self, selection: Selection, config: Any) -> dict[str, Spec]:
        """Tensors that all sites share: fixed ones, large enough for each. An equation has them like a site's own."""
        return {}

    def draw(self, config: Any, tensors: Mapping[str, Tensor]) -> None:
        """Fill the tensors that all sites share, in place, with values that follow from the config.

        They are float32, on the CPU.
        """
        raise NotImplementedError

    def numbers(self, site: Site, config: Any) -> dict[str, float]:
        """The numbers of its equation; one called "scaling" can be changed while the adapter runs."""
        return {}

    def needs_weight(self, site: Site) -> bool:
        """Whether its equation at a site needs the dense weight: a kind may need it at some sites only."""
        return self.reads_weight

    def takes_from_base(self, site: Site, config: Any) -> bool:
        """Whether the start values at a site are taken out of the base weight, which is left with the rest."""
        return False

    def init(
        self, site: Site, config: Any, tensors: Mapping[str, Tensor], rng: torch.Generator | None, weight: Tensor | None
    ) -> Tensor | None:
        """Fill the tensors of a site with their start values, in place.

        They are float32 or wider, on the CPU or on the meta device; `weight`, the dense base weight for a kind that
        `reads_weight`, `starts_from_weight` or `takes_from_base`, has their dtype and device. Without `rng`, numbers
        come from torch's global generator. Returns the dense weight that the base has from then on, or None if that
        stays what it is. A site that takes from the base has tensors where its weight is.
        """
        raise NotImplementedError

    def approach(self, site: Site, config: Any, tensors: Mapping[str, Tensor], delta: Tensor) -> None:
        """Fill the tensors of a site so that they come as near to a change of the dense weight as they can."""
        raise ConfigError(f"adapters of kind {self.config.__name__} cannot be fitted to a change of the weight")

    def since(
        self, config: Any, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor]]:
        """The adapter that does to the base as it was what this one does to what is left of it.

        `tensors` are the adapter's, `start` those it began with, by the keys of a file. Returns the config and tensors.
        """
        raise ConfigError(f"adapters of kind {self.config.__name__} have no start values to be converted from")

    def filed(self, config: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """The config and tensors that a file has of an adapter, where it leaves something out; tensors are by key."""
        return config, dict(tensors)

    def unfiled(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors of what a file has, by key; what does not fit stays as it is."""
        return dict(tensors)

    def invocation(self, config: Any) -> tuple[int, ...]:
        """The tokens from whose last occurrence in a row on the adapter acts there; none if it acts on all."""
        return ()

    def repeats(self, site: Site, config: Any) -> bool:
        """Whether PEFT's files have a site's tensors once more for each other module that has its weight."""
        return False

    # --- in training -------------------------------------------------------------------------------------------------

    def penalty(self, config: Any, sites: Iterable[Mapping[str, Tensor]]) -> Tensor | None:
        """What is added to the loss that a call of the model gives while the adapter trains: one number, or None.

        Without `adds_penalty` it is for who trains to add. `sites` are the tensors at each site, by name.
        """
        return None

    def bounded(self, config: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What tensors at a site are set to before a call and before merging, by name: those that are out of bounds."""
        return {}

    def allocator(self, config: Any) -> Allocator | None:
        """What decides, step by step, which of the adapter's numbers are left; None for a kind that keeps all."""
        return None

    # --- adapters made of others -------------------------------------------------------------------------------------

    def combined_config(self, configs: Sequence[Any], selections: Sequence[Selection], how: Combination) -> Any:
        """The config, but for its targets, of one adapter made of several, which have these configs and sites.

        Raises `ConfigError` for a kind, or for options, with which adapters cannot be combined.
        """
        raise ConfigError(f"adapters of type {defaults_of(self.config)['peft_type']} cannot be combined into one")

    def combined(
        self,
        site: Site,
        config: Any,
        parts: Sequence[tuple[float, Operands]],
        how: Combination,
        rng: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """Its tensors at a site, by name, out of those of the adapters that are there, with their weights.

        `config` is that of `combined_config`; the tensors are float32 or wider.
        """
        raise NotImplementedError

    def sized(self, config: Any) -> tuple[str, ...]:
        """The fields of a config that are about ranks and scaling alone, if tensors may be larger than a rank needs and
        zero beyond it: adapters that differ in these fields share an equation, once the scaling is a tensor.
        """
        return ()

    @property
    def idles(self) -> bool:
        """Whether an adapter whose tensors at a site are zeros does nothing there."""
        return self.additive

    def blocks(self, site: Site) -> int:
        """In how many parts of equal size its tensors' directions lie apart, each with its own zeros at the end."""
        return 1

    def of_rank(self, config: Any, r: int) -> Any:
        """The config of an adapter of rank `r`, whose tensors can hold those of any smaller one, the rest zeros; of a
        kind that is `sized`.
        """
        raise NotImplementedError

    # --- what it computes --------------------------------------------------------------------------------------------

    def before(self, x: Any, at: Operands) -> Any:
        """What the base operator is given instead of x: the same shape. A kind without a `before` returns x itself."""
        return x

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        """What takes the place of the operator's result y: the same shape. x is what `before` was given."""
        return y

    def fused(self, x: Any, at: Operands) -> Any | None:
        """`after(operator(before(x)), x)` by one operator, on tensors; None where there is none for these.

        A graph finds such operators by passes; this is for a call that is served without one, and gives the same bits.
        """
        return None

    def by_row(self, y: Any, x: Any, rows: Any, numbers: tuple[int, ...], ats: tuple[Operands, ...]) -> Any | None:
        """`after` of several adapters of the kind, each for the rows of its number, of symbols or tensors at once.

        `rows` is (rows,), of int64; other rows of y stay. None, which is always right: they are evaluated one by one.
        """
        return None

    def transposed(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The adapter's tensors for Wᵀ, by name, as which a tied weight may be read.

        A kind that does not define this is refused where its weight is read so.
        """
        raise NotImplementedError

    # --- the merged weight -------------------------------------------------------------------------------------------

    def changes(self, site: Site, config: Any) -> tuple[str, ...]:
        """Which of a site's base parameters merging changes: "weight", "bias" or both.

        Raises `MergeError` for a site where no change of these gives what the equation gives.
        """
        return ("weight",)

    def delta(self, name: str, at: Operands) -> LowRank | Tensor:
        """What an additive kind adds to a base parameter, "weight" or "bias": of its shape."""
        raise NotImplementedError

    def merged(self, name: str, base: Tensor, at: Operands) -> Tensor:
        """A base parameter, "weight" (dense) or "bias", with the adapter in it; all tensors have one dtype."""
        return base + self._delta(name, base, at)

    def unmerged(self, name: str, merged: Tensor, at: Operands) -> Tensor | None:
        """The inverse of `merged`, up to rounding; None if there is none, and the ledger keeps a copy instead."""
        return merged - self._delta(name, merged, at) if self.additive else None

    def _delta(self, name: str, like: Tensor, at: Operands) -> Tensor:
        delta = self.delta(name, at)
        return (delta.dense() if isinstance(delta, LowRank) else delta).to(like.dtype)


def summed(x: Tensor, at: Operands, update: Callable[[Operands], Tensor]) -> Tensor | None:
    """x (W + ΔW)ᵀ + b by one product, for kinds that make their ΔW (out, in); in graphs the pass is `sum_weights`.

    On tensors, for `Kind.fused`. None where the operator is another one, or where the sum would round too much.
    """
    weight, dtypes = at.bound.get("weight"), {x.dtype, *(tensor.dtype for tensor in at.tensors.values())}
    floats = {dtype for dtype in dtypes if dtype.is_floating_point}
    if at.operator is not LINEAR.operators[0] or floats not in ({torch.float32}, {torch.float64}):
        return None
    if weight is None or weight.dtype != x.dtype or autocast_dtype(x.device.type):
        return None
    return torch.ops.lorafx.linear.default(x, weight + update(at), at.bound["bias"])


def require_linear(site: Site, config: AdapterConfig) -> None:
    """Raise `ConfigError` for a site that is no linear layer, for kinds that are for these alone."""
    if site.reading not in (LINEAR, CONV1D):
        raise ConfigError(
            f"{site.name} is read by {site.reading}, and {config.peft_type} is for linear layers: narrow "
            "`target_modules`, or add it to `exclude_modules`"
        )

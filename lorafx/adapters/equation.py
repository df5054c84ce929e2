"""Equations in a graph: a kind's `before` and `after` as graphs of operators, at one place where a weight is read.

    y = to(after(operator(to(before(to(x)))), to(x)))        `to` casts, so that no kind has to think of dtypes

The inner casts are to the dtype in which the pass wants updates computed, the outer ones to the dtype that the base
operator's input and result had.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from ..errors import UncoveredOperatorError, user_line
from ..graph import Attribute, Match, match
from ..graph.match import template
from ..tree.lookup import find_tensor
from .adapter import Adapter
from .kinds import SCALING, Kind, Operands, Spec
from .readings import Operator, operators_for
from .readings.reading import names_of
from .site import Site
from .storages import Storage

aten = torch.ops.aten
BOUND = "operator_"  # prefix of the operator's argument names, so that none is also the name of a kind's tensor


def patterns(site: Site) -> dict[Operator, Graph]:
    """The operators that may read a site's weight, each with its pattern on the weight as it is stored."""
    return _patterns(own_operators(site), operators_at(site), site.storage)


def own_operators(site: Site) -> tuple[Operator, ...]:
    """The operators that read the weight as it is stored."""
    return tuple(each for each in site.storage.operators if each.lookup == site.reading.lookup)


def operators_at(site: Site) -> tuple[Operator, ...]:
    """The operators that may read the dense weight: those of its shape, and for a parameter that is named its value."""
    known, whole = operators_for(site.reading, len(site.weight_shape)), site.reading.value
    return (*known, whole) if site.is_parameter and whole else known


@functools.cache
def _patterns(
    of_storage: tuple[Operator, ...], operators: tuple[Operator, ...], storage: Storage
) -> dict[Operator, Graph]:
    own = {operator: template(operator.pattern, names_of(operator.pattern)) for operator in of_storage}
    return own | {operator: _on_stored(operator, storage) for operator in operators}


def _on_stored(operator: Operator, storage: Storage) -> Graph:
    """An operator's pattern, with the storage's expression of the dense weight as its weight."""
    names, stored = names_of(operator.pattern), names_of(storage.expression)

    def read(**given: Any) -> Any:
        dense = storage.expression(**{name: given[name] for name in stored})
        return operator.pattern(**{name: dense if name == "weight" else given[name] for name in names})

    return template(read, dict.fromkeys((*names, *stored)))


@dataclass(frozen=True)
class Equation:
    """What an adapter does where an operator reads its site's weight.

    `bound` names the operator's arguments that are not None. `training` says whether the site's module trains, for a
    graph, which is made for either. `own` is False where another module reads the weight, because it is tied, and adds
    a bias of its own: an adapter's bias has no place there.
    """

    adapter: Adapter
    site: Site
    operator: Operator
    bound: tuple[str, ...]
    training: bool = False
    own: bool = True

    @classmethod
    def at(cls, root: nn.Module, base: Node, adapter: Adapter, site: Site) -> tuple[Equation, Match]:
        """An adapter's equation where the node `base` reads its site's weight, and what the operator is given there.

        Raises `UncoveredOperatorError` where the weight is read in a way in which the adapter cannot act.
        """
        training = root.get_submodule(site.module).training
        for operator, pattern in patterns(site).items():
            found = match(pattern, base)
            if isinstance(found, Match) and found.bindings["weight"].op == "get_attr":
                own = _reads_own_bias(root, found, site)
                found.bindings.setdefault("x", found.bindings["weight"])  # the operator may be the weight itself
                given = tuple(name for name, value in found.bindings.items() if value is not None)
                equation = cls(adapter, site, operator, given, training, own)
                if not equation.is_impossible:
                    return equation, found
        raise UncoveredOperatorError(
            f"site {site.name}: {base.target} reads its weight, where the adapter's tensors have no place "
            f"[{user_line(base)}]. Exclude the module (`exclude_modules`)."
        )

    def of_twin(self) -> Equation:
        """The equation where another module reads the weight, because it is tied."""
        return replace(self, own=False)

    def of_other(self, adapter: Adapter) -> Equation:
        """The equation of another adapter of this form (`Adapter.is_like`), with what was worked out for this."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), adapter=adapter)
        return other

    def before(self) -> Graph:
        """The graph that computes x'; its inputs are `x`, `result_dtype` and the names that `given` has values for."""

        def equation(x: Any, dtype: Any, result_dtype: Any, **given: Any) -> Any:
            return self.x_of(x, dtype, result_dtype, self.operands_of(given))

        return self._template(equation, "x")

    def after(self) -> Graph:
        """The graph that computes y'; its inputs are `y`, `x`, `result_dtype` and the names that `given` has."""

        def equation(y: Any, x: Any, dtype: Any, result_dtype: Any, **given: Any) -> Any:
            return self.y_of(y, x, dtype, result_dtype, self.operands_of(given))

        return self._template(equation, "y", "x")

    def x_of(self, x: Any, dtype: Any, result_dtype: Any, at: Operands) -> Any:
        """x' of the equation, of symbols for a graph or of tensors."""
        cast = self.cast(x, dtype)
        found = self.adapter.kind.before(cast, at)
        return x if found is cast else aten.to.dtype(found, result_dtype)

    def y_of(self, y: Any, x: Any, dtype: Any, result_dtype: Any, at: Operands) -> Any:
        """y' of the equation, of symbols for a graph or of tensors."""
        found = self.adapter.kind.after(y, self.cast(x, dtype), at)
        return y if found is y else aten.to.dtype(found, result_dtype)

    def given(self, dtype: torch.dtype | None, bindings: dict[str, Any]) -> dict[str, Any]:
        """Values for the graphs' inputs: the adapter's tensors and scaling, the operator's arguments, the `dtype`."""
        paths = self.adapter.tensors[self.site.name]
        tensors = {name: Attribute(paths[suffix], self.dtype_of(name, dtype)) for name, suffix in self.suffixes.items()}
        scale = self.adapter.scales.get(self.site.name)
        scaling = {SCALING: Attribute(scale)} if scale else {}
        return {**tensors, **scaling, **{f"{BOUND}{name}": bindings[name] for name in self.bound}, "dtype": dtype}

    def dtype_of(self, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype in which the equation is given a tensor where it computes in `dtype`; None is the tensor's own."""
        return dtype if self.casts(name) else None

    def casts(self, name: str) -> bool:
        """Whether a tensor is cast to the dtype that the equation computes in."""
        spec = self._specs[name]
        return not spec.as_kept and spec.dtype is None

    def _template(self, equation: Callable[..., Any], *first: str) -> Graph:
        names = *first, *self.inputs, *(f"{BOUND}{name}" for name in self.bound), "dtype", "result_dtype"
        return template(equation, names)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The kind's names for the adapter's tensors here, and for the scaling if that is one."""
        return *self.suffixes, *([SCALING] if self.site.name in self.adapter.scales else [])

    @functools.cached_property
    def suffixes(self) -> dict[str, str]:
        """The suffixes of the tensors that the equation uses here, by the kind's names for them."""
        return {name: spec.suffix for name, spec in self._specs.items() if self.own or not spec.of_bias}

    @functools.cached_property
    def asks_whose(self) -> bool:
        """Whether it is another one where another module reads the weight."""
        return any(spec.of_bias for spec in self._specs.values())

    @functools.cached_property
    def _specs(self) -> dict[str, Spec]:
        return self.adapter.specs(self.site)

    def operands_of(self, given: dict[str, Any]) -> Operands:
        """What the kind's functions are given, from values for a graph's inputs."""
        absent = dict.fromkeys((*names_of(self.operator.pattern), *names_of(self.site.storage.expression)))
        bound = absent | {name: given[f"{BOUND}{name}"] for name in self.bound}
        return self.operands({name: given[name] for name in self.suffixes}, bound, self.training, given.get(SCALING))

    def operands(self, tensors: dict[str, Any], bound: dict[str, Any], training: bool, scaling: Any = None) -> Operands:
        """What the kind's functions are given besides x and y: its tensors by name, the operator's arguments.

        `training` says whether the site's module trains; `scaling` is given where that is a tensor.
        """
        kind, site = self.adapter.kind, self.site
        if self.is_turned:
            tensors = kind.transposed(tensors)
        numbers: dict[str, Any] = self.numbers
        if scaling is not None:  # a copy, so that the scale may change between forward and backward
            numbers = numbers | {SCALING: aten.clone.default(scaling)}
        weight = site.storage.read(site.weight_shape, bound) if kind.needs_weight(site) else None
        return Operands(site, self.adapter.config, tensors, numbers, self.operator, bound, training, weight)

    @functools.cached_property
    def numbers(self) -> dict[str, float]:
        """The numbers of the equation here, as the config says."""
        return dict(self.adapter.kind.numbers(self.site, self.adapter.config))

    def cast(self, x: Any, dtype: Any) -> Any:
        """x in the dtype that updates are computed in; row numbers of a lookup stay what they are."""
        return x if self.operator.lookup else aten.to.dtype(x, dtype)

    @functools.cached_property
    def is_turned(self) -> bool:
        """Whether the operator reads the weight the other way round than it is stored."""
        return self.operator.transposed != self.site.reading.transposed

    @property
    def is_impossible(self) -> bool:
        """Whether the operator reads the weight transposed, and the kind does not define `transposed`."""
        return self.is_turned and type(self.adapter.kind).transposed is Kind.transposed


def _reads_own_bias(root: nn.Module, found: Match, site: Site) -> bool:
    """Whether this is the site's own module, and not a twin that shares its weight and has a bias of its own."""
    bias = found.bindings.get("bias")
    innermost = [path.partition("@")[0] for path, _ in found.anchor.meta.get("nn_module_stack", {}).values()][-1:]
    if bias is None and innermost == [site.module]:
        return True  # the module adds it itself
    read = find_tensor(root, str(bias.target)) if isinstance(bias, Node) and bias.op == "get_attr" else None
    return read is find_tensor(root, site.bias)

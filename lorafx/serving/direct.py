"""Direct: an operator that reads an adapted weight is computed right where it is called, in the adapters' equations.

    y = after(operator(before(x)), x)

The equations are plain functions of tensors (`adapters/equation.py`), so nothing is captured, rewritten or compiled.
That takes a torch function of which a reading says what operator it is (`Operator.calls`), and a weight that is kept
as it is. Any other read of a weight becomes a small graph (`site_graphs`). Results are those of a graph, but for what
passes regroup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.by_row import RowEquations, follows
from ..adapters.equation import Equation, operators_at, own_operators
from ..adapters.kinds import Operands
from ..adapters.readings import Operator
from ..adapters.readings.reading import Arguments, names_of
from ..adapters.readings.value import value
from ..adapters.site import Site
from ..adapters.storages import DENSE
from ..errors import UncoveredOperatorError
from ..pipeline import Pipeline
from ..tree.lookup import find_tensor, module_at
from .site_table import Place, SiteTable


def equation_dtype(pipeline: Pipeline) -> torch.dtype | None:
    """The dtype that a pipeline has updates computed in; None where it is that of the activations."""
    names = (getattr(each, "compute_dtype", None) for each in pipeline if "adapters" in each.establishes)
    return getattr(torch, name) if (name := next(names, None)) else None


@dataclass(frozen=True)
class Evaluation:
    """One adapter's equation where an operator reads its site's weight, which module has the site, and its tensors.

    Of each of these it says whether it is cast to the dtype that the equation computes in.
    """

    equation: Equation
    owner: nn.Module
    places: tuple[tuple[str, Place, bool], ...]
    scale: Place | None

    @classmethod
    def of(cls, tree: nn.Module, equation: Equation) -> Evaluation:
        """The equation with the places of its tensors in a tree."""
        is_cast = {name: equation.casts(name) for name in equation.suffixes}
        return cls._at(module_at(tree, equation.site.module), tree, equation, is_cast)

    def of_other(self, tree: nn.Module, adapter: Adapter) -> Evaluation:
        """That of another adapter of the same form."""
        is_cast = {name: cast for name, _, cast in self.places}
        return self._at(self.owner, tree, self.equation.of_other(adapter), is_cast)

    @classmethod
    def _at(cls, owner: nn.Module, tree: nn.Module, equation: Equation, is_cast: Mapping[str, bool]) -> Evaluation:
        """An equation's, where the site's module is known, below which nearly all of an adapter's tensors hang."""
        adapter, site = equation.adapter, equation.site
        paths, scale, within = adapter.tensors[site.name], adapter.scales.get(site.name), f"{site.module}."

        def place(path: str) -> Place:
            return Place.of(owner, path[len(within) :]) if path.startswith(within) else Place.of(tree, path)

        places = tuple([(name, place(paths[suffix]), is_cast[name]) for name, suffix in equation.suffixes.items()])
        return cls(equation, owner, places, None if scale is None else place(scale))

    def operands(self, dtype: torch.dtype | None, bound: dict[str, Any]) -> Operands:
        """What the kind's functions are given, its tensors in a dtype, or as they are where that is None."""
        tensors = {}
        for name, place, is_cast in self.places:
            tensor = place.tensor
            tensors[name] = tensor.to(dtype) if is_cast and dtype not in (None, tensor.dtype) else tensor
        scale = None if self.scale is None else self.scale.tensor
        return self.equation.operands(tensors, bound, self.owner.training, scale)


class Read(NamedTuple):
    """How a torch function reads a site's weight: its arguments as the operator has them, and the equations around.

    With `asks_whose`, these differ where another module reads the weight, which is tied.
    """

    operator: Operator
    arguments: Arguments
    names: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    asks_whose: bool

    def of_others(self, tree: nn.Module, adapters: Sequence[Adapter]) -> Read:
        """The read with the equations of other adapters, each of the form of the one in its place."""
        pairs = zip(self.evaluations, adapters)
        return self._replace(evaluations=tuple([each.of_other(tree, other) for each, other in pairs]))


class Direct:
    """Runs torch functions that read adapted weights, in a tree of certain modules.

    `dtype` is that of updates, None where it is that of the activations. Where rows choose their adapters, `rows` has
    their numbers, `one_token` says whether the call has one token a row, and `turned` whether rows may come second.
    """

    def __init__(
        self,
        tree: nn.Module,
        table: SiteTable,
        dtype: torch.dtype | None,
        rows: Tensor | None = None,
        one_token: bool = False,
        turned: bool = False,
    ):
        self.tree, self.table, self.dtype = tree, table, dtype
        self.rows, self.one_token, self.turned = rows, one_token, turned

    def run(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        weight: str,
        part: str,
        copy_of: Callable[[Any], Any] | None,
        tensor: Tensor | None = None,
    ) -> Any:
        """What a function gives that the module at `part` calls, and that reads the weight at the path `weight` once.

        `tensor` is that weight, where it may be an argument of another meaning. `copy_of`, if there is one, gives the
        adapters' own copy of a base tensor, and any other value itself.
        NotImplemented where the equations cannot be run so.
        """
        for read in self._reads(func, weight):
            values = read.arguments(*args, **kwargs)
            if values is None:
                continue
            bound = dict(zip(read.names, values))
            x, named = bound["x"], bound["weight"]
            if tensor is not None and named is not None and named is not tensor:
                return NotImplemented
            if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided:
                return NotImplemented
            if read.asks_whose and not self._is_own(bound.get("bias"), weight, part):
                read = self._of_twin(read)
            if copy_of is not None:
                bound = {name: copy_of(value) for name, value in bound.items()}
            dtype = None if read.operator.lookup else self.dtype or x.dtype
            try:
                if self.rows is not None and read.evaluations:
                    return self._by_row(read, bound, dtype, weight)
                return evaluated(read.operator, read.evaluations, bound, dtype, x.dtype)
            except RuntimeError as error:  # torch's message has the shapes of whatever the equations multiply
                shape = self.table.acting[weight][0][1].weight_shape
                error.add_note(f"where {weight}, {tuple(shape)}, is read with a tensor {tuple(x.shape)}")
                raise
        return NotImplemented

    def value(self, weight: str, part: str, tensor: Tensor) -> Any:
        """The weight at a path, which is `tensor`, with the updates in it: for a parameter that a config names.

        NotImplemented for any other. Raises `UncoveredOperatorError` if rows have adapters of their own.
        """
        return self.run(value, (tensor,), {}, weight, part, None, tensor)

    def knows(self, func: Callable[..., Any], weight: str) -> bool:
        """Whether a function may be an operator of which equations are known for the weight at a path."""
        return bool(self._reads(func, weight))

    def _by_row(self, read: Read, bound: dict[str, Any], dtype: torch.dtype | None, weight: str) -> Any:
        """The operator with each row's own adapter. Raises `UncoveredOperatorError` if rows cannot be told apart."""
        x, rows = bound["x"], self.rows
        assert rows is not None
        if not (read.operator.is_of_rows and follows(x, rows, self.one_token, self.turned)):
            first = f"begin with a call in which no other size is {len(rows)}; or " if self.turned else ""
            raise UncoveredOperatorError(
                f"{weight} is read with a tensor {tuple(x.shape)}, of which nobody can tell which rows of the batch "
                f"these are: {first}give each adapter's rows a call of their own, or leave the module out by "
                "`exclude_modules`"
            )
        numbers = tuple(self.table.numbers[each.equation.adapter.name] for each in read.evaluations)
        joint = RowEquations(tuple(each.equation for each in read.evaluations), numbers)
        ats = [each.operands(dtype, bound) for each in read.evaluations]
        y = read.operator.pattern(**bound | {"x": joint.x_of(x, rows, dtype, x.dtype, ats)})
        return joint.y_of(y, x, rows, dtype, y.dtype, ats)

    def _reads(self, func: Callable[..., Any], weight: str) -> tuple[Read, ...]:
        kept = self.table.reads.get((func, weight))
        if kept is None:
            kept = self.table.reads[func, weight] = tuple(self._found(func, weight))
        return kept

    def _found(self, func: Callable[..., Any], weight: str) -> Iterator[Read]:
        """The operators that a function may be, each with the equations of the adapters that are not merged."""
        acting = self.table.acting[weight]
        if not all(site.storage == DENSE or site.storage.whole for _, site in acting):
            return
        if func is value and not all(site.is_parameter for _, site in acting):
            return
        around = self.table.around(weight)
        for operator, arguments in _operators(func, acting[0][1]):
            names = names_of(operator.pattern)
            equations = [Equation(*each, operator, names) for each in around]
            # A kind that needs the weight must be innermost: a graph says so.
            several = len(equations) > 1 and self.rows is None
            unclear = several and any(each.adapter.kind.needs_weight(each.site) for each in equations)
            if not unclear and not any(each.is_impossible for each in equations):
                evaluations = tuple(Evaluation.of(self.tree, each) for each in equations)
                yield Read(operator, arguments, names, evaluations, any(each.asks_whose for each in equations))

    def _is_own(self, bias: Tensor | None, weight: str, part: str) -> bool:
        """Whether the site's own module reads its weight, and not a twin that has a bias of its own."""
        _, site = self.table.acting[weight][0]
        return (bias is None and part == site.module) or bias is find_tensor(
            module_at(self.tree, site.module), site.reading.bias
        )

    def _of_twin(self, read: Read) -> Read:
        equations = (each.equation.of_twin() for each in read.evaluations)
        return read._replace(evaluations=tuple(Evaluation.of(self.tree, each) for each in equations))


def _operators(func: Callable[..., Any], site: Site) -> list[tuple[Operator, Arguments]]:
    """The operators that a function may be at a site: those of its reading, or of others that may read its weight."""
    reading = site.reading
    for some in (lambda: own_operators(site), lambda: reading.operators, lambda: operators_at(site)):
        if found := [(each, how) for each in some() for known, how in each.calls if known is func]:
            return found
    return []


def evaluated(
    operator: Operator,
    evaluations: tuple[Evaluation, ...],
    bound: dict[str, Any],
    dtype: torch.dtype | None,
    result_dtype: torch.dtype,
) -> Any:
    """The operator on its arguments `bound`, within equations, the first innermost, which compute in `dtype`.

    What a `before` gives is cast to `result_dtype`.
    """
    if not evaluations:
        return operator.pattern(**bound)
    inner, outer = evaluations[:-1], evaluations[-1]
    equation, x, at = outer.equation, bound["x"], outer.operands(dtype, bound)
    if not inner and (fused := equation.adapter.kind.fused(x, at)) is not None:
        return fused
    within = bound | {"x": equation.x_of(x, dtype, result_dtype, at)}
    y = evaluated(operator, inner, within, dtype, result_dtype)
    return equation.y_of(y, x, dtype, y.dtype, at)

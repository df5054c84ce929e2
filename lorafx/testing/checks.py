"""What must hold of an adapted model, as functions to call in a test, with tolerances derived from its dtypes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import api
from ..model.adaptation import of
from ..model.adapted_model import AdaptedModel
from ..tree.lookup import tensor_at
from ..tree.modes import in_mode

Call = Callable[[nn.Module], Any]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The bits of each float as an integer, in a tensor of the same shape on the CPU; other dtypes as they are.

    Unlike floats, these tell -0 from +0, and a NaN equals itself.
    """
    plain = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return plain.view(_INTEGERS[plain.element_size()]) if plain.is_floating_point() else plain


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def base_tensors(lora: AdaptedModel) -> dict[str, Tensor]:
    """Copies of the base model's parameters and buffers, by path."""
    return {path: tensor.detach().clone() for path, tensor in lora._lorafx.base.state_dict().items()}


def adapter_tensors(lora: AdaptedModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """Copies of an adapter's tensors, by path; biases and modules that it trains as a whole included."""
    paths = lora._lorafx.adapters[adapter_name].paths
    return {path: tensor_at(lora, path).detach().clone() for path in paths}


# Deviations allowed: Higham & Mary's theorem 2.4 lets a bound of λ deviations fail with probability 2 exp(-λ²/2),
# 7e-6 for 5.
_LAMBDA = 5.0
# Roundings to the model's dtype between one weight and the next: product, sum with the update, cast, bias, and up to
# four of norms, activations and joins.
_ROUNDINGS = 8
_DRAWS = 4


def backward_error(lora: AdaptedModel) -> float:
    """How far, relatively, one layer's weights would have to move to explain its rounding errors.

        γ = λ · (u √(R + 4 a) + u' √(K + Σ r))

    u is half the eps of the coarsest dtype of the model's parameters; R = 8 roundings lie between one weight and the
    next, and 4 more in each of the a active adapters (A x, B A x, s · B A x, the sum). Products accumulate in float32
    or finer, so u' is half the eps of float32, or of float64 for a float64 model. K is the longest reduction (in
    features times kernel), Σ r the ranks on top of it. Rounding errors are taken as independent, so n of them grow as
    √n (Higham & Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41(5), 2019),
    up to λ = 5 deviations.
    """
    dtypes = {p.dtype for p in lora.parameters() if p.is_floating_point()}
    unit = max(torch.finfo(dtype).eps for dtype in dtypes) / 2
    inner = min(unit, torch.finfo(torch.float32).eps / 2)
    adapters = [lora._lorafx.adapters[name] for name in of(lora).active_adapters]
    lengths = [weight[0].numel() for p in lora.parameters() if (weight := p).ndim > 1]
    lengths += [max(weight.shape[:2]) for weight in lora.parameters() if weight.ndim == 2]
    shapes = [
        [spec.shape for site in a.selection for spec in a.specs(site).values() if len(spec.shape) > 1] for a in adapters
    ]
    ranks = sum(max((min(shape[:2]) for shape in each), default=0) for each in shapes)
    roundings = _ROUNDINGS + 4 * len(adapters)
    return _LAMBDA * (unit * math.sqrt(roundings) + inner * math.sqrt(max(lengths) + ranks))


@torch.no_grad()
def condition(lora: AdaptedModel, call: Call, *, seed: int = 0) -> list[float]:
    """How strongly each floating-point output of a call answers a relative change of the weights: max |Δy| / η.

    Every parameter is multiplied by 1 ± η with random signs and η = √eps, the step at which rounding and curvature
    weigh alike; the largest answer of four draws counts. The parameters get their bits back.
    """
    parameters = [p for p in lora.parameters() if p.is_floating_point()]
    originals = [p.detach().clone() for p in parameters]
    step = math.sqrt(max(torch.finfo(p.dtype).eps for p in parameters))
    rng, expected, largest = torch.Generator().manual_seed(seed), _floats(call(lora)), None
    try:
        for _ in range(_DRAWS):
            for parameter, original in zip(parameters, originals):
                signs = torch.randint(0, 2, original.shape, generator=rng).double().mul_(2).sub_(1)
                parameter.copy_(original.double() * (1 + step * signs.to(original.device)))
            answers = [float(d) / step for d in _distances(_floats(call(lora)), expected)]
            largest = [max(pair) for pair in zip(answers, largest or answers)]
    finally:
        for parameter, original in zip(parameters, originals):
            parameter.copy_(original)
    return largest or []


def tolerance(lora: AdaptedModel, call: Call) -> list[float]:
    """How far rounding may move each floating-point output of a call, absolutely: `backward_error` times `condition`.

    The forward error of a computation is at most its backward error times its condition number (Higham, "Accuracy and
    Stability of Numerical Algorithms", section 1.6). The first follows from dtypes and lengths alone; the second is a
    property of the function, and is measured on the model as it is, merged or not.
    """
    error = backward_error(lora)
    return [error * number for number in condition(lora, call)]


def _floats(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _distances(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    assert len(a) == len(b), f"the call gives {len(a)} tensors now and gave {len(b)}"
    return [(x.double() - y.double()).abs().max() for x, y in zip(a, b)]


def assert_close(actual: Any, expected: Any, limits: Sequence[float]) -> None:
    """Every floating-point leaf of `actual` has the shape and dtype of that of `expected`, and is within its limit.

    `limits` are the largest absolute differences allowed, one for each such leaf.
    """
    for index, (a, e, limit) in enumerate(zip(_floats(actual), _floats(expected), limits, strict=True)):
        assert (a.shape, a.dtype) == (e.shape, e.dtype), f"output {index}: {a.shape} {a.dtype}, not {e.shape} {e.dtype}"
        distance = float((a.double() - e.double()).abs().max())
        assert distance <= limit, f"output {index} differs by {distance:.3g}, and rounding explains {limit:.3g}"


def assert_same_tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, and under each the same bits."""
    assert actual.keys() == expected.keys(), f"names differ: {sorted(actual.keys() ^ expected.keys())}"
    wrong = [path for path, tensor in expected.items() if not same_bits(actual[path], tensor)]
    assert not wrong, f"not bit for bit the same: {wrong}"


def assert_merge_is_exact(
    lora: AdaptedModel, adapter_names: Sequence[str] | None = None, *, cycles: int = 2, one_by_one: bool = False
) -> None:
    """Merging and unmerging gives every tensor of the base its bits back, each time, and leaves the adapters alone.

    `adapter_names` are merged in this order (None: the active ones), together or `one_by_one`.
    """
    names = list(of(lora).active_adapters if adapter_names is None else adapter_names)
    base, own = base_tensors(lora), {name: adapter_tensors(lora, name) for name in names}
    for _ in range(cycles):
        for group in [[name] for name in names] if one_by_one else [names]:
            of(lora).merge_adapter(group)
        of(lora).unmerge_adapter()
        assert_same_tensors(base_tensors(lora), base)
    for name in names:
        assert_same_tensors(adapter_tensors(lora, name), own[name])


def assert_merged_equals_unmerged(lora: AdaptedModel, call: Call) -> None:
    """In eval mode, a call gives the same with the active adapters merged, up to what rounding explains.

    `call` takes the model and returns tensors: `lambda model: model(**inputs)`. The limit is `tolerance` of the
    unmerged model plus that of the merged one. The model is left as it was.
    """
    with evaluating(lora), torch.no_grad():
        expected, limits = call(lora), tolerance(lora, call)
        of(lora).merge_adapter()
        try:
            actual, merged_limits = call(lora), tolerance(lora, call)
        finally:
            of(lora).unmerge_adapter()
    assert_close(actual, expected, [a + b for a, b in zip(limits, merged_limits)])


def assert_unloaded_equals_unmerged(lora: AdaptedModel, call: Call) -> nn.Module:
    """In eval mode, the plain model that `merge_and_unload` returns gives what the adapted one gave; returns it.

    The limit is that of `assert_merged_equals_unmerged`. The plain model runs its own Python and no graph, so this
    checks graphs against the model itself. `lora` is used up by it.
    """
    lora.eval()
    with torch.no_grad():
        expected, limits = call(lora), tolerance(lora, call)
        of(lora).merge_adapter()
        limits = [a + b for a, b in zip(limits, tolerance(lora, call))]
        base = of(lora).merge_and_unload().eval()
        assert_close(call(base), expected, limits)
    return base


_SHARE = 0.01  # of a slope, that rounding may hide


def assert_gradients(lora: AdaptedModel, call: Call, *, seed: int = 0) -> None:
    """Backward gives what outputs change by, along a random direction of all that trains. Needs no other backward.

    With d as large as the parameters p, and f the sum of the outputs weighed by how each answers d, <∇f, d> is compared
    with m(h) = (f(p + h d) - f(p - h d)) / 2 h. Rounding moves m by what it moves f by, over h, and h is where that is
    a hundredth of m: no larger, since ReLUs have kinks. How m differs at h, 2 h and 4 h says what these and
    curvature do to it. An error of some hundredths shows in 32 bits, not in 16. The parameters get their bits back.
    """
    line = _Line(lora, call, seed)
    probe = max(torch.finfo(p.dtype).eps for p in line.parameters) ** (1 / 3)
    with torch.no_grad():
        rounding = math.hypot(*tolerance(lora, call))
        weights = [a - b for a, b in zip(line.at(probe), line.at(-probe))]
        norm = math.hypot(*(float(weight.norm()) for weight in weights))
        assert norm > 0, "moving what trains moves no output"
        weights = [weight / norm for weight in weights]
        step = rounding / (_SHARE * norm / (2 * probe))
        sizes = [step, 2 * step, 4 * step]
        slopes = [(_weighed(weights, line.at(h)) - _weighed(weights, line.at(-h))).item() / (2 * h) for h in sizes]
    gradients = torch.autograd.grad(_weighed(weights, line.outputs()), line.parameters, allow_unused=True)
    pairs = [(g, d) for g, d in zip(gradients, line.along) if g is not None]
    slope = sum(float((g.double() * d.double()).sum()) for g, d in pairs)
    limit = rounding / step + 2 * (abs(slopes[0] - slopes[1]) + abs(slopes[1] - slopes[2]))
    message = f"backward gives {slope:.6g}, outputs change by {slopes[0]:.6g}, and {limit:.3g} is explained"
    assert abs(slope - slopes[0]) <= limit, message


def _weighed(weights: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    return torch.stack([(weight * output).sum() for weight, output in zip(weights, outputs)]).sum()


class _Line:
    """What an adapted model computes where its trained parameters are moved along a random line, and then put back."""

    def __init__(self, lora: AdaptedModel, call: Call, seed: int) -> None:
        self.lora, self.call, rng = lora, call, torch.Generator().manual_seed(seed)
        self.parameters = [p for p in lora.parameters() if p.requires_grad]
        assert self.parameters, "nothing trains"
        self.along = []
        for parameter in self.parameters:
            size = parameter.detach().double().square().mean().sqrt().item() or 1.0
            self.along.append((size * torch.randn(parameter.shape, generator=rng, dtype=torch.float64)).to(parameter))

    def outputs(self) -> list[Tensor]:
        """The floating-point outputs, in float64."""
        leaves = pytree.tree_leaves(self.call(self.lora))
        return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def at(self, size: float) -> list[Tensor]:
        """The outputs where the parameters are moved by `size` times the direction. Within `torch.no_grad`."""
        originals = [parameter.detach().clone() for parameter in self.parameters]
        try:
            for parameter, direction in zip(self.parameters, self.along):
                parameter.add_(direction, alpha=size)
            return self.outputs()
        finally:
            for parameter, original in zip(self.parameters, originals):
                parameter.copy_(original)


def assert_inert(lora: AdaptedModel, base: nn.Module, call: Call) -> None:
    """An adapter with its start values (B = 0) changes no bit of a call's output; gradients are not compared."""
    actual, expected = _floats(call(lora)), _floats(call(base))
    assert len(actual) == len(expected), f"{len(actual)} tensors, not {len(expected)}"
    wrong = [index for index, pair in enumerate(zip(actual, expected)) if not same_bits(*pair)]
    assert not wrong, f"outputs {wrong} are not bit for bit the base model's"


def assert_roundtrip(lora: AdaptedModel, tmp_path: Path) -> None:
    """Every adapter, saved and loaded, has the same sites and tensors, bit for bit; saved again, the same bytes.

    Files are written into `tmp_path`.
    """
    base = copy.deepcopy(lora._lorafx.base)
    of(lora).save_pretrained(tmp_path / "first")
    for name in of(lora).peft_config:
        place = "" if name == "default" else name
        again = api.load(
            copy.deepcopy(base),
            tmp_path / "first" / place,
            adapter_name=name,
            autocast_adapter_dtype=lora._lorafx.autocast_adapter_dtype,
        )
        assert_same_tensors(adapter_tensors(again, name), adapter_tensors(lora, name))
        assert again._lorafx.adapters[name].selection == lora._lorafx.adapters[name].selection
        again.save_pretrained(tmp_path / "second")
        for file in (tmp_path / "first" / place).glob("adapter_*"):
            assert file.read_bytes() == (tmp_path / "second" / place / file.name).read_bytes(), f"{file.name} changed"


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Eval mode within a `with` block; afterwards each module is in the mode that it was in before."""
    return in_mode(model, training=False)

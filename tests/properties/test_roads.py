"""Random nested models that reach their layers by random roads, adapted and compared with the formula in float64."""

from __future__ import annotations

import functools
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx

R, ALPHA = 2, 6
REGISTRY: dict[int, list[nn.Module]] = {}


class Slotted:
    __slots__ = ("module",)

    def __init__(self, module: nn.Module):
        self.module = module


class Single:
    """An object of which there is only one."""

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules

    def __copy__(self) -> Any:
        raise TypeError("there is one of me")

    def __call__(self, x: Tensor) -> Tensor:
        return run(self.modules, x)


def run(functions: Any, x: Tensor) -> Tensor:
    """Each of these functions on what the one before gave."""
    for function in functions:
        x = function(x)
    return x


def registered(modules: list[nn.Module]) -> int:
    REGISTRY[id(modules)] = modules
    return id(modules)


ROADS: dict[str, tuple[Callable[[list[nn.Module]], Any], Callable[[Any, Tensor], Tensor]]] = {
    "a list": (lambda ms: ms, run),
    "a deque": (deque, run),
    "a dict": (lambda ms: dict(enumerate(ms)), lambda held, x: run(held.values(), x)),
    "a mapping proxy": (lambda ms: MappingProxyType(dict(enumerate(ms))), lambda held, x: run(held.values(), x)),
    "a namespace": (lambda ms: SimpleNamespace(ms=ms), lambda held, x: run(held.ms, x)),
    "slots": (lambda ms: [Slotted(m) for m in ms], lambda held, x: run((h.module for h in held), x)),
    "weak references": (lambda ms: [weakref.ref(m) for m in ms], lambda held, x: run((h() for h in held), x)),
    "weak values": (
        lambda ms: weakref.WeakValueDictionary(enumerate(ms)),
        lambda held, x: run((held[n] for n in sorted(held)), x),
    ),
    "bound methods": (lambda ms: [m.forward for m in ms], run),
    "a closure": (lambda ms: lambda x: run(ms, x), lambda held, x: held(x)),
    "a partial": (lambda ms: functools.partial(run, ms), lambda held, x: held(x)),
    "an object of one's own": (Single, lambda held, x: held(x)),
    "a registry": (registered, lambda held, x: run(REGISTRY[held], x)),
}


class Leaf(nn.Module):
    """(…, inputs) -> (…, outputs), by the module or by its bare parameters."""

    def __init__(self, inputs: int, outputs: int, bare: bool):
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)
        self.held = [self.fc.weight, self.fc.bias] if bare else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, *self.held) if self.held else self.fc(x))


class Nest(nn.Module):
    """Parts in order, reached by a road; `named` says how they are hung into the module tree."""

    def __init__(self, parts: list[nn.Module], road: str, named: bool):
        super().__init__()
        for number, part in enumerate(parts):
            self.add_module(f"part{number}", part) if named else None
        if not named:
            self.parts = nn.ModuleList(parts)
        hold, self.__dict__["follow"] = ROADS[road]
        self.__dict__["held"] = hold(list(parts))  # no list of the module tree's

    def forward(self, x: Tensor) -> Tensor:
        return self.follow(self.held, x)


@dataclass(frozen=True)
class Plan:
    """A leaf's outputs and whether it reads bare parameters, or a nest's parts, road and how they are named."""

    outputs: int = 0
    bare: bool = False
    parts: tuple[Plan, ...] = ()
    road: str = ""
    named: bool = False

    def build(self, inputs: int) -> tuple[nn.Module, int]:
        """The module, and the width of what it gives."""
        if not self.parts:
            return Leaf(inputs, self.outputs, self.bare), self.outputs
        modules = []
        for part in self.parts:
            module, inputs = part.build(inputs)
            modules.append(module)
        return Nest(modules, self.road, self.named), inputs

    def leaves(self, path: str = "") -> Iterator[str]:
        """The paths of the linear layers, in the order in which they run."""
        if not self.parts:
            yield f"{path}fc"
        for number, part in enumerate(self.parts):
            yield from part.leaves(f"{path}part{number}." if self.named else f"{path}parts.{number}.")


leaves = st.builds(Plan, outputs=st.integers(2, 5), bare=st.booleans())


def nests(inside: st.SearchStrategy[Plan]) -> st.SearchStrategy[Plan]:
    parts = st.lists(inside, min_size=1, max_size=3).map(tuple)
    return st.builds(Plan, parts=parts, road=st.sampled_from(sorted(ROADS)), named=st.booleans())


plans = nests(st.recursive(leaves, nests, max_leaves=4))


def formula(plan: Plan, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the adapted model is to give: tanh((W + α/r · B A) x + b), layer after layer."""
    for path in plan.leaves():
        a, b = (tensors[f"{path}.lora_{name}.default.weight"] for name in "AB")
        x = torch.tanh(F.linear(x, tensors[f"{path}.weight"] + ALPHA / R * (b @ a), tensors[f"{path}.bias"]))
    return x


def built(plan: Plan) -> nn.Module:
    torch.manual_seed(0)
    return plan.build(3)[0].double()


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["auto", "sites"])
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans)
@pytest.mark.filterwarnings("ignore:.*could not be captured")
def test_an_adapter_acts_by_whatever_road_a_layer_is_reached(capture, plan, tmp_path):
    config = {"r": R, "lora_alpha": ALPHA, "target_modules": ["fc"], "init_lora_weights": False}
    lora = lorafx.compile(built(plan), config, capture=capture, autocast_adapter_dtype=False)
    x = torch.randn(4, 3, dtype=torch.float64)
    tensors = {path: p.detach().clone().requires_grad_(".lora_" in path) for path, p in lora.named_parameters()}
    expected = formula(plan, tensors, x)
    expected.sum().backward()
    actual = lora(x)
    actual.sum().backward()
    torch.testing.assert_close(actual, expected)
    for path, parameter in lora.named_parameters():
        torch.testing.assert_close(parameter.grad, tensors[path].grad, msg=path)
    with lora.disable_adapter():
        torch.testing.assert_close(lora(x), built(plan)(x))
    lora.merge_adapter()
    torch.testing.assert_close(lora(x), expected)
    lora.unmerge_adapter()
    folder = tempfile.mkdtemp(dir=tmp_path)
    lora.save_pretrained(folder)
    again = lorafx.load(built(plan).eval(), folder, capture=capture, autocast_adapter_dtype=False)
    torch.testing.assert_close(again(x), expected)
    torch.testing.assert_close(lora.merge_and_unload()(x), expected)

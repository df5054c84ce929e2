"""Random nested nets whose layers do what models do, and that reach their layers by whatever road."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

REGISTRY: dict[int, list[nn.Module]] = {}


# --- layers: (batch, length, inputs) -> (batch, length, outputs), with a site called `fc` ----------------------------


class Layer(nn.Module):
    """A linear layer; what each kind of layer does with it is a function in `LAYERS`."""

    def __init__(self, kind: str, inputs: int, outputs: int):
        super().__init__()
        make, self.__dict__["run"] = LAYERS[kind]
        self.fc = make(inputs, outputs)
        self.norm = nn.BatchNorm1d(outputs)
        self.register_buffer("seen", torch.zeros(outputs))
        self.held = [p for p in (getattr(self.fc, "weight", None), getattr(self.fc, "bias", None)) if p is not None]
        if prepare := PREPARED.get(kind):
            prepare(self)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.run(self, x))


class Scaled(nn.Linear):
    """A linear layer of one's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x) - 1


@dataclass
class Output:
    """What a layer may give."""

    value: Tensor
    other: int = 3


class Pair(NamedTuple):
    """What a layer may give."""

    first: Tensor
    second: Tensor


def in_place(layer: Layer, x: Tensor) -> Tensor:
    y = layer.fc(x)
    y[:, 0] = 0
    return torch.sin(y.mul_(2)).add_(y.detach().mean()).clamp_(max=0.9)


def counted(layer: Layer, x: Tensor) -> Tensor:
    y = layer.fc(x)
    with torch.no_grad():
        layer.seen.mul_(0.5).add_(y.mean((0, 1)))
    return y + layer.seen


def normed(layer: Layer, x: Tensor) -> Tensor:
    return layer.norm(layer.fc(x).transpose(1, 2)).transpose(1, 2)


def looked_up(layer: Layer, x: Tensor) -> Tensor:
    return layer.fc((x.sum(-1) > 0).long() + (x[..., 0] > 0).long()) * x.mean(-1, keepdim=True)


def functional(layer: Layer, x: Tensor) -> Tensor:
    return functional_call(layer.fc, dict(layer.fc.named_parameters()), (x,))


def kept(layer: Layer, x: Tensor) -> Tensor:
    """With a cache between calls in a dict that the layer holds."""
    y = layer.fc(x)
    layer.__dict__.setdefault("cache", {})["last"] = y.detach()
    return y + layer.cache["last"].mean()


def branched(layer: Layer, x: Tensor) -> Tensor:
    return layer.fc(x) if x.sum() > 0 else -layer.fc(2 * x)


def hooked_output(layer: Layer, x: Tensor) -> Tensor:
    y = layer.fc(x)
    if y.requires_grad:
        y.register_hook(lambda grad: 3 * grad)
    return y


def tied(layer: Layer) -> None:
    layer.other = nn.Linear(layer.fc.in_features, layer.fc.out_features)
    layer.other.weight = layer.fc.weight


def hook(layer: Layer) -> None:
    layer.fc.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(layer: Layer) -> None:
    layer.fc.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def keyword_hook(layer: Layer) -> None:
    layer.fc.register_forward_hook(lambda module, args, kwargs, output: output + args[0].sum(), with_kwargs=True)


def backward_hook(layer: Layer) -> None:
    layer.fc.register_full_backward_hook(lambda module, inputs, outputs: tuple(2 * g for g in inputs))


def backward_pre_hook(layer: Layer) -> None:
    layer.fc.register_full_backward_pre_hook(lambda module, outputs: tuple(2 * g for g in outputs))


PREPARED: dict[str, Callable[[Layer], None]] = {
    "a tied weight": tied,
    "a forward hook": hook,
    "a forward pre-hook": pre_hook,
    "a hook with keywords": keyword_hook,
    "a full backward hook": backward_hook,
    "a full backward pre-hook": backward_pre_hook,
}


def by_columns(call: Callable[[Layer, Tensor], Tensor]) -> Callable[[Layer, Tensor], Tensor]:
    """For layers that have channels first."""
    return lambda layer, x: call(layer, x.transpose(1, 2)).transpose(1, 2)


def plain(layer: Layer, x: Tensor) -> Tensor:
    return layer.fc(x)


LAYERS: dict[str, tuple[Callable[[int, int], nn.Module], Callable[[Layer, Tensor], Tensor]]] = {
    "a module": (nn.Linear, plain),
    "no bias": (lambda i, o: nn.Linear(i, o, bias=False), plain),
    "a subclass": (Scaled, plain),
    "held parameters": (nn.Linear, lambda layer, x: F.linear(x, *layer.held)),
    "a product": (nn.Linear, lambda layer, x: x @ layer.fc.weight.T + layer.fc.bias),
    "addmm": (
        nn.Linear,
        lambda layer, x: torch.addmm(layer.fc.bias, x.flatten(0, 1), layer.fc.weight.t()).unflatten(0, x.shape[:2]),
    ),
    "twice": (nn.Linear, lambda layer, x: layer.fc(x) * layer.fc(x.flip(1))),
    "a tied weight": (nn.Linear, lambda layer, x: layer.fc(x) - layer.other(x.flip(1))),
    "a weight looked up": (
        nn.Linear,
        lambda layer, x: layer.fc(x + F.embedding((x.sum(-1) > 0).long(), layer.fc.weight)),
    ),
    "an embedding": (lambda i, o: nn.Embedding(3, o), looked_up),
    "an embedding as a head": (lambda i, o: nn.Embedding(o, i), lambda layer, x: F.linear(x, layer.fc.weight)),
    "a convolution": (lambda i, o: nn.Conv1d(i, o, 3, padding=1), by_columns(plain)),
    "a circular convolution": (lambda i, o: nn.Conv1d(i, o, 3, padding=1, padding_mode="circular"), by_columns(plain)),
    "an image": (
        lambda i, o: nn.Conv2d(i, o, (3, 1), padding=(1, 0)),
        by_columns(lambda layer, x: layer.fc(torch.stack([x, x.flip(2)], -1)).mean(-1)),
    ),
    "a forward hook": (nn.Linear, plain),
    "a forward pre-hook": (nn.Linear, plain),
    "a hook with keywords": (nn.Linear, plain),
    "a full backward hook": (nn.Linear, plain),
    "a full backward pre-hook": (nn.Linear, plain),
    "a hook on the output": (nn.Linear, hooked_output),
    "writes": (nn.Linear, in_place),
    "a buffer that counts": (nn.Linear, counted),
    "a batch norm": (nn.Linear, normed),
    "a cache": (nn.Linear, kept),
    "a branch": (nn.Linear, branched),
    "a checkpoint": (nn.Linear, lambda layer, x: checkpoint(layer.fc, x, use_reentrant=False)),
    "a re-entrant checkpoint": (
        nn.Linear,
        lambda layer, x: checkpoint(lambda y: layer.fc(y).relu(), x, use_reentrant=True),
    ),
    "functional_call": (nn.Linear, functional),
    "vmap": (nn.Linear, lambda layer, x: vmap(layer.fc)(x)),
    "vmap over the bare weight": (nn.Linear, lambda layer, x: vmap(lambda row: F.linear(row, layer.fc.weight))(x)),
    "nothing and one": (
        nn.Linear,
        lambda layer, x: torch.cat([layer.fc(x[:, :0]), layer.fc(x[:, :1]), layer.fc(x)[:, 1:]], 1),
    ),
    "a dataclass": (nn.Linear, lambda layer, x: Output(layer.fc(x)).value),
    "a named tuple": (nn.Linear, lambda layer, x: sum(Pair(layer.fc(x), layer.fc(x) ** 2))),
    "slices of the weight": (
        nn.Linear,
        lambda layer, x: torch.cat([F.linear(x, layer.fc.weight[:1]), F.linear(x, layer.fc.weight[1:])], -1),
    ),
    "chunks of the weight": (
        nn.Linear,
        lambda layer, x: torch.cat([F.linear(x, weight) for weight in layer.fc.weight.split(1)], -1),
    ),
    "rows apart": (nn.Linear, lambda layer, x: torch.stack([layer.fc(row) for row in x])),
    "tokens apart": (nn.Linear, lambda layer, x: torch.stack([layer.fc(token) for token in x.unbind(1)], 1)),
    "one row": (nn.Linear, lambda layer, x: layer.fc(x[0]) + layer.fc(x)),
    "a recurrence": (nn.Linear, lambda layer, x: torch.stack(list(states(layer, x)), 1)),
}

# These change something when they run, which a checkpoint has them do twice.
CHANGES_ITSELF = {"a buffer that counts", "a batch norm", "a cache"}
# These read their weight in a way that only a graph of the layer shows, and these roads lead past all that is called.
ODD_READS = {"a product", "addmm", "slices of the weight", "chunks of the weight"}
HIDDEN = {"bound methods", "a mapping proxy", "a registry", "an object of one's own"}
# Of these, a row is not what it would be in another batch, or nobody can tell by sites which rows are which.
MIXES_ROWS = {
    *ODD_READS,
    "a hook with keywords",
    "writes",
    "a buffer that counts",
    "a batch norm",
    "a cache",
    "a branch",
    "a recurrence",
    "rows apart",
    "one row",
    "tokens apart",
    "vmap",
    "vmap over the bare weight",
}


def states(layer: Layer, x: Tensor) -> Iterator[Tensor]:
    state = torch.zeros_like(layer.fc(x[:, 0]))
    for token in x.unbind(1):
        state = torch.tanh(layer.fc(token) + 0.5 * state)
        yield state


# --- roads: how what a nest holds leads to its parts -----------------------------------------------------------------


class Slotted:
    """An object without a dict."""

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


def down(modules: list[nn.Module], x: Tensor) -> Tensor:
    """The same, recursively."""
    return down(modules[1:], modules[0](x)) if modules else x


def registered(modules: list[nn.Module]) -> int:
    REGISTRY[id(modules)] = modules
    return id(modules)


ROADS: dict[str, tuple[Callable[[list[nn.Module]], Any], Callable[[Any, Tensor], Tensor]]] = {
    "a list": (lambda ms: ms, run),
    "a recursion": (lambda ms: ms, down),
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
    "a checkpoint": (lambda ms: ms, lambda held, x: checkpoint(run, held, x, use_reentrant=False)),
}


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


# --- plans: nets as values -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A layer's kind and outputs, or a nest's parts, road and how they are named."""

    kind: str = ""
    outputs: int = 0
    parts: tuple[Plan, ...] = ()
    road: str = ""
    named: bool = False

    def build(self, inputs: int) -> nn.Module:
        """The net, in float64, always with the same values."""
        torch.manual_seed(0)
        return self._build(inputs)[0].double()

    def __contains__(self, kind: str) -> bool:
        return kind == self.kind or any(kind in part for part in self.parts)

    @property
    def is_served(self) -> bool:
        """Whether torch's own gradients are right, and lorafx has an answer that is no error.

        Wrong they are where a checkpoint runs again what changes itself. Refused is a weight that is read in an odd
        way where nobody is told which part of the model runs.
        """
        unlike = CHANGES_ITSELF if self.road == "a checkpoint" else ODD_READS if self.road in HIDDEN else ()
        return not any(kind in self for kind in unlike) and all(part.is_served for part in self.parts)

    def _build(self, inputs: int) -> tuple[nn.Module, int]:
        """The module, and the width of what it gives."""
        if not self.parts:
            return Layer(self.kind, inputs, self.outputs), self.outputs
        modules = []
        for part in self.parts:
            module, inputs = part._build(inputs)
            modules.append(module)
        return Nest(modules, self.road, self.named), inputs


def plans(kinds: list[str]) -> st.SearchStrategy[Plan]:
    """Nets of layers of these kinds."""
    layers = st.builds(Plan, kind=st.sampled_from(kinds), outputs=st.integers(2, 5))

    def nests(inside: st.SearchStrategy[Plan]) -> st.SearchStrategy[Plan]:
        parts = st.lists(inside, min_size=1, max_size=3).map(tuple)
        return st.builds(Plan, parts=parts, road=st.sampled_from(sorted(ROADS)), named=st.booleans())

    return nests(st.recursive(layers, nests, max_leaves=4)).filter(lambda plan: plan.is_served)

"""Random models: small graphs of layers with shared modules, tied weights and joins. No layer but a norm is square."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTHS = (4, 5, 6, 9, 12)
KINDS = ("linear", "addmm", "embedding", "conv1d", "conv1d_same", "conv2d", "norm")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "tanh": torch.tanh,
}
NAMES = ("proj", "inner.proj", "inner.block.proj", "fc", "inner.fc", "layers.0.fc", "layers.1.fc", "layers.1.out")


@dataclass(frozen=True)
class Layer:
    """One layer of a random model: (…, inputs) -> (…, outputs). `kind` is one of `KINDS`, `groups` a convolution's.

    `of` is the path of an earlier layer: `share="weight"` ties the two weights, `share="module"` makes this path a
    second name of the earlier module.
    """

    path: str
    kind: str
    inputs: int
    outputs: int
    bias: bool = True
    groups: int = 1
    of: str = ""
    share: str = ""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of a weight that can be tied to one of another kind; empty for a kind whose weight cannot."""
        shapes = {
            "linear": (self.outputs, self.inputs),
            "addmm": (self.inputs, self.outputs),
            "embedding": (self.inputs, self.outputs),
        }
        return shapes.get(self.kind, ())

    def make(self) -> nn.Module:
        """A new module of this kind, whose values `RandomModel.build` sets."""
        i, o, groups, bias = self.inputs, self.outputs, self.groups, self.bias
        makers: dict[str, Callable[[], nn.Module]] = {
            "linear": lambda: nn.Linear(i, o, bias=bias),
            "addmm": lambda: Conv1D(o, i),
            "embedding": lambda: nn.Embedding(i, o, padding_idx=1),
            "conv1d": lambda: nn.Conv1d(i, o, 3, padding=2, dilation=2, groups=groups, bias=bias),
            "conv1d_same": lambda: nn.Conv1d(i, o, 3, padding="same", groups=groups, bias=bias),
            "conv2d": lambda: nn.Conv2d(i, o, (3, 1), stride=(1, 2), padding=(1, 0), groups=groups, bias=bias),
            "norm": lambda: nn.LayerNorm(i),
        }
        return makers[self.kind]()

    def run(self, module: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
        """(batch, length, inputs) -> (batch, length, outputs); an embedding looks up `ids`, modulo its rows."""
        if self.kind == "embedding":
            return module(ids % self.inputs)
        if self.kind.startswith("conv1d"):
            return module(x.transpose(1, 2)).transpose(1, 2).contiguous()
        if self.kind == "conv2d":
            image = torch.stack([x, x.flip(1), -x], -1).transpose(1, 2)  # (batch, inputs, length, 3)
            return module(image).mean(-1).transpose(1, 2).contiguous()
        return module(x)


@dataclass(frozen=True)
class Step:
    """One step of a random model: a layer's path, an activation or a join, and the numbers of the values it reads.

    Value 0 is the input x, and value n what the n-th step gave.
    """

    op: str
    reads: tuple[int, ...]


class Dag(nn.Module):
    """The module of a random model: runs its steps in order and concatenates the values that no step reads."""

    def __init__(self, layers: tuple[Layer, ...], steps: tuple[Step, ...]):
        super().__init__()
        self.layers_by_path = {layer.path: layer for layer in layers}
        self.steps = steps
        read = {index for step in steps for index in step.reads}
        self.ends = [index for index in range(1, len(steps) + 1) if index not in read]
        for layer in layers:
            _place(self, layer)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(self._run(step, [values[i] for i in step.reads], ids))
        return torch.cat([values[i] for i in self.ends], -1)

    def _run(self, step: Step, read: list[Tensor], ids: Tensor) -> Tensor:
        if step.op in ACTIVATIONS:
            return ACTIVATIONS[step.op](read[0])
        if step.op in ("add", "gate"):
            return read[0] + read[1] if step.op == "add" else read[0] * torch.sigmoid(read[1])
        return self.layers_by_path[step.op].run(self.get_submodule(step.op), read[0], ids)


def _place(root: nn.Module, layer: Layer) -> None:
    """Hang a layer's module at its path; the modules above it are plain containers."""
    *parents, last = layer.path.split(".")
    owner = root
    for atom in parents:
        if atom not in owner._modules:
            owner.add_module(atom, nn.Module())
        owner = owner.get_submodule(atom)
    module = root.get_submodule(layer.of) if layer.share == "module" else layer.make()
    if layer.share == "weight":
        module.weight = root.get_submodule(layer.of).weight
    owner.add_module(last, module)


@dataclass(frozen=True)
class RandomModel:
    """A random model as a value; its repr is the whole recipe. `model` is the module, `inputs` arguments for it.

    `width` is that of the input x.
    """

    width: int
    layers: tuple[Layer, ...]
    steps: tuple[Step, ...]
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def build(self) -> nn.Module:
        """A new module in eval mode, with random values by `seed`: weights of variance 1 / fan-in, small biases."""
        model = Dag(self.layers, self.steps)
        rng = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(_start(name, parameter, rng))
        return model.to(self.dtype).eval()

    @cached_property
    def model(self) -> nn.Module:
        """The module, built at the first access."""
        return self.build()

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments: `ids` (batch, length) and `x` (batch, length, width) of sizes that vary with the seed."""
        rng = torch.Generator().manual_seed(seed)
        batch, length = 2 + seed % 2, 2 + seed % 5
        ids = torch.randint(0, 1000, (batch, length), generator=rng)
        return {"ids": ids, "x": torch.randn(batch, length, self.width, generator=rng).to(self.dtype)}


def _start(name: str, parameter: Tensor, rng: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=rng)
    if name.endswith("bias"):
        return 0.1 * noise
    if parameter.ndim == 1:  # a norm's weight
        return 1 + 0.1 * noise
    return noise / math.sqrt(parameter[0].numel())


@st.composite
def models(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    kinds: Sequence[str] = KINDS,
    widths: Sequence[int] = WIDTHS,
    max_steps: int = 6,
    sharing: bool = True,
) -> RandomModel:
    """Random models: a DAG of layers, activations and joins. No layer but a norm is square.

    `kinds` are the layers to choose from, `widths` their numbers of features; at least one layer is no norm. `sharing`
    lets modules run twice, have two names, and tie their weights, across kinds too.
    """
    draft = _Draft(draw, tuple(kinds), tuple(widths))
    draft.new_layer(tuple(kind for kind in kinds if kind != "norm"))
    for _ in range(draw(st.integers(0, max_steps - 1))):
        actions = (*draft.actions, *(draft.sharing if sharing else ()))
        draw(st.sampled_from([action for action, possible in actions if possible]))()
    return draft.finish(draw(st.sampled_from(dtypes)), draw(st.integers(0, 99)))


class _Draft:
    """A random model that is being drawn: its layers, its steps, and the width of each value so far."""

    def __init__(self, draw: st.DrawFn, kinds: tuple[str, ...], widths: tuple[int, ...]):
        self.draw, self.kinds, self.choices = draw, kinds, widths
        self.layers: list[Layer] = []
        self.steps: list[Step] = []
        self.widths = [draw(st.sampled_from(widths))]

    def finish(self, dtype: torch.dtype, seed: int) -> RandomModel:
        return RandomModel(self.widths[0], tuple(self.layers), tuple(self.steps), dtype, seed)

    @property
    def actions(self) -> tuple[tuple[Callable[[], None], Any], ...]:
        return (self.new_layer, True), (self.activate, True), (self.join, self._pairs())

    @property
    def sharing(self) -> tuple[tuple[Callable[[], None], Any], ...]:
        named = [layer for layer in self.layers if not layer.share]
        return (self.again, self._fitting()), (self.tie, any(la.weight_shape for la in named)), (self.rename, named)

    def new_layer(self, kinds: tuple[str, ...] = ()) -> None:
        kind = self.draw(st.sampled_from(kinds or self.kinds))
        source = self.draw(st.sampled_from(range(len(self.widths))))
        inputs = 11 if kind == "embedding" else self.widths[source]
        outputs = inputs if kind == "norm" else self.draw(st.sampled_from([w for w in self.choices if w != inputs]))
        groups = self._groups(math.gcd(inputs, outputs)) if kind.startswith("conv") else 1
        self._add(Layer(self._path(kind), kind, inputs, outputs, self._bias(kind), groups), source)

    def activate(self) -> None:
        source = self.draw(st.sampled_from(range(len(self.widths))))
        self._step(self.draw(st.sampled_from(sorted(ACTIVATIONS))), (source,), self.widths[source])

    def join(self) -> None:
        pair = self.draw(st.sampled_from(self._pairs()))
        self._step(self.draw(st.sampled_from(["add", "gate"])), pair, self.widths[pair[0]])

    def again(self) -> None:
        """Run a layer a second time, on another value or the same."""
        layer, source = self.draw(st.sampled_from(self._fitting()))
        self._step(layer.path, (source,), layer.outputs)

    def rename(self) -> None:
        """Give a module a second name and run it under that."""
        layer = self.draw(st.sampled_from([la for la in self.layers if not la.share]))
        self._share(layer, layer.kind, layer.inputs, layer.outputs, layer.bias, "module")

    def tie(self) -> None:
        """A new layer whose weight is an earlier one's, of the same or another kind."""
        layer = self.draw(st.sampled_from([la for la in self.layers if la.weight_shape and not la.share]))
        rows, columns = layer.weight_shape
        kind = self.draw(st.sampled_from(("linear", "addmm", "embedding")))
        inputs, outputs = (columns, rows) if kind == "linear" else (rows, columns)
        self._share(layer, kind, inputs, outputs, self._bias(kind), "weight")

    def _share(self, layer: Layer, kind: str, inputs: int, outputs: int, bias: bool, share: str) -> None:
        shared = Layer(self._path(kind), kind, inputs, outputs, bias, layer.groups, layer.path, share)
        sources = [i for i, width in enumerate(self.widths) if kind == "embedding" or width == inputs]
        if sources:
            self._add(shared, self.draw(st.sampled_from(sources)))

    def _add(self, layer: Layer, source: int) -> None:
        self.layers.append(layer)
        self._step(layer.path, (source,), layer.outputs)

    def _step(self, op: str, reads: tuple[int, ...], width: int) -> None:
        self.steps.append(Step(op, reads))
        self.widths.append(width)

    def _path(self, kind: str) -> str:
        """A name that is not taken; some names end in others, as in real models."""
        taken = {layer.path for layer in self.layers}
        free = [name for name in NAMES if name not in taken] if kind != "norm" else []
        return self.draw(st.sampled_from(free)) if free else f"{kind}_{len(self.layers)}"

    def _bias(self, kind: str) -> bool:
        return kind in ("addmm", "norm") or (kind != "embedding" and self.draw(st.booleans()))

    def _groups(self, common: int) -> int:
        return self.draw(st.sampled_from([g for g in range(1, common + 1) if common % g == 0]))

    def _pairs(self) -> list[tuple[int, int]]:
        indices = range(len(self.widths))
        return [(a, b) for a, b in itertools.combinations(indices, 2) if self.widths[a] == self.widths[b]]

    def _fitting(self) -> list[tuple[Layer, int]]:
        return [
            (layer, source)
            for layer in self.layers
            for source, width in enumerate(self.widths)
            if layer.kind != "embedding" and layer.inputs == width
        ]

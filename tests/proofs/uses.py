"""All that can be done with an adapter, for kinds, storages and readings that lorafx did not bring along."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorafx
from lorafx.graph.blocks import blocks_of
from lorafx.tree.lookup import tensor_at

FLAT = lorafx.passes.default.without("outline_blocks", "checkpoint_blocks")
WAYS = ({"capture": "sites"}, {"backend": "aot_eager"}, {"pipeline": FLAT})


class Layers(nn.Module):
    """(…, n) -> (…, n): equal layers one after another, each added to what it was given."""

    def __init__(self, make: Callable[[], nn.Module], depth: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Pair(nn.Module):
    """(…, 5) -> (…, 5): two linear layers, neither of them square."""

    def __init__(self, linear: Callable[[int, int], nn.Module] = nn.Linear):
        super().__init__()
        self.up, self.down = linear(5, 7), linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def of_layers(
    adapted: Callable[[Any, Tensor], Tensor],
) -> Callable[[lorafx.AdaptedModel, Tensor], Tensor]:
    """What `Layers` of `Pair`s compute whose linear layers compute what `adapted(layer, x)` says."""

    def formula(lora: Any, x: Tensor) -> Tensor:
        for layer in lora.layers:
            x = x + torch.tanh(adapted(layer.down, torch.relu(adapted(layer.up, x))))
        return x

    return formula


def randomize(lora: lorafx.AdaptedModel, name: str = "default") -> None:
    """Give an adapter values that make a difference."""
    with torch.no_grad():
        for path in lora._lorafx.adapters[name].paths:
            if isinstance(tensor := tensor_at(lora, path), nn.Parameter):  # what is fixed stays
                tensor.add_(torch.randn_like(tensor) / 4)


def bits(model: nn.Module) -> dict[str, bytes]:
    state = {name: tensor.detach().reshape(-1) for name, tensor in model.state_dict().items()}
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


def hold(
    build: Callable[[], nn.Module],
    config: object,
    x: Tensor,
    formula: Callable[[lorafx.AdaptedModel, Tensor], Tensor],
    folder: Path,
    *,
    merges_to: float | None = 1e-12,
    blocks: bool = True,
) -> None:
    """Adapt a model of equal layers and use it in every way; `formula` says what it computes.

    `merges_to` is how near the merged model comes to that: 1e-12 in float64, less near for a storage that rounds.
    `blocks` says that the model's layers are equal.
    """
    torch.manual_seed(0)
    base = build()
    untouched, plain = bits(base), base(x)
    lora = lorafx.compile(base, config, capture="graph")
    randomize(lora)
    expected = formula(lora, x)
    assert (expected - plain).abs().max() > 0.01, "the adapter makes a difference"
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(lora(x), expected, **close)
    assert not blocks or blocks_of(lora.graph(x)), "equal layers share a block"
    lora.save_pretrained(folder)
    gradients = torch.autograd.grad(formula(lora, x).square().sum(), trained(lora))
    ways = [lorafx.load(build_like(build, base), folder, is_trainable=True, **options) for options in WAYS]
    for each in (lora, *ways):
        y = each(x)
        torch.testing.assert_close(y, expected, **close)
        y.square().sum().backward()
        for parameter, gradient in zip(trained(each), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-10)

    lora.merge_adapter()
    torch.testing.assert_close(base(x), expected, rtol=merges_to, atol=merges_to)
    torch.testing.assert_close(lora(x), expected, rtol=merges_to, atol=merges_to)
    lora.unmerge_adapter()
    assert bits(base) == untouched
    torch.testing.assert_close(lora(x), expected, **close)
    assert lora.unload() is base and bits(base) == untouched
    torch.testing.assert_close(base(x), plain, rtol=0, atol=0)


def trained(lora: lorafx.AdaptedModel) -> list[Tensor]:
    return [parameter for parameter in lora.parameters() if parameter.requires_grad]


def build_like(build: Callable[[], nn.Module], base: nn.Module) -> nn.Module:
    """Another base model with the same weights."""
    other = build()
    other.load_state_dict(base.state_dict())
    return other

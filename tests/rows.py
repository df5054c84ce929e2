"""Models with several adapters, of which each row of a batch has one; and the same calls made an adapter at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import lorafx
from lorafx.serving import early_calls

BASE = "__base__"


def with_adapters(base: torch.nn.Module, configs: dict[str, dict[str, Any]], **options: Any) -> lorafx.AdaptedModel:
    """The base with an adapter for each of these configs, with random values, all of them active and in training."""
    names = list(configs)
    settings = {name: {"init_lora_weights": False, **config} for name, config in configs.items()}
    lora = lorafx.compile(base, settings[names[0]], adapter_name=names[0], random_state=0, **options)
    for number, name in enumerate(names[1:], 1):
        lorafx.of(lora).add_adapter(name, settings[name], random_state=number)
    if not any(adapter.replaced for adapter in lora._lorafx.adapters.values()):
        lorafx.of(lora).set_adapter(names)
    return lora


def first(result: Any) -> Tensor:
    """The tensor to compare of what a model gives."""
    return result if torch.is_tensor(result) else result.logits if "logits" in result else result[0]


def one_by_one(lora: lorafx.AdaptedModel, names: list[str], call: dict[str, Tensor]) -> Tensor:
    """What a call gives if each row is given alone to its adapter."""
    return torch.cat(list(each_alone(lora, names, call)))


def each_alone(lora: lorafx.AdaptedModel, names: list[str], call: dict[str, Tensor]) -> Iterator[Tensor]:
    """The same row by row, each while its adapter is the one that acts; without a graph for each of them."""
    active = lorafx.of(lora).active_adapters
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in call.items()}
        if name == BASE:
            with lorafx.of(lora).disable_adapter():
                yield _early(lora, own)
        else:
            lorafx.of(lora).set_adapter(name)
            yield _early(lora, own)
    lorafx.of(lora).set_adapter(active)


def _early(lora: lorafx.AdaptedModel, call: dict[str, Tensor]) -> Tensor:
    with mock.patch.object(early_calls, "REPEATS", 1000):
        return first(lora(**call))


def assert_each_alone(lora: lorafx.AdaptedModel, names: list[str], call: dict[str, Tensor], **more: Any) -> None:
    """Each row is what it is if it is given alone to its adapter, up to rounding; and no row is another's."""
    with torch.no_grad():
        found, expected = first(lora(**call, **more, adapter_names=names)), one_by_one(lora, names, call)
    eps = torch.finfo(expected.dtype).eps
    limit = 512 * eps * expected.abs().max()  # some hundred additions
    torch.testing.assert_close(found, expected, rtol=0, atol=float(limit))
    for row, name in enumerate(names):
        for other in {*lora._lorafx.adapters, BASE} - {name}:
            own = {key: value[row : row + 1] for key, value in call.items()}
            with torch.no_grad():
                wrong = one_by_one(lora, [other], own)
            assert (found[row : row + 1] - wrong).abs().max() > 8 * limit, (row, name, other)

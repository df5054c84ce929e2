"""LoRA with `trainable_token_indices`: at most sites LoRA, and at some embeddings rows that train.

Each site has the equation of one of the two kinds (`lora.py`, `trainable_tokens.py`). `trainable_token_indices` is a
list of the tokens of the model's input embedding, or one list for each module by the ending of its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ..config import is_named
from ..site import Selection, Site
from .kind import Kind, Operands, Spec
from .lora import Lora
from .lora_config import LoraConfig
from .trainable_tokens import TrainableTokens, TrainableTokensConfig

LORA, TOKENS = Lora(), TrainableTokens()
BELOW = "token_adapter."  # where PEFT's files have tokens' rows, beside LoRA


class LoraWithTokens(Kind):
    """What `trainable_token_indices` makes of LoRA; see the module's docstring."""

    config = LoraConfig
    starts_from_weight = True
    saves_embeddings = False

    def serves(self, config: LoraConfig) -> bool:
        return bool(config.trainable_token_indices)

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        return _kind(at).after(y, x, at)

    def fused(self, x: Any, at: Operands) -> Any | None:
        return _kind(at).fused(x, at)

    def transposed(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        return (TOKENS if "rows" in tensors else LORA).transposed(tensors)

    def merged(self, name: str, base: Tensor, at: Operands) -> Tensor:
        return _kind(at).merged(name, base, at)

    def unmerged(self, name: str, merged: Tensor, at: Operands) -> Tensor | None:
        return _kind(at).unmerged(name, merged, at)

    def changes(self, site: Site, config: LoraConfig) -> tuple[str, ...]:
        kind, own = _of(site, config)
        return kind.changes(site, own)

    def check(self, site: Site, config: LoraConfig) -> None:
        kind, own = _of(site, config)
        kind.check(site, own)
        if config.use_dora:
            raise ConfigError("`trainable_token_indices` has no `use_dora` beside it yet; leave one of them out")
        if kind is TOKENS and _is_target(site, config):
            raise ConfigError(
                f"{site.name} is in `target_modules` and in `trainable_token_indices`; leave it out of one of them"
            )

    def remarks(self, selection: Selection, config: LoraConfig) -> Iterator[str]:
        yield from LORA.remarks(Selection(tuple(s for s in selection if _of(s, config)[0] is LORA)), config)

    def tensors(self, site: Site, config: LoraConfig) -> dict[str, Spec]:
        kind, own = _of(site, config)
        below = BELOW if kind is TOKENS else ""
        return {name: spec._replace(suffix=f"{below}{spec.suffix}") for name, spec in kind.tensors(site, own).items()}

    def numbers(self, site: Site, config: LoraConfig) -> dict[str, float]:
        kind, own = _of(site, config)
        return kind.numbers(site, own)

    def takes_from_base(self, site: Site, config: LoraConfig) -> bool:
        kind, own = _of(site, config)
        return kind.takes_from_base(site, own)

    def init(
        self,
        site: Site,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> Tensor | None:
        kind, own = _of(site, config)
        return kind.init(site, own, tensors, rng, weight)


def _kind(at: Operands) -> Kind:
    return TOKENS if "rows" in at.tensors else LORA


def _of(site: Site, config: LoraConfig) -> tuple[Kind, Any]:
    """The kind at a site, and its config."""
    given = config.trainable_token_indices
    if isinstance(given, Mapping):
        names = site.named, *site.tied
        tokens = next((given[key] for key in given if any(is_named((key,), name) for name in names)), None)
    else:  # of the model's input embedding, which is a site for this alone
        tokens = given if site.reading.lookup and not _is_target(site, config) else None
    return (LORA, config) if tokens is None else (TOKENS, TrainableTokensConfig(token_indices=tuple(tokens)))


def _is_target(site: Site, config: LoraConfig) -> bool:
    return is_named(config.target_modules, site.named)  # type: ignore[arg-type]

"""LoRA, or a variant of it, with `trainable_token_indices`: at most sites LoRA, and at some embeddings rows that train.

Each site has the equation of one of the two kinds (`lora.py`, `trainable_tokens.py`). `trainable_token_indices` is a
list of the tokens of the model's input embedding, or one list for each module by the ending of its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ..config import is_named
from ..site import Selection, Site
from .bdlora import BdLora
from .dora import Dora
from .kasa import Kasa
from .kind import Kind, Operands, Spec
from .lora import Lora
from .lora_config import LoraConfig
from .mica import Mica
from .monteclora import Monteclora
from .qalora import QaLora
from .trainable_tokens import TrainableTokens, TrainableTokensConfig
from .velora import Velora

TOKENS = TrainableTokens()
BELOW = "token_adapter."  # where PEFT's files have tokens' rows, beside LoRA


class LoraWithTokens(Kind):
    """What `trainable_token_indices` makes of LoRA; see the module's docstring."""

    config = LoraConfig
    starts_from_weight = True
    saves_embeddings = False
    beside: ClassVar[Lora] = Lora()  # the kind at the other sites

    def serves(self, config: LoraConfig) -> bool:
        return bool(config.trainable_token_indices) and self.beside.serves(config)

    def before(self, x: Any, at: Operands) -> Any:
        return self._kind(at).before(x, at)

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        return self._kind(at).after(y, x, at)

    def fused(self, x: Any, at: Operands) -> Any | None:
        return self._kind(at).fused(x, at)

    def transposed(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        return (TOKENS if "rows" in tensors else self.beside).transposed(tensors)

    def merged(self, name: str, base: Tensor, at: Operands) -> Tensor:
        return self._kind(at).merged(name, base, at)

    def unmerged(self, name: str, merged: Tensor, at: Operands) -> Tensor | None:
        return self._kind(at).unmerged(name, merged, at)

    def changes(self, site: Site, config: LoraConfig) -> tuple[str, ...]:
        kind, own = self._of(site, config)
        return kind.changes(site, own)

    def check(self, site: Site, config: LoraConfig) -> None:
        kind, own = self._of(site, config)
        kind.check(site, own)
        if len({tuple(tokens) for tokens in _given(site, config)}) > 1:
            raise ConfigError(
                f"{site.name} is tied to {', '.join(site.tied)}, and `trainable_token_indices` has other tokens for "
                "these: give it the same ones, or none"
            )

    def remarks(self, selection: Selection, config: LoraConfig) -> Iterator[str]:
        beside = Selection(tuple(site for site in selection if self._of(site, config)[0] is not TOKENS))
        yield from self.beside.remarks(beside, config)

    def tensors(self, site: Site, config: LoraConfig) -> dict[str, Spec]:
        kind, own = self._of(site, config)
        below = BELOW if kind is TOKENS else ""
        return {name: spec._replace(suffix=f"{below}{spec.suffix}") for name, spec in kind.tensors(site, own).items()}

    def numbers(self, site: Site, config: LoraConfig) -> dict[str, float]:
        kind, own = self._of(site, config)
        return kind.numbers(site, own)

    def repeats(self, site: Site, config: LoraConfig) -> bool:
        kind, own = self._of(site, config)
        return kind.repeats(site, own)

    def takes_from_base(self, site: Site, config: LoraConfig) -> bool:
        kind, own = self._of(site, config)
        return kind.takes_from_base(site, own)

    def penalty(self, config: LoraConfig, sites: Iterable[Mapping[str, Tensor]]) -> Tensor | None:
        return self.beside.penalty(config, [tensors for tensors in sites if "rows" not in tensors])

    def init(
        self,
        site: Site,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> Tensor | None:
        kind, own = self._of(site, config)
        return kind.init(site, own, tensors, rng, weight)

    def combined_config(self, configs: Sequence[LoraConfig], selections: Sequence[Selection], how: Any) -> LoraConfig:
        raise ConfigError(
            "adapters with `trainable_token_indices` cannot be combined into one: rows that train take the places of "
            "others, and are not added; PEFT leaves them out without a word"
        )

    def _kind(self, at: Operands) -> Kind:
        return TOKENS if "rows" in at.tensors else self.beside

    def _of(self, site: Site, config: LoraConfig) -> tuple[Kind, Any]:
        """The kind at a site, and its config."""
        given = config.trainable_token_indices
        if isinstance(given, Mapping):
            tokens = next(iter(_given(site, config)), None)
        else:  # of the model's input embedding, which is a site for this alone
            tokens = given if site.reading.lookup and not _is_target(site, config) else None
        if tokens is None:
            return self.beside, config
        return TOKENS, TrainableTokensConfig(token_indices=tuple(tokens))


class DoraWithTokens(LoraWithTokens):
    """The same with `use_dora`, whose equation needs the weight."""

    reads_weight = True
    beside = Dora()

    def check(self, site: Site, config: LoraConfig) -> None:
        super().check(site, config)
        if site.tied and self._of(site, config)[0] is self.beside:
            raise ConfigError(f"{site.name} is tied to {site.tied[0]}, and `use_dora` is for one of both; exclude it")


def _given(site: Site, config: LoraConfig) -> list[Any]:
    """The lists of tokens that a dict has for a site, by any of its names."""
    given, names = config.trainable_token_indices, (site.named, *site.tied)
    named = given if isinstance(given, Mapping) else {}
    return [tokens for key, tokens in named.items() if any(is_named((key,), name) for name in names)]


def _is_target(site: Site, config: LoraConfig) -> bool:
    return is_named(config.target_modules, site.named)  # type: ignore[arg-type]


def _beside(kind: type[Lora]) -> type[LoraWithTokens]:
    """The same beside a variant of LoRA."""
    said = {name: getattr(kind, name) for name in ("adds_penalty", "only_beside_its_own", "derives")}
    return type(f"{kind.__name__}WithTokens", (LoraWithTokens,), {"beside": kind(), **said})


_VARIANTS: tuple[type[Lora], ...] = (BdLora, QaLora, Kasa, Mica, Monteclora, Velora)
WITH_TOKENS: tuple[type[LoraWithTokens], ...] = (LoraWithTokens, DoraWithTokens, *map(_beside, _VARIANTS))

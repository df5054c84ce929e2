"""Activated LoRA (Greenewald et al., 2025, arXiv 2504.12397, section 3): LoRA that acts on a row's last tokens alone.

    y = x Wᵀ + b + m · s · (dropout(x) Aᵀ) Bᵀ        m = 1 from the last occurrence of an invocation on, 0 before

`alora_invocation_tokens` is the invocation. Tokens before it, and rows without it, are the base's, so that a cache of
them can be shared with the base. Which tokens these are is decided for each call (`model/activation.py`); to equations
they are tokens that have chosen the adapter, as rows choose theirs (`adapters/by_row.py`).
"""

from __future__ import annotations

from ...errors import ConfigError, MergeError
from ..site import Site
from .kind import require_linear
from .lora import Lora
from .lora_config import LoraConfig


class ActivatedLora(Lora):
    """What `alora_invocation_tokens` makes of LoRA; see the module's docstring for its equation."""

    variant = "alora_invocation_tokens"
    additive = False

    def invocation(self, config: LoraConfig) -> tuple[int, ...]:
        return tuple(config.alora_invocation_tokens)

    def check(self, site: Site, config: LoraConfig) -> None:
        super().check(site, config)
        require_linear(site, config)
        for name in ("trainable_token_indices", "target_parameters", "modules_to_save", "lora_bias"):
            if getattr(config, name):
                raise ConfigError(f"`alora_invocation_tokens` has an adapter act on some tokens, and `{name}` on all")
        if config.bias != "none" or self.takes_from_base(site, config):
            field = "bias" if config.bias != "none" else "init_lora_weights"
            raise ConfigError(
                f"`alora_invocation_tokens` leaves some tokens to the base, and `{field}={getattr(config, field)!r}` "
                "changes that for all"
            )
        if config.task_type not in (None, "CAUSAL_LM"):
            raise ConfigError(f"`alora_invocation_tokens` is for causal language models, not {config.task_type}")

    def changes(self, site: Site, config: LoraConfig) -> tuple[str, ...]:
        raise MergeError(
            f"{site.name}: an adapter with `alora_invocation_tokens` acts on some tokens alone, which no weight does, "
            "and cannot be merged"
        )

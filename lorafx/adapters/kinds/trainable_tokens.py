"""Trainable tokens: some rows of an embedding are the adapter's own, and train; all others are the base's.

    W' = W with rows `token_indices` replaced by D (tokens, features)

A lookup takes the row of D where it asks for one of these tokens. Where the weight is read by a linear layer, as by a
head that is tied to the embedding, their logits are x Dᵀ. D is made of the base's rows, so that nothing changes at
first. It replaces rows and is not added to them: so it means the same on a base whose new rows were drawn anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..config import AdapterConfig, require
from ..readings import EMBEDDING, LINEAR
from ..site import Site
from .kind import Kind, Operands, Spec

aten = torch.ops.aten


def _check(config: TrainableTokensConfig) -> None:
    tokens = config.token_indices
    fits = isinstance(tokens, tuple) and all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens)
    require(fits and len(set(tokens)) == len(tokens) > 0, "token_indices", tokens, "a list of different token numbers")


@dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(AdapterConfig):
    """The fields of `peft.TrainableTokensConfig`, with its names and defaults.

    Without `target_modules` it is the model's input embedding. Raises `ConfigError` for a value of the wrong type or
    range, naming the field.
    """

    peft_type: str = "TRAINABLE_TOKENS"
    token_indices: Sequence[int] = ()
    init_weights: bool = True

    checks = (_check,)
    tuples = (*AdapterConfig.tuples, "token_indices")
    absent = "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"
    for_embeddings = True


class TrainableTokens(Kind):
    """The kind of trainable tokens; see the module's docstring for its equation."""

    config = TrainableTokensConfig
    starts_from_weight = True
    saves_embeddings = False

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        rows = aten.type_as.default(at.rows, y)
        if at.operator is not None and at.operator.lookup:
            number = aten.index.Tensor(at.row_of, [x])
            own = aten.index.Tensor(rows, [aten.clamp_min.default(number, 0)])
            return aten.where.self(aten.unsqueeze.default(aten.ge.Scalar(number, 0), -1), own, y)
        logits, bias = at.full(x, rows), at.bound.get("bias")
        if bias is not None:
            logits = aten.add.Tensor(logits, aten.index_select.default(bias, 0, at.tokens))
        return aten.index_copy.default(y, -1, at.tokens, logits)

    def merged(self, name: str, base: Tensor, at: Operands) -> Tensor:
        return base.index_copy(0, at.tokens, at.rows)

    def transposed(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The same: which equation it is depends on whether rows are looked up."""
        return dict(tensors)

    def check(self, site: Site, config: TrainableTokensConfig) -> None:
        if site.reading not in (EMBEDDING, LINEAR):
            raise ConfigError(f"{site.name} is read by {site.reading}, and has no rows that are tokens'; exclude it")
        if (last := max(config.token_indices)) >= site.weight_shape[0]:
            raise ConfigError(f"`token_indices` has {last}, and {site.name} has {site.weight_shape[0]} rows")

    def tensors(self, site: Site, config: TrainableTokensConfig) -> dict[str, Spec]:
        (rows, features), count = site.weight_shape, len(config.token_indices)
        numbers = Spec("", (), fixed=True, saved=False, dtype=torch.int64)
        return {
            "rows": Spec("trainable_tokens_delta", (count, features), as_kept=True),
            "tokens": numbers._replace(suffix="trainable_tokens_index", shape=(count,)),
            "row_of": numbers._replace(suffix="trainable_tokens_row", shape=(rows,)),  # of each token, in D; or -1
        }

    def init(
        self,
        site: Site,
        config: TrainableTokensConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        tokens = torch.tensor(config.token_indices)
        tensors["tokens"].copy_(tokens)
        tensors["row_of"].copy_(torch.full(site.weight_shape[:1], -1).index_copy(0, tokens, torch.arange(len(tokens))))
        if not config.init_weights:
            nn.init.normal_(tensors["rows"], generator=rng)
        elif weight is not None and not weight.is_meta:
            tensors["rows"].copy_(weight[tokens])

"""LoRA (Hu et al., 2021, arXiv 2106.09685, section 4.1).

    y = x Wᵀ + b + s · (dropout(x) Aᵀ) Bᵀ        s = α / r, or α / √r with `use_rslora` (arXiv 2312.03732)

A is (r, in) and B is (out, r), so ΔW = s · B A. An embedding looks A's columns up; a convolution takes the base
layer's stride, padding and dilation into A and its groups into B, a 1 x 1 kernel. The update is computed in the
adapter's dtype and the sum is returned in the base operator's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, MergeError
from .. import readings as forms
from ..config import LoraConfig
from ..readings import CONVOLUTIONS, EMBEDDING, IN_PROJ
from ..selection import Site, pattern_value

aten = torch.ops.aten


def linear(x, weight, bias, lora_A, lora_B, lora_bias, scaling, p, training, dtype, result_dtype):
    hidden = aten.linear.default(aten.dropout.default(aten.to.dtype(x, dtype), p, training), lora_A)
    update = aten.mul.Tensor(aten.linear.default(hidden, lora_B, lora_bias), scaling)
    return aten.to.dtype(aten.add.Tensor(aten.linear.default(x, weight, bias), update), result_dtype)


def linear_of_rows(
    x, weight, bias, start, end, lora_A, lora_B, lora_bias, scaling, p, training, dtype, result_dtype
):  # fmt: skip
    hidden = aten.linear.default(aten.dropout.default(aten.to.dtype(x, dtype), p, training), lora_A)
    update = aten.linear.default(hidden, aten.slice.Tensor(lora_B, 0, start, end), lora_bias)
    base = aten.linear.default(x, aten.slice.Tensor(weight, 0, start, end), bias)
    return aten.to.dtype(aten.add.Tensor(base, aten.mul.Tensor(update, scaling)), result_dtype)


def addmm(x, weight, bias, lora_A, lora_B, lora_bias, scaling, p, training, dtype, result_dtype):
    hidden = aten.linear.default(aten.dropout.default(aten.to.dtype(x, dtype), p, training), lora_A)
    update = aten.mul.Tensor(aten.linear.default(hidden, lora_B, lora_bias), scaling)
    return aten.to.dtype(aten.add.Tensor(aten.addmm.default(bias, x, weight), update), result_dtype)


def embedding(ids, weight, padding_idx, scale_grad_by_freq, sparse, lora_A, lora_B, scaling, result_dtype):
    hidden = aten.embedding.default(aten.t.default(lora_A), ids, padding_idx, scale_grad_by_freq, sparse)
    update = aten.mul.Tensor(aten.linear.default(hidden, lora_B), scaling)
    base = aten.embedding.default(weight, ids, padding_idx, scale_grad_by_freq, sparse)
    return aten.to.dtype(aten.add.Tensor(base, update), result_dtype)


# A tied weight may be read in a form that stores it the other way round: ΔW = s · (B A)ᵀ, A and B trade places.


def linear_of_twin(x, weight, bias, lora_A, lora_B, scaling, p, training, dtype, result_dtype):
    a, b = aten.t.default(lora_B), aten.t.default(lora_A)
    return linear(x, weight, bias, a, b, None, scaling, p, training, dtype, result_dtype)


def linear_of_rows_of_twin(
    x, weight, bias, start, end, lora_A, lora_B, scaling, p, training, dtype, result_dtype
):  # fmt: skip
    a, b = aten.t.default(lora_B), aten.t.default(lora_A)
    return linear_of_rows(x, weight, bias, start, end, a, b, None, scaling, p, training, dtype, result_dtype)


def addmm_of_twin(x, weight, bias, lora_A, lora_B, scaling, p, training, dtype, result_dtype):
    a, b = aten.t.default(lora_B), aten.t.default(lora_A)
    return addmm(x, weight, bias, a, b, None, scaling, p, training, dtype, result_dtype)


def embedding_of_twin(ids, weight, padding_idx, scale_grad_by_freq, sparse, lora_A, lora_B, scaling, result_dtype):
    a, b = aten.t.default(lora_B), aten.t.default(lora_A)
    return embedding(ids, weight, padding_idx, scale_grad_by_freq, sparse, a, b, scaling, result_dtype)


@functools.cache
def convolution(pattern: Callable[..., Any]) -> Callable[..., Any]:
    """The equation of one convolution overload."""
    op = pattern.op  # type: ignore[attr-defined]
    pointwise, ones, zeros = op.overloadpacket.default, [1] * pattern.dims, [0] * pattern.dims  # type: ignore

    def conv(
        x, weight, bias, stride, padding, dilation, groups,
        lora_A, lora_B, lora_bias, scaling, p, training, dtype, result_dtype,
    ):  # fmt: skip
        hidden = aten.dropout.default(aten.to.dtype(x, dtype), p, training)
        hidden = op(hidden, lora_A, None, stride, padding, dilation, 1)
        update = aten.mul.Tensor(pointwise(hidden, lora_B, lora_bias, ones, zeros, ones, groups), scaling)
        base = op(x, weight, bias, stride, padding, dilation, groups)
        return aten.to.dtype(aten.add.Tensor(base, update), result_dtype)

    return conv


_EQUATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    forms.linear: linear,
    forms.linear_of_rows: linear_of_rows,
    forms.addmm: addmm,
    forms.embedding: embedding,
}
_OF_TWIN: dict[Callable[..., Any], Callable[..., Any]] = {
    forms.linear: linear_of_twin,
    forms.linear_of_rows: linear_of_rows_of_twin,
    forms.addmm: addmm_of_twin,
    forms.embedding: embedding_of_twin,
}


class Lora:
    """The LoRA kind; see the module's docstring for its equation."""

    peft_type = "LORA"

    def rank(self, site: Site, config: LoraConfig) -> int:
        """r of a site, `rank_pattern` considered."""
        return int(pattern_value(config.rank_pattern, site.named, config.r))

    def scaling(self, site: Site, config: LoraConfig) -> float:
        """s of a site, `alpha_pattern` considered."""
        rank = self.rank(site, config)
        alpha = pattern_value(config.alpha_pattern, site.named, config.lora_alpha)
        return alpha / (math.sqrt(rank) if config.use_rslora else rank)

    def check(self, site: Site, config: LoraConfig) -> None:
        if site.form == EMBEDDING and config.lora_bias:
            raise ConfigError(f"{site.name} is an embedding, which has no `lora_bias`; exclude it or leave it False")
        if site.form == IN_PROJ and config.lora_bias:
            raise ConfigError(
                f"{site.name} packs three weights, which have no `lora_bias`; exclude it or leave it False"
            )
        if self.rank(site, config) % site.groups:
            raise ConfigError(
                f"{site.name} has groups={site.groups}, and rank {self.rank(site, config)} is no multiple of it; "
                "choose another `r` or a `rank_pattern` for it"
            )

    def shapes(self, site: Site, config: LoraConfig) -> dict[str, tuple[int, ...]]:
        r = self.rank(site, config)
        if site.form == EMBEDDING:
            return {"lora_embedding_A": (r, site.in_features), "lora_embedding_B": (site.out_features, r)}
        kernel = site.weight_shape[2:] if site.form in CONVOLUTIONS else ()
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A.weight": (r, site.in_features, *kernel),
            "lora_B.weight": (site.out_features, r // site.groups, *(1 for _ in kernel)),
        }
        return shapes | ({"lora_B.bias": (site.out_features,)} if config.lora_bias else {})

    def init(self, site: Site, config: LoraConfig, tensors: Mapping[str, Tensor], rng: torch.Generator | None) -> None:
        if site.form == EMBEDDING:
            nn.init.normal_(tensors["lora_embedding_B"], generator=rng)
            a = tensors["lora_embedding_A"]
            _ = nn.init.zeros_(a) if config.init_lora_weights else nn.init.normal_(a, generator=rng)
            return
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / self.rank(site, config), generator=rng)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=rng)
        b_fan_in = b[0].numel()
        for tensor in (b, tensors.get("lora_B.bias")):
            if tensor is None:
                continue
            if config.init_lora_weights:
                nn.init.zeros_(tensor)
            else:
                nn.init.uniform_(tensor, -1 / math.sqrt(b_fan_in), 1 / math.sqrt(b_fan_in), generator=rng)

    def equation(self, site: Site, pattern: Callable[..., Any]) -> Callable[..., Any]:
        if site.form in CONVOLUTIONS:
            return convolution(pattern)
        read_as = next(form for form in forms.FORMS if pattern in form.patterns)
        return (_EQUATIONS if read_as.transposed == site.form.transposed else _OF_TWIN)[pattern]

    def scalars(self, site: Site, config: LoraConfig) -> dict[str, Any]:
        return {"scaling": self.scaling(site, config), "p": config.lora_dropout}

    def names(self, site: Site, config: LoraConfig) -> dict[str, str | None]:
        if site.form == EMBEDDING:
            return {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B", "lora_bias": None}
        bias = "lora_B.bias" if config.lora_bias else None
        return {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": bias}

    def delta(self, site: Site, config: LoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if site.groups > 1:
            raise MergeError(
                f"{site.name} is a convolution with groups={site.groups}: A mixes what its groups keep apart, so the "
                "adapter is no change of its weight and cannot be merged"
            )
        a, b, *bias = (tensors[suffix].double() for suffix in self.names(site, config).values() if suffix)
        scaling = self.scaling(site, config)
        product = (b.flatten(1) @ a.flatten(1)).mul_(scaling)
        weight = product.t() if site.form.transposed else product.reshape(site.weight_shape)
        return {"weight": weight} | ({"bias": bias[0] * scaling} if bias else {})

"""MonteCLoRA (Seth et al., 2024, arXiv 2411.04358): LoRA whose A is, in training, an average of noisy ones.

    y = x Wᵀ + b + s · (dropout(x) (A + N)ᵀ) Bᵀ        N = 0 in eval mode, and drawn anew in each call in training:
    N = τ · Σₖ wₖ Zₖ diag(√v)        Zₖ (r, in) of normal numbers; τ = `sample_scaler`
    v = max(e^{2p} ∘ c, 10⁻³)        c (r,) of χ² with r degrees of freedom; p (r,) is `std_prior`
    w = softmax(√d ∘ z + log α - mean(log α))        α = e^q; q (k,) is `expert_weights_prior`, z (k,) of normal numbers
        d = (1 - 2 / k) / α + Σ (1 / α) / k²
    penalty = mean of all sites: λ (KL of α + KL of e^{2p} + KL of v) + Σ w²
        λ = `kl_loss_weight`; the last term with `use_entropy`

c are the numbers on the diagonal of a Wishart matrix, which is all that PEFT uses of it. As in PEFT the penalty is no
part of a call's loss. It draws v and w of its own, where PEFT takes those of the call before: their expectations, and
those of gradients, are the same, and neither a graph nor a checkpoint has anything to hand on. Nothing here depends on
`buffer_size`, so many draws PEFT makes at once; v and w in its files are what it drew last, and are kept as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..site import Site
from .kind import Operands, Spec
from .lora import rank
from .lora_config import LoraConfig
from .lora_factored import FactoredLora, at_least_float32

aten = torch.ops.aten
_SMALL = 1e-6


class Monteclora(FactoredLora):
    """What `monteclora_config` makes of LoRA; see the module's docstring for its equation."""

    variant = "monteclora_config"
    adds_penalty = False

    def factor(self, role: str, tensor: Any, at: Operands) -> Any:
        return tensor if role == "lora_B" or not at.training else aten.add.Tensor(tensor, _noise(tensor, at))

    def tensors(self, site: Site, config: LoraConfig) -> dict[str, Spec]:
        r, k = rank(site, config), config.subconfig(self.variant)["num_samples"]
        shapes = {"std_prior": (r,), "expert_weights_prior": (k,), "gaussian_var_prior": (r, r), "expert_weights": (k,)}
        own = {
            name: Spec(f"lora_monteclora_sampler.{name}", shape, as_kept=True, fixed=name in _LAST)
            for name, shape in shapes.items()
        }
        return super().tensors(site, config) | own

    def init(
        self,
        site: Site,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        super().init(site, config, tensors, rng, weight)
        tensors["std_prior"].uniform_(generator=rng)
        tensors["expert_weights_prior"].uniform_(generator=rng)
        tensors["gaussian_var_prior"].copy_(torch.eye(rank(site, config)))
        tensors["expert_weights"].fill_(1 / len(tensors["expert_weights"]))

    def penalty(self, config: LoraConfig, sites: Iterable[Mapping[str, Tensor]]) -> Tensor | None:
        options, found = config.subconfig(self.variant), []
        for at in sites:
            std, prior = (at_least_float32(at[name]) for name in ("std_prior", "expert_weights_prior"))
            of_site = options["kl_loss_weight"] * _divergence(std, prior, options["dirichlet_prior"])
            found.append(of_site + _shares(prior, len(prior)).square().sum() if options["use_entropy"] else of_site)
        return torch.stack([each.to(found[0].device) for each in found]).mean() if found else None


_LAST = ("gaussian_var_prior", "expert_weights")  # what PEFT drew last


def _noise(a: Any, at: Operands) -> Any:
    """N (r, in), of the dtype of A."""
    k, (r, columns) = at.config.subconfig(Monteclora.variant)["num_samples"], _shape(at)
    variances = _variances(at.std_prior, r)
    samples = _normal(at.std_prior, [k, columns, r])
    shares = aten.view.default(_shares(at.expert_weights_prior, k), [1, k])
    average = aten.view.default(aten.mm.default(shares, aten.view.default(samples, [k, columns * r])), [columns, r])
    scale = aten.mul.Tensor(aten.sqrt.default(variances), at.config.subconfig(Monteclora.variant)["sample_scaler"])
    return aten.type_as.default(aten.t.default(aten.mul.Tensor(average, scale)), a)


def _shape(at: Operands) -> tuple[int, int]:
    return rank(at.site, at.config), at.site.in_features


def _variances(std: Any, r: int) -> Any:
    """v (r,), drawn."""
    drawn = aten.sum.dim_IntList(aten.square.default(_normal(std, [r, r])), [-1])
    return aten.clamp.default(aten.mul.Tensor(aten.exp.default(aten.mul.Tensor(std, 2)), drawn), 1e-3)


def _shares(prior: Any, k: int) -> Any:
    """w (k,), drawn."""
    alpha = aten.clamp.default(aten.exp.default(prior), _SMALL)
    inverse, log = aten.reciprocal.default(alpha), aten.log.default(alpha)
    spread = aten.add.Tensor(aten.mul.Tensor(inverse, 1 - 2 / k), aten.mul.Tensor(aten.sum.default(inverse), 1 / k**2))
    spread = aten.sqrt.default(aten.add.Tensor(aten.clamp.default(spread, _SMALL), _SMALL))
    logits = aten.add.Tensor(aten.mul.Tensor(spread, _normal(prior, [k])), log)
    return aten.softmax.int(aten.sub.Tensor(logits, aten.mean.default(log)), -1)


def _normal(like: Any, shape: list[int]) -> Any:
    """Normal numbers of a shape, where `like` is, whose last dimension the shape has."""
    return aten.randn_like.default(aten.expand.default(like, shape))


def _divergence(std: Tensor, prior: Tensor, concentration: float) -> Tensor:
    """How far the three distributions are from what they are without data, as PEFT's formulas have it."""
    r, k, alpha = len(std), len(prior), prior.exp()
    before = torch.full_like(alpha, concentration)
    of_shares = (
        (alpha.sum().lgamma() - before.sum().lgamma())
        + (alpha.lgamma() - before.lgamma()).sum()
        + ((alpha - before) * (alpha.digamma() - alpha.sum().digamma())).sum()
    )
    of_spread = 0.5 * r * ((2 * std).exp().sum() - 2 * std.sum() - r)
    variances = _variances(std, r)
    return of_shares + of_spread + 0.5 * k * (variances.sum() - variances.log().sum() - r)

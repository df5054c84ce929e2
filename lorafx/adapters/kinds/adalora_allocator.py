"""AdaLoRA's allocation of ranks (arXiv 2303.10512, section 3.2 and algorithm 1): which directions are set to zero.

Each number w of an adapter has a sensitivity |w · ∂loss/∂w|; I is its moving average, and U that of how far it was from
it. A direction's importance is I ∘ U of its e, plus the mean of I ∘ U in its row of A, plus that in its column of B.
Of all directions at all sites, those of the largest importance are left, as many as the budget says:

    b(t) = target + (initial - target) · (1 - (t - tinit) / (T - tfinal - tinit))³        from tinit to T - tfinal

A direction that was set to zero trains on, and may be important later, until the ranks are final.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import AdapterError

SINGULAR = "lora_E"
Sites = Mapping[str, Mapping[str, Tensor]]  # an adapter's tensors, by site and by the kind's name
Pattern = dict[str, list[bool]]


class Allocator:
    """What one adapter's allocation remembers from step to step: the averages I and U, and whether it is final."""

    def __init__(self) -> None:
        self._averages: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._final = False

    def step(self, step: int, config: Any, sites: Sites) -> Pattern | None:
        """Set directions to zero, in place, as the schedule has it for a step that was taken, before `zero_grad`.

        Returns which are left, by name, or None where that did not change. Raises `AdapterError`, with nothing changed,
        where there is no gradient that importance could follow from.
        """
        if step < config.last_allocation:
            self._final = False
            self._observe(config, sites)
            if step > config.tinit and step % config.deltaT == 0:
                return _masked(sites, self._left(sites, _budget(step, config, len(sites))))
            return None
        if not self._final and self._averages:
            left = self._left(sites, _budget(config.last_allocation, config, len(sites)))
            self._averages, self._final = {}, True
            return _masked(sites, left)
        if config.rank_pattern:
            masks = {name: config.rank_pattern.get(f"{name}.{SINGULAR}") for name in sites}
            _masked(sites, {name: torch.tensor(mask, device="cpu") for name, mask in masks.items() if mask is not None})
            return None
        raise AdapterError(
            f"step {step} is past the last allocation, at {config.last_allocation}, and no step before it was given: "
            "call `update_and_allocate(step)` after each step, counted from 0, and see `total_step` and `tfinal`"
        )

    def _observe(self, config: Any, sites: Sites) -> None:
        """Follow the sensitivities of one more step. What took no part in it has none."""
        parameters = {(site, role): tensor for site, at in sites.items() for role, tensor in at.items()}
        if all(parameter.grad is None for parameter in parameters.values()):
            raise AdapterError(
                "no parameter of the adapter has a gradient: call `update_and_allocate` after `backward()` and "
                "`optimizer.step()`, and before `zero_grad()`"
            )
        for key, parameter in parameters.items():
            now = torch.zeros_like(parameter) if parameter.grad is None else (parameter.detach() * parameter.grad).abs()
            mean, spread = self._averages.setdefault(key, (torch.zeros_like(now), torch.zeros_like(now)))
            mean.lerp_(now, 1 - config.beta1)
            spread.lerp_((now - mean).abs(), 1 - config.beta2)

    def _left(self, sites: Sites, budget: int) -> dict[str, Tensor]:
        """Which directions are left, by site: the most important ones, exactly as many as the budget says."""
        importance = torch.stack([self._importance(site) for site in sites])
        left = torch.zeros_like(importance.flatten(), dtype=torch.bool)
        left[importance.flatten().argsort(descending=True, stable=True)[: max(budget, 0)]] = True
        return dict(zip(sites, left.view_as(importance)))

    def _importance(self, site: str) -> Tensor:
        """That of each direction at a site, (r,)."""
        a, e, b = (mean * spread for mean, spread in (self._averages[site, r] for r in ("lora_A", SINGULAR, "lora_B")))
        return (e[:, 0] + a.mean(1) + b.mean(0)).cpu()


def _budget(step: int, config: Any, sites: int) -> int:
    """How many directions are left at all sites together."""
    initial, target = config.init_r * sites, config.target_r * sites
    left = 1 - (step - config.tinit) / (config.last_allocation - config.tinit)
    return int((initial - target) * left**3 + target)


@torch.no_grad()
def _masked(sites: Sites, left: Mapping[str, Tensor]) -> Pattern:
    """Set all other directions to zero, in place."""
    for site, mask in left.items():
        values = sites[site][SINGULAR]
        values.masked_fill_(~mask.to(values.device)[:, None], 0)
    return {f"{site}.{SINGULAR}": mask.tolist() for site, mask in left.items()}

"""Weights to merge into, and all that is to come back of them, for tests of merging."""

import torch
from graphs import adapted, change
from torch import nn

import lorafx


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every tensor's bytes: what 'bit for bit' means."""
    return {k: v.contiguous().view(torch.uint8).numpy().tobytes() for k, v in model.state_dict().items()}


def wide(dtype=torch.float32, scale=0.05, rank=8) -> tuple[nn.Module, lorafx.AdaptedModel]:
    """Two layers large enough for byte counts to mean something, ΔW at `scale` of W's scale."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 260), nn.Tanh(), nn.Linear(260, 120)).to(dtype)
    lora = adapted(model, r=rank, lora_alpha=8)
    rescale(lora, "default", scale)
    return model, lora


def rescale(lora: lorafx.AdaptedModel, name: str, scale: float) -> None:
    adapter = lora._lorafx.adapters[name]
    with torch.no_grad():
        for site in adapter.selection:
            added = change(lora, name, site)["weight"].std()
            factor = scale * lora.get_parameter(site.weight).double().std() / added
            lora.get_parameter(adapter.tensors[site.name]["lora_B.weight"]).mul_(factor)

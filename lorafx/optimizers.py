"""PEFT's optimizers for LoRA under PEFT's names, for whoever has no peft, or asks for them by lorafx's."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names

from .errors import ConfigError
from .model.adaptation import of
from .model.optimizers_of_peft import pairs


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """LoRA+ (Hayou et al., 2024, arXiv 2402.12354): B trains at `lr * loraplus_lr_ratio`, A at `lr`.

    What has one dimension, as biases, trains like B, and the adapters of embeddings at `loraplus_lr_embedding`, both
    factors. `kwargs` are further ones of `optimizer_cls`. Raises `AdapterError` for a model that is not adapted.
    """
    tree = of(model).tree
    decaying = {name for name in get_parameter_names(tree, ALL_LAYERNORM_LAYERS) if "bias" not in name}
    groups: tuple[list[nn.Parameter], ...] = ([], [], [], [])
    a, embeddings, b, undecayed = groups
    for name, parameter in tree.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".lora_embedding_" in name:
            embeddings.append(parameter)
        elif ".lora_B." in name or parameter.ndim == 1:
            (b if name in decaying else undecayed).append(parameter)
        else:
            a.append(parameter)
    rates = (lr, loraplus_lr_embedding, lr * loraplus_lr_ratio, lr * loraplus_lr_ratio)
    decays = (*[loraplus_weight_decay] * 3, 0.0)
    chosen = [{"params": p, "lr": rate, "weight_decay": w} for p, rate, w in zip(groups, rates, decays)]
    return optimizer_cls(chosen, lr=lr, **kwargs)  # type: ignore[call-arg]


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """LoRA-FA (Zhang et al., 2023, arXiv 2308.03303): A is frozen, and B trains by gradients projected by A.

    The optimizer is `peft.optimizers.LoraFAOptimizer`. `r`, `lora_alpha` and `use_rslora` stand for PEFT's signature:
    each site's own scaling counts, as it is now. What has no such pair of matrices (embeddings, convolutions, biases,
    `modules_to_save`) trains whole, by AdamW. Raises `ConfigError` without peft, `AdapterError` if it is not adapted.
    """
    tree = of(model).tree
    found = list(pairs(tree))
    try:
        from peft.optimizers.lorafa import LoraFAOptimizer
    except ImportError as error:
        raise ConfigError("create_lorafa_optimizer uses peft's LoraFAOptimizer: install peft") from error
    for a, _, _ in found:
        a.requires_grad_(False)
    paired = {id(tensor) for a, b, _ in found for tensor in (a, b)}
    others = [p for p in tree.parameters() if p.requires_grad and id(p) not in paired]
    group = {
        "params": [tensor for a, b, _ in found for tensor in (a, b)] + others,
        # A name with "lora" in it makes the optimizer take a parameter and the next for a pair, of one state.
        "names": [f"{i}.lora" for i in range(len(found)) for _ in "AB"] + [f"other {i}" for i in range(len(others))],
        "scaling_factors": [scaling for _, _, scaling in found for _ in "AB"] + [None] * len(others),
        "lr": lr,
        "betas": (0.9, 0.999),
        "weight_decay": weight_decay,
    }
    return LoraFAOptimizer([group])  # type: ignore[list-item]

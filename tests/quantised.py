"""Tiny models quantised by bitsandbytes, to train beside PEFT. Import it only where bitsandbytes is installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import peft
import torch
import transformers
from torch import Tensor, nn

import lorafx

CONFIG: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 10,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
    "init_lora_weights": False,
}
# What a layer computes in float32 is the same numbers in PEFT's order of operators and in lorafx's.
QUANTISATIONS: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


def quantised(folder: Path, how: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """The tiny llama of `models.py`, quantised by one of `QUANTISATIONS`; it passes through a file in `folder`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not (folder / "config.json").exists():
        models.llama(**overrides).save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(**QUANTISATIONS[how])
    loaded = transformers.AutoModelForCausalLM
    return as_trained(loaded.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"}))


def as_trained(model: nn.Module) -> nn.Module:
    """The model without bitsandbytes' other form of 4-bit weights for evaluation, which rounds them once more."""
    for module in model.modules():
        vars(module)["support_avx512bf16_for_cpu"] = False
    return model


def twins(
    folder: Path,
    how: str,
    prepare: tuple[Callable[..., nn.Module], Callable[..., nn.Module]] = (lambda model: model,) * 2,
    config: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, nn.Module]:
    """A quantised model adapted by lorafx, with `options` of its `load`, and by PEFT, with one adapter.

    `prepare` has what each base goes through first, `base` what is said to `quantised`.
    """
    bases = [ready(quantised(folder / "base", how, **(base or {}))) for ready in prepare]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        theirs = peft.get_peft_model(bases[1], peft.LoraConfig(**CONFIG | (config or {})))
    theirs.save_pretrained(folder / "start")
    return lorafx.load(bases[0], folder / "start", is_trainable=True, **options), theirs


def gradients(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a training step and the gradients it gives, by names that both libraries share."""
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    named = ((name.removeprefix("base_model.model."), p) for name, p in model.named_parameters())
    return loss.detach(), {name: p.grad for name, p in named if p.grad is not None}

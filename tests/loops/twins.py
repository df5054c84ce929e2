"""One adapter on two equal models, lorafx's and real PEFT's, for loops that must not tell them apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import peft
import torch
from torch import nn

import lorafx

CONFIG = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear", "init_lora_weights": False}


def base(family: str = "llama") -> nn.Module:
    """A tiny model of one layer: these tests are about loops."""
    return getattr(models, family)(num_hidden_layers=1)


def twins(folder: Path, *, family: str = "llama", config: dict[str, Any] | None = None) -> tuple[nn.Module, nn.Module]:
    """A tiny model adapted by lorafx, and the same with the same adapter, loaded from its file, by PEFT."""
    model = base(family)
    copied = copy.deepcopy(model)
    task = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}[family]
    ours = lorafx.compile(model, {**CONFIG, "task_type": task, **(config or {})}, random_state=1)
    ours.save_pretrained(folder / "start")
    theirs = peft.PeftModel.from_pretrained(copied, folder / "start", is_trainable=True)
    return ours, theirs


def texts(count: int = 12, *, length: int = 9, family: str = "llama", seed: int = 3) -> list[dict[str, Any]]:
    """Examples as a dataset has them, with a column that no model takes."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        ids = torch.randint(2, models.VOCABULARY, (length,), generator=rng).tolist()
        labels: Any = number % models.LABELS if family == "bert" else ids
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels, "note": f"row {number}"})
    return rows


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a model trains, by names that both libraries share."""
    parameters = ((name.removeprefix("base_model.model."), p) for name, p in model.named_parameters())
    return {name: p.detach().clone() for name, p in parameters if p.requires_grad}

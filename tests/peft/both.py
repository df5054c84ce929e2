"""One adapter file, in PEFT and in lorafx."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import torch
import zoo

import lorafx


def both(entry: zoo.Entry, folder: Path, is_trainable: bool = False) -> tuple[peft.PeftModel, lorafx.AdaptedModel]:
    """A zoo entry with a random adapter that PEFT writes to `folder`, as PEFT loads it and as lorafx does."""
    base = entry.build()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=entry.targets, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=is_trainable)
        return theirs.train(is_trainable), lorafx.load(base, folder, is_trainable=is_trainable)

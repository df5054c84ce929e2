"""What the tests of serving share: a model with many arguments, and adapted models beside plain ones."""

import copy

import torch
from graphs import Chain, adapted
from torch import nn


class Options(Chain):
    """A model with arguments of many sorts."""

    def forward(self, x, scale=None, power=1, shift=0, extra=None):
        y = super().forward(x) ** power + shift
        y = y if scale is None else y * scale
        return {"y": y, "extra": extra}


def twins(model: nn.Module, **config):
    """An adapted model, and a plain one that computes the same with the same Python."""
    lora = adapted(model.double(), **config)
    return lora, copy.deepcopy(lora).merge_and_unload()


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def served(lora):
    return [call.served_by for call in lora.explain().calls]


def whys(lora):
    return [call.why for call in lora.explain().calls]

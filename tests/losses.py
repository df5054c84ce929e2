"""A small model with a loss of one's own, with `fuse_loss` and without, and what a training step of it gives."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

import lorafx

EPS = torch.finfo(torch.float32).eps


class Own(nn.Module):
    """(…, tokens) ids -> loss and logits, with a loss of one's own."""

    def __init__(self, loss, bias=True):
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(13, 4), nn.Linear(4, 6), nn.Linear(6, 13, bias=bias)
        self.loss = loss

    def forward(self, ids, labels):
        logits = self.head(torch.tanh(self.inner(self.embedding(ids))))
        return self.loss(logits, labels)


def shifted(logits, labels):
    return F.cross_entropy(logits[:, :-1].reshape(-1, 13), labels[:, 1:].reshape(-1)), logits


def both(model, targets, **options):
    """The model with and without the pass, the same adapter on it."""
    pipeline = lorafx.passes.default
    return [
        lorafx.compile(
            copy.deepcopy(model),
            {"r": 2, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False},
            pipeline=chosen,
            random_state=0,
            **options,
        ).train()
        for chosen in (pipeline, pipeline.without("fuse_loss"))
    ]


def outcome(lora, *args, through_logits=False, **kwargs):
    """Loss, logits (or None), gradients of what trains."""
    lora.zero_grad()
    result = lora(*args, **kwargs)
    loss, logits = (result, None) if torch.is_tensor(result) else (result[0], result[1])
    (loss + (logits.float().square().mean() if through_logits else 0)).backward()
    return loss.detach(), logits, {n: p.grad.clone() for n, p in lora.named_parameters() if p.grad is not None}


def assert_equal(ours, theirs, eps, factor=64):
    assert abs(ours[0] - theirs[0]) <= factor * eps * abs(theirs[0])
    assert ours[2].keys() == theirs[2].keys() and ours[2]
    for name, gradient in theirs[2].items():
        assert (ours[2][name] - gradient).abs().max() <= factor * eps * gradient.abs().max(), name
    if theirs[1] is not None:
        assert (ours[1] - theirs[1]).abs().max() <= factor * eps * theirs[1].abs().max()


def times_asked(lora):
    (call,) = lora.explain().calls
    return call.loss

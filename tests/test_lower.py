"""Lowering: the rewritten graph through torch.compile computes what it computes eagerly."""

import pytest
import torch
from graphs import Chain, adapted
from torch import nn

eps = torch.finfo(torch.float32).eps


def gradients(lora, call) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    lora.zero_grad()
    loss = call()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in lora.named_parameters() if p.requires_grad}


class Mixed(nn.Module):
    """A site of each way that scaling folds: addmm for products, add(alpha=) for a convolution."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 4), nn.Linear(4, 6)
        self.conv, self.head = nn.Conv1d(6, 5, 3, padding=1), nn.Linear(5, 3)

    def forward(self, ids):
        hidden = torch.tanh(self.linear(self.embedding(ids)))
        return self.head(torch.tanh(self.conv(hidden.transpose(1, 2))).mean(-1))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_equals_eager(backend):
    """float32; a gradient sums over at most 16 x 8 places."""
    tokens = torch.randint(0, 11, (16, 8))
    lora = adapted(Mixed(), target_modules=["embedding", "linear", "conv", "head"])
    loss, expected = gradients(lora, lambda: lora(tokens).square().sum())
    lora._lorafx.dispatcher.backend = backend
    lora._lorafx.dispatcher.programs.clear()
    compiled_loss, found = gradients(lora, lambda: lora(tokens).square().sum())
    assert abs(loss - compiled_loss) <= 128 * eps * abs(loss)
    for name, gradient in expected.items():
        assert (gradient - found[name]).abs().max() <= 128 * eps * gradient.abs().max(), name
    assert lora(torch.randint(0, 11, (5, 9))).shape == (5, 3)


def test_auto_is_eager_without_cuda():
    lora = adapted(Chain())
    lora(torch.randn(5, 4))
    program = next(iter(lora._lorafx.dispatcher))
    assert program.run is program.gm

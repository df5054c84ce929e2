"""VeLoRA where PEFT has no number; its outputs and gradients are held to PEFT's in tests/peft/test_kinds.py."""

import pytest
import torch
from torch import nn

import lorafx

FIELDS = {"r": 3, "target_modules": ["0"], "velora_config": {"num_groups": 2}}


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_velora_keeps_two_numbers_a_token_of_sixteen(capture):
    lora = lorafx.compile(nn.Sequential(nn.Linear(16, 12)), FIELDS, capture=capture)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.shape), tensor)[1], lambda t: t):
        lora(torch.randn(20, 16))
    assert {tuple(shape) for shape in kept if shape[0] == 20} == {(20, 2), (20, 3)}, "the last is for B"


def test_tokens_that_average_to_nothing_train_by_an_even_direction():
    """As in PEFT: x and -x have no direction, and A's gradient is finite."""
    lora = lorafx.compile(nn.Sequential(nn.Linear(16, 12)), FIELDS | {"init_lora_weights": False})
    half = torch.ones(1, 16)
    lora(torch.cat([half, -half])).square().sum().backward()
    gradient = lora[0].lora_A.default.weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    assert torch.equal(gradient[:, :8], gradient[:, :1].expand(3, 8)), "a group has one number"


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_the_first_batch_gives_all_others_its_direction(capture, tmp_path):
    """Two calls may come before either's backward, and a loaded adapter goes on with the direction."""
    options = {"velora_config": {"num_groups": 2, "init_type": "batch_average_once"}, "init_lora_weights": False}
    base, (first, second) = nn.Sequential(nn.Linear(16, 12)).double(), torch.randn(2, 20, 16, dtype=torch.float64)
    lora = lorafx.compile(base, FIELDS | options, capture=capture)
    lora.eval()(second)
    lora.train()(first[:0]).sum().backward()  # as an expert that no token chose
    assert not lora[0].lora_A.default.weight.grad.any()
    assert not lora[0].lora_velora_embed.default.any(), "it is training that decides, with tokens"
    direction = first.view(-1, 8).mean(0)
    direction /= direction.norm()
    outputs = [lora.train()(x) for x in (first, second)]
    lora.save_pretrained(tmp_path)
    loaded = lorafx.load(nn.Sequential(nn.Linear(16, 12)).double(), tmp_path, is_trainable=True, capture=capture)
    for model, ys in ((lora, outputs), (loaded, [loaded.train()(second)])):
        sum(y.sum() for y in ys).backward()
        kept = sum((x.view(20, 2, 8) @ direction)[..., None] * direction for x in (first, second)[-len(ys) :])
        d_hidden = model[0].lora_B.default.weight.sum(0) * 8 / 3
        expected = torch.outer(d_hidden, kept.sum(0).flatten())
        torch.testing.assert_close(model[0].lora_A.default.weight.grad, expected, rtol=1e-5, atol=1e-6)

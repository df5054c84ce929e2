"""DoRA where PEFT has no number, or another one; the rest is held to PEFT's in tests/peft/test_kinds.py."""

import pytest
import torch
from torch import nn

import lorafx
from lorafx.errors import ConfigError

CONFIG = lorafx.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], use_dora=True)


def test_rows_of_zeros_train_as_loras():
    model = nn.Sequential(nn.Linear(5, 7)).double()
    with torch.no_grad():
        model[0].weight[3] = 0
    lora, x = lorafx.compile(model, CONFIG), torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(lora(x), model(x), rtol=1e-12, atol=1e-12)
    optimizer = torch.optim.SGD(lora.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        lora(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in lora.parameters() if p.requires_grad)
        assert step or lora[0].lora_B.default.weight.grad[3].abs().max() > 0
        optimizer.step()
    expected = lora(x)
    lora.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_it_changes_nothing_at_first_in_half_precision_and_sees_small_magnitudes_then(capture):
    model, x = nn.Sequential(nn.Linear(48, 32)).bfloat16(), torch.randn(4, 48).bfloat16()
    lora = lorafx.compile(model, CONFIG, capture=capture)
    assert torch.equal(lora(x), model(x)), "of the norms no bit is lost"
    magnitude = lora[0].lora_magnitude_vector.default
    assert magnitude.dtype == torch.float32
    with torch.no_grad():  # less than bfloat16 has places for beside 1, but in sum more than its last bit
        magnitude.mul_(1 + 2**-9)
    exact = model(x).float() + (model(x) - model[0].bias).float() * 2**-9
    torch.testing.assert_close(lora(x), exact.bfloat16(), rtol=2**-8, atol=1e-6)
    assert not torch.equal(lora(x), model(x))


def test_scaling_may_be_changed_while_it_runs():
    model, x = nn.Sequential(nn.Linear(5, 7)).double(), torch.randn(4, 5, dtype=torch.float64)
    lora = lorafx.compile(model, CONFIG.replace(init_lora_weights=False))
    lora.set_scale("default", 0.5)
    layer = lora[0]
    weight = layer.weight + 1.5 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    gain = layer.lora_magnitude_vector.default / weight.norm(dim=1)
    torch.testing.assert_close(lora(x), x @ (gain[:, None] * weight).T + layer.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (nn.Sequential(nn.Linear(5, 7)), {"lora_bias": True}, "`use_dora` has no `lora_bias`"),
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), {}, "0 is a convolution of 2 groups"),
        (nn.Sequential(nn.MultiheadAttention(4, 2)), {}, "0 packs three weights"),
    ],
)
def test_what_has_no_dora_is_refused_and_the_model_left_alone(model, changes, message):
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=message):
        lorafx.compile(model, CONFIG.replace(**changes))
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_a_head_that_an_adapted_embedding_is_tied_to_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 5), nn.Linear(5, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    lora = lorafx.compile(Tied(), CONFIG.replace(target_modules=["embed"]))
    with pytest.raises(lorafx.errors.LorafxError, match="Exclude the module"):
        lora(torch.tensor([[1, 2]]))

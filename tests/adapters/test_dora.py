"""DoRA where PEFT has no number, or another one; the rest is held to PEFT's in tests/peft/test_kinds.py."""

import pytest
import torch
from modules import Tied
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


def test_it_has_no_bias_and_the_model_is_left_alone():
    model = nn.Sequential(nn.Linear(5, 7))
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="`use_dora` has no `lora_bias`"):
        lorafx.compile(model, CONFIG.replace(lora_bias=True))
    assert {name: id(p) for name, p in model.named_parameters()} == before


class Attention(nn.MultiheadAttention):
    """Queries of one tensor, keys and values of another: some rows of the packed weight are read apart."""

    def forward(self, x):
        return super().forward(x, x[:, 1:], x[:, 1:], need_weights=False)[0]


IDS = torch.tensor([[1, 2, 10, 2]])
SHARED = {
    "an embedding and its head": (Tied, "embed", IDS),
    "a head and its embedding": (Tied, "head", IDS),
    "packed projections": (lambda: nn.Sequential(Attention(4, 2, batch_first=True)), "0", torch.randn(2, 3, 4)),
    "packed projections of one": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, 0.0)),
        "self_attn",
        torch.randn(3, 2, 4),
    ),
}


@pytest.mark.filterwarnings("ignore:.*shares its weight")
@pytest.mark.parametrize("capture", ["graph", "auto"])
@pytest.mark.parametrize("name", SHARED)
def test_wherever_the_weight_is_read_it_is_the_papers(name, capture):
    """Held to the merged weight, which is diag(m / ‖W + s · B A‖) (W + s · B A)."""
    make, target, x = SHARED[name]
    torch.manual_seed(0)
    base, x = make().double(), x.double() if x.is_floating_point() else x
    config = CONFIG.replace(target_modules=[target], init_lora_weights=False, lora_dropout=0.0)
    lora = lorafx.compile(base, config, capture=capture)
    trained = {n: p for n, p in lora.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for n, p in trained.items():
            p.mul_(1 + 0.3 * torch.rand_like(p)) if "magnitude" in n else None
    found = lora(x)
    own = dict(zip(trained, torch.autograd.grad(found.square().sum(), list(trained.values()))))

    weights = {site.weight: lora.get_parameter(site.weight) for site in lora.sites}
    merged = {path: _merged(lora, site) for path, site in zip(weights, lora.sites)}
    expected = torch.func.functional_call(base, merged, (x,), tie_weights=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    exact = dict(zip(trained, torch.autograd.grad(expected.square().sum(), list(trained.values()))))
    for n in trained:
        torch.testing.assert_close(own[n], exact[n], rtol=1e-8, atol=1e-8, msg=lambda text, n=n: f"{n}: {text}")
    lora.merge_adapter()
    torch.testing.assert_close(base(x), expected, rtol=1e-10, atol=1e-10)


def _merged(lora, site):
    """The merged weight, with a derivative."""
    of = {name.removeprefix(f"{site.module}."): p for name, p in lora.named_parameters()}
    names = (
        ["lora_embedding_A.default", "lora_embedding_B.default"]
        if site.reading.lookup
        else (["lora_A.default.weight", "lora_B.default.weight"])
    )
    a, b, m = (of[name] for name in (*names, "lora_magnitude_vector.default"))
    weight = lora.get_parameter(site.weight)
    matrix = (weight.mT if site.reading.lookup else weight) + 3 * b @ a
    matrix = (m / matrix.detach().norm(dim=1))[:, None] * matrix
    return matrix.mT if site.reading.lookup else matrix

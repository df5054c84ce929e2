"""CorDA and LoRA-GA start from what data says of weights: as the papers have it, and as PEFT where it is exact."""

from __future__ import annotations

import copy
import warnings

import models
import peft
import pytest
import torch
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorafx
from lorafx.adapters import notes
from lorafx.errors import AdapterError, ConfigError, SelectionError
from lorafx.testing import adapter_tensors


class Net(nn.Module):
    """(batch, length, 6) -> (batch, length, 5), by an ordinary layer and one that is stored transposed."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(6, 9), Conv1D(5, 9), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(x=torch.tanh(self.first(input=x)))


def net() -> tuple[Net, list[torch.Tensor]]:
    torch.manual_seed(0)
    return Net(), [torch.randn(1, 7, 6) for _ in range(4)]


def config(init: str, **how) -> lorafx.LoraConfig:
    given = {f"{init}_config": how} if how else {}
    return lorafx.LoraConfig(r=2, lora_alpha=6, target_modules=["first", "second"], init_lora_weights=init, **given)


def product(lora: nn.Module, name: str) -> torch.Tensor:
    layer = lora.get_submodule(name)
    return 3 * layer.lora_B.default.weight.detach() @ layer.lora_A.default.weight.detach()


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_takes_what_the_data_uses_most_or_least(method):
    base, data = net()
    given: list[torch.Tensor] = []
    look = lambda module, args, kwargs: given.append(kwargs["x"].flatten(0, -2))  # noqa: E731
    hook = base.second.register_forward_pre_hook(look, with_kwargs=True)
    expected = [base(x) for x in data]
    hook.remove()
    before = base.second.weight.detach().t().clone()
    lorafx.preprocess_corda(base, config("corda", corda_method=method), lambda: [base(x) for x in data])
    lora = lorafx.compile(base, config("corda", corda_method=method))
    c = sum((x / x.abs().max()).t() @ (x / x.abs().max()) for x in given) / len(given)
    c = c + 0.01 * c.diagonal().mean() * torch.eye(9)
    u, s, vh = torch.linalg.svd(before @ c, full_matrices=False)
    kept = slice(0, 2) if method == "ipm" else slice(3, 5)
    torch.testing.assert_close(product(lora, "second") @ c, (u[:, kept] * s[kept]) @ vh[kept], rtol=1e-3, atol=1e-4)
    for x, value in zip(data, expected):
        torch.testing.assert_close(lora(x), value)
    assert not torch.allclose(base.second.weight.t(), before, atol=1e-3)


def test_what_peft_does_with_files_is_said_to_have_no_effect():
    base, data = net()
    with pytest.warns(match="cache_file, verbose have no effect"):
        lorafx.preprocess_corda(base, config("corda", cache_file="c.pt", verbose=True), lambda: base(data[0]))


def test_what_was_found_counts_for_the_weights_as_they_were():
    base, data = net()
    asked = config("corda")
    with pytest.raises(ConfigError, match=r"first: .*preprocess_corda"):
        lorafx.compile(base, asked)
    lorafx.preprocess_corda(base, asked, lambda: base(data[0]))
    with torch.no_grad():
        base.second.weight += 1
    with pytest.raises(ConfigError, match=r"second: .*as it is now"):
        lorafx.compile(base, asked)
    lorafx.preprocess_corda(base, asked, lambda: base(data[0]))
    lorafx.compile(base, asked)
    with pytest.raises(ConfigError, match="as it is now"):  # which that changed
        lorafx.compile(base, asked)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "gd_scale", "unit"])
def test_loraga_is_pefts(direction, scale):
    """The mean of two calls. Weights of six columns at most have gradients of that rank, so that PEFT's random
    approximation is exact.
    """
    base, data = net()
    theirs, how = copy.deepcopy(base), {"direction": direction, "scale": scale}
    asked = config("lora_ga", **how)
    settings = asked.to_dict() | {"lora_ga_config": LoraGAConfig(**how), "target_modules": ["first"], "peft_type": None}
    their = peft.LoraConfig(**{key: value for key, value in settings.items() if key in peft.LoraConfig().to_dict()})
    preprocess_loraga(theirs, their, lambda: [theirs(x).square().sum().backward() for x in data[:2]])
    theirs = peft.get_peft_model(theirs, their)
    base.idle.weight.grad = torch.ones(3, 4)
    lorafx.preprocess_loraga(base, asked, lambda: [base(x).square().sum().backward() for x in data[:2]])
    assert base.idle.weight.grad.eq(1).all() and base.first.weight.grad is None and base.first.bias.requires_grad
    lora = lorafx.compile(base, asked)
    for half in ("lora_A", "lora_B"):  # a singular vector may point either way
        expected = getattr(theirs.base_model.model.first, half)["default"].weight.abs()
        found = getattr(lora.first, half).default.weight.abs()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
    torch.testing.assert_close(lora(data[1]), net()[0](data[1]), rtol=1e-4, atol=1e-5)


def test_a_training_step_may_clear_gradients_and_step():
    asked, found = config("lora_ga"), []
    for clears in (False, True):
        base, data = net()
        optimizer = torch.optim.SGD(base.parameters(), 1.0)

        def train(base=base, data=data, optimizer=optimizer, clears=clears):
            for x in data:
                base(x).square().sum().backward()
                if clears:
                    optimizer.step()
                    optimizer.zero_grad()

        lorafx.preprocess_loraga(base, asked, train)
        found.append(notes.noted(base.first.weight, "lora_ga"))
    assert torch.equal(*found)


def test_rows_of_a_layer_may_be_a_single_one_and_nothing_is_kept_of_what_was_used():
    base, data = net()
    asked = config("corda")
    lorafx.preprocess_corda(base, asked, lambda: [base(x[0, 0]) for x in data] + [base(data[0][:, :0])])
    assert base.first.weight in notes._notes
    lorafx.compile(base, asked)
    assert base.first.weight not in notes._notes


def test_random_directions_are_those_of_the_seed():
    starts = []
    for _ in range(2):
        base, data = net()
        asked = config("lora_ga", direction="random", scale="weight_svd")
        lorafx.preprocess_loraga(base, asked, lambda base=base, x=data[0]: base(x).square().sum().backward())
        starts.append(adapter_tensors(lorafx.compile(base, asked, random_state=3)))
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


def test_what_cannot_be_asked_is_refused_and_changes_nothing():
    base, data = net()
    modes = [module.training for module in base.modules()]
    with pytest.raises(ConfigError, match="init_lora_weights"):
        lorafx.preprocess_corda(base, config("lora_ga"), lambda: base(data[0]))
    with pytest.raises(AdapterError, match="idle was not reached"):
        lorafx.preprocess_corda(base, {**config("corda").to_dict(), "target_modules": ["idle"]}, lambda: base(data[0]))
    with pytest.raises(AdapterError, match=r"first: .*not finite"):
        lorafx.preprocess_corda(base, config("corda"), lambda: base(data[0] * torch.nan))
    with pytest.raises(AdapterError, match=r"first: .*nothing but zeros"):
        lorafx.preprocess_corda(base, config("corda"), lambda: base(data[0] * 0))
    wide = {**config("lora_ga").to_dict(), "r": 3}  # and 2 · 3 directions are more than the 5 of the second layer
    lorafx.preprocess_loraga(base, wide, lambda: base(data[0]).square().sum().backward())
    with pytest.raises(ConfigError, match=r"second: .*at most rank 2"):
        lorafx.compile(base, wide)
    with pytest.raises(SelectionError):
        lorafx.preprocess_loraga(base, {**config("lora_ga").to_dict(), "target_modules": ["none"]}, lambda: None)
    with pytest.raises(ConfigError, match="corda_method"):
        config("corda", corda_method="both")
    with pytest.raises(ConfigError, match="stable_gamma"):
        config("lora_ga", stable_gamma=0)
    with pytest.raises(ConfigError, match=r"lora_ga_config.* has no gamma"):
        config("lora_ga", gamma=3)
    with pytest.warns(match='`corda_config` has no effect without `init_lora_weights="corda"`'):
        lorafx.compile(net()[0], {"target_modules": ["first"], "corda_config": {"corda_method": "ipm"}})
    with pytest.raises(ZeroDivisionError):
        lorafx.preprocess_loraga(base, config("lora_ga"), lambda: 1 / 0)
    assert [module.training for module in base.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
    assert not any(module._forward_pre_hooks for module in base.modules())


@pytest.mark.parametrize("init", ["corda", "lora_ga", "orthogonal", "eva", "mica"])
def test_an_adapter_that_started_from_anything_is_loaded(tmp_path, init):
    """Its equation is LoRA's; where its base was changed by the start, that is said."""
    base, x = models.mlp(), models.call("mlp")
    lora = lorafx.compile(base, {"r": 2, "target_modules": ["up", "down"], "init_lora_weights": False}, random_state=0)
    lora.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"init_lora_weights": false', f'"init_lora_weights": "{init}"'))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = lorafx.load(models.mlp(), tmp_path)
    assert any("fits the base as that left it" in str(each.message) for each in said) == (init in ("corda", "lora_ga"))
    assert torch.equal(again(*x), lora(*x))


def test_orthogonal_halves_do_nothing_at_first_and_are_not_zero():
    base, data = net()
    lora = lorafx.compile(base, config("orthogonal"), random_state=0)
    assert product(lora, "first").abs().max() < 1e-7 and all(
        t.abs().max() > 1e-3 for t in adapter_tensors(lora).values()
    )
    torch.testing.assert_close(lora(data[0]), net()[0](data[0]))
    with pytest.raises(ConfigError, match="rank"):
        lorafx.compile(net()[0], {**config("orthogonal").to_dict(), "r": 3})

"""RandLoRA: its equation, its bases, and PEFT's files, which have these once for each site too."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from uses import Layers, Pair, hold, of_layers

import lorafx
from lorafx.errors import ConfigError

FIELDS = {"r": 2, "randlora_alpha": 3, "target_modules": ["up", "down"]}
WEIGHTS = "adapter_model.safetensors"


def adapted(layer, x):
    lambdas, gammas = layer.randlora_lambda.default, layer.randlora_gamma.default
    (r, count), (_, smaller) = lambdas.shape, gammas.shape
    a = layer.randlora_A.default.shared[:, :, :smaller] * lambdas[:, :, None] * gammas
    b = layer.randlora_B.default.shared[: max(layer.weight.shape), :count]
    delta = b.reshape(-1, count * r) @ a.reshape(r * count, -1)  # (larger, smaller)
    delta = delta if layer.weight.shape == delta.shape else delta.T
    return x @ (layer.weight + 1.5 * delta).T + layer.bias


@pytest.mark.slow
def test_its_equation_holds_in_every_use(tmp_path):
    config = lorafx.RandLoraConfig(**FIELDS)
    hold(lambda: Layers(Pair).double(), config, torch.randn(4, 6, 5, dtype=torch.float64), of_layers(adapted), tmp_path)


@pytest.mark.parametrize("drawn", [{}, {"sparse": True}, {"very_sparse": True}])
def test_bases_have_a_standard_deviation_of_one(drawn):
    lora = lorafx.compile(nn.Sequential(nn.Linear(50, 70)), lorafx.RandLoraConfig(r=8, target_modules=["0"], **drawn))
    for basis in (lora[0].randlora_A.default.shared, lora[0].randlora_B.default.shared):
        assert abs(basis.std() - 1) < 1e-2  # bfloat16 rounds them, and their deviation
        assert basis.unique().numel() == 3 if drawn else basis.unique().numel() > 50


@pytest.mark.slow
def test_files_have_the_bases_once_and_peft_reads_them(tmp_path):
    peft = pytest.importorskip("peft")
    base, x = Layers(Pair).double(), torch.randn(4, 5, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.RandLoraConfig(**FIELDS, init_weights=False))
        theirs.save_pretrained(tmp_path / "theirs")
        lora = lorafx.load(copy.deepcopy(base), tmp_path / "theirs")
        torch.testing.assert_close(lora(x), theirs(x), rtol=1e-12, atol=1e-12)
        lora.save_pretrained(tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
        torch.testing.assert_close(again(x), theirs(x), rtol=0, atol=0)
    ours, written = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
    assert [key for key in ours if "randlora_A" in key] == ["base_model.randlora_A"]
    written_once = sum("randlora_A" in key for key in written)
    assert written_once == len(lora.sites) + 1, "PEFT writes one for each site, too"


@pytest.mark.parametrize(("field", "value"), [("r", 0), ("randlora_alpha", "x"), ("randlora_dropout", 2)])
def test_fields_that_make_no_sense_are_named(field, value):
    with pytest.raises(ConfigError, match=field):
        lorafx.RandLoraConfig(**{field: value})

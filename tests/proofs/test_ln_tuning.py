"""LN tuning: norms train as a whole, beside PEFT's."""

import copy
import warnings

import models
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorafx
from lorafx.errors import SelectionError

WEIGHTS = "adapter_model.safetensors"


def shaken(model):
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_what_it_computes_trains_and_writes_is_pefts(name, layers, tmp_path):
    peft = pytest.importorskip("peft")
    base, call = getattr(models, name)(**{layers: 1}), models.call(name, labels=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = shaken(peft.get_peft_model(copy.deepcopy(base), peft.LNTuningConfig()))
    theirs.save_pretrained(tmp_path / "theirs")
    lora = lorafx.load(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True)
    gradients = []
    for model in (theirs, lora):
        logits = models.logits(models.run(model.train(), call))
        logits.square().mean().backward()
        trained = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}
        gradients.append((logits.detach(), {n: p.grad for n, p in trained.items()}))
    (expected, wanted), (found, own) = gradients
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # sums of 64 in float32, through the layers
    assert own.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(own[key], wanted[key], rtol=1e-3, atol=1e-6)
    lora.save_pretrained(tmp_path / "ours")
    written, ours = (load_file(tmp_path / folder / WEIGHTS) for folder in ("theirs", "ours"))
    assert written.keys() == ours.keys() and all(torch.equal(ours[key], written[key]) for key in written)
    assert lora.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5)) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("capture", [pytest.param("graph", marks=pytest.mark.slow), "sites"])
def test_its_copies_act_until_they_are_disabled_or_take_the_bases_place(capture):
    base, x = Normed(), torch.randn(4, 5)
    plain = base(x)
    lora = shaken(lorafx.compile(base, lorafx.LNTuningConfig(target_modules=r"layers\.\d\.0"), capture=capture))
    assert {n for n, p in lora.named_parameters() if p.requires_grad} == {
        f"layers.{i}.0.ln_tuning_layers.default.{name}" for i in range(3) for name in ("weight", "bias")
    }
    changed = lora(x)
    assert (changed - plain).abs().max() > 0.1
    with lora.disable_adapter():
        torch.testing.assert_close(lora(x), plain)
    merged = lora.merge_and_unload()
    assert merged is base
    torch.testing.assert_close(merged(x), changed)


def test_names_of_nothing_are_refused():
    with pytest.raises(SelectionError, match="no module matches target_modules="):
        lorafx.compile(Normed(), lorafx.LNTuningConfig(target_modules=["norm"]))

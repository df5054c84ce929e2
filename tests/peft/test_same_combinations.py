"""Adapters combined by weights are those that PEFT makes: the same tensors, and the same entries dropped at random."""

from __future__ import annotations

import itertools
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorafx
from lorafx.adapters.combining import TYPES

# Both compute in float32. A singular vector moves by u · σ₁ / gap (Wedin), which is some hundreds of u here.
CLOSE = {"rtol": 1000 * 2**-24, "atol": 1000 * 2**-24}
TARGETS = ["rows", "first", "second", "stored"]


class Mixed(nn.Module):
    """One layer of each operator that PEFT combines adapters at: a table, a convolution, two kinds of linear."""

    def __init__(self):
        super().__init__()
        self.rows, self.first = nn.Embedding(11, 6), nn.Conv2d(1, 5, (2, 3))
        self.second, self.stored = nn.Linear(7, 4), Conv1D(9, 4)

    def forward(self, tokens):
        images = self.rows(tokens)[:, None]  # (batch, 1, 8, 6)
        return self.stored(torch.tanh(self.second(self.first(images).flatten(2)[..., :7])))


def libraries(configs):
    """The same adapters, whose values make a difference, on the same model: PEFT's and lorafx's."""
    torch.manual_seed(0)
    base = Mixed().state_dict()
    for library in (peft, lorafx):
        model = Mixed()
        model.load_state_dict(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = list(configs)
            model = library.get_peft_model(model, peft.LoraConfig(**configs[names[0]]), adapter_name=names[0])
            for name in names[1:]:
                model.add_adapter(name, peft.LoraConfig(**configs[name]))
        for name in names:
            with torch.no_grad():
                for path, parameter in sorted(own(model, name).items()):
                    rng = torch.Generator().manual_seed(len(path) + sum(map(ord, name)))
                    parameter.copy_(torch.randn(parameter.shape, generator=rng))
        yield model


def own(model, name):
    atoms = {"base_model": "", "base_layer": ""}
    cut = {".".join(a for a in path.split(".") if a not in atoms): p for path, p in model.named_parameters()}
    return {path.removeprefix("model."): p for path, p in cut.items() if f".{name}." in f"{path}."}


def counted(monkeypatch):
    """Random numbers by how often they were asked for, whoever asks: PEFT draws start values in between."""
    count, draw = itertools.count(), torch.bernoulli

    def bernoulli(input, *, generator=None):
        return draw(input, generator=torch.Generator().manual_seed(next(count)))

    monkeypatch.setattr(torch, "bernoulli", bernoulli)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("signs", ["total", "frequency"])
@pytest.mark.parametrize("combination_type", TYPES)
def test_the_tensors_are_peft_s(combination_type, signs, monkeypatch):
    ranks = (2, 3, 2) if combination_type == "cat" or combination_type.endswith("svd") else (2, 2, 2)
    configs = {
        name: {"r": r, "lora_alpha": alpha, "target_modules": TARGETS}
        for name, r, alpha in zip("abc", ranks, (4, 6, 1))
    }
    weights, made = [0.7, -1.5, 2.0], []
    options = {"combination_type": combination_type, "density": 0.6, "majority_sign_method": signs}
    for model in libraries(configs):
        with monkeypatch.context() as patch:
            counted(patch)
            model.add_weighted_adapter(["a", "b", "c"], weights, "mixed", **options)
        made.append(own(model, "mixed"))
    theirs, ours = made
    assert theirs.keys() == ours.keys() and len(ours) == 8
    for path, expected in theirs.items():
        assert ours[path].shape == expected.shape, path
        torch.testing.assert_close(ours[path], expected, **CLOSE, msg=lambda m, p=path: f"{p}: {m}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"svd_rank": 1}, {"svd_clamp": 0.9}, {"svd_full_matrices": False}])
def test_options_of_the_decomposition_are_peft_s(options):
    configs = {name: {"r": 2, "target_modules": TARGETS} for name in "ab"}
    made = []
    for model in libraries(configs):
        model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "mixed", **options)
        made.append(own(model, "mixed"))
    for path, expected in made[0].items():
        torch.testing.assert_close(made[1][path], expected, **CLOSE, msg=lambda m, p=path: f"{p}: {m}")


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_other_targets_are_combined_where_they_are():
    configs = {
        "a": {"r": 2, "target_modules": ["first", "second"]},
        "b": {"r": 3, "target_modules": ["second", "rows"]},
    }
    made, outputs = [], []
    tokens = torch.arange(24).view(3, 8) % 11
    for model in libraries(configs):
        model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "mixed", combination_type="cat")
        model.set_adapter("mixed")
        made.append(own(model, "mixed"))
        outputs.append(model.eval()(tokens))
    assert made[0].keys() == made[1].keys()
    for path, expected in made[0].items():
        torch.testing.assert_close(made[1][path], expected)
    torch.testing.assert_close(outputs[1], outputs[0])

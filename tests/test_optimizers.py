"""LoRA+ and LoRA-FA on adapted models train as PEFT's do on PEFT's; and so do PEFT's own on adapted models."""

import copy

import peft
import pytest
import torch
from peft import optimizers
from torch import nn

import lorafx


class Net(nn.Module):
    """Token ids (batch, length) -> (batch, length, 3)."""

    def __init__(self):
        super().__init__()
        self.emb, self.norm, self.mid, self.out = nn.Embedding(20, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, ids):
        return self.out(torch.tanh(self.mid(self.norm(self.emb(ids)))))


IDS = torch.arange(8).reshape(2, 4)
PLUS = {"lr": 1e-2, "loraplus_lr_ratio": 4, "loraplus_lr_embedding": 3e-3, "loraplus_weight_decay": 0.1}


def both(**config):
    """The same model with the same adapter, PEFT's and lorafx's."""
    base = Net()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(init_lora_weights=False, **config))
    ours = lorafx.get_peft_model(base, peft.LoraConfig(**config))
    lorafx.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs, save_embedding_layers=False))
    return theirs, ours


def train(model, optimizer):
    for _ in range(3):
        optimizer.zero_grad()
        (model(IDS) - 1).square().sum().backward()
        optimizer.step()


def assert_same(theirs, ours):
    expected = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    got = lorafx.get_peft_model_state_dict(ours)
    assert got.keys() == expected.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


LIBRARIES = pytest.mark.parametrize("library", [lorafx, optimizers], ids=["lorafx's function", "PEFT's function"])


@LIBRARIES
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["emb", "mid", "out"]},
        {"target_modules": ["mid", "out"], "bias": "lora_only", "modules_to_save": ["norm"]},
    ],
    ids=["embedding", "biases and modules"],
)
def test_loraplus_trains_as_pefts(config, library):
    theirs, ours = both(r=2, **config)
    groups = []
    for function, model in ((optimizers, theirs), (library, ours)):
        optimizer = function.create_loraplus_optimizer(model, torch.optim.AdamW, eps=1e-3, **PLUS)
        groups.append(
            [(g["lr"], g["weight_decay"], sorted(tuple(p.shape) for p in g["params"])) for g in optimizer.param_groups]
        )
        train(model, optimizer)
    assert groups[0] == groups[1]
    assert_same(theirs, ours)


@LIBRARIES
def test_lorafa_trains_as_pefts_by_the_scaling_of_each_site(library):
    theirs, ours = both(r=2, lora_alpha=5, target_modules=["mid", "out"], alpha_pattern={"out": 1})
    before = ours.mid.lora_A.default.weight.detach().clone()
    scalings = []
    for function, model in ((optimizers, theirs), (library, ours)):
        optimizer = function.create_lorafa_optimizer(model, r=2, lora_alpha=5, lr=1e-2, weight_decay=0.1)
        scalings.append([s for s in optimizer.param_groups[0]["scaling_factors"] if s is not None])
        train(model, optimizer)
    assert scalings[0] == scalings[1] == [2.5, 2.5, 0.5, 0.5]
    assert_same(theirs, ours)
    assert torch.equal(ours.mid.lora_A.default.weight, before)


def test_lorafa_keeps_pairs_apart_and_trains_what_is_none():
    ours = lorafx.compile(
        Net(),
        {
            "r": 2,
            "target_modules": ["mid", "emb"],
        },
    )
    ours.add_adapter("second", {"r": 3, "target_modules": ["mid"], "lora_bias": True})
    ours.set_adapter(["default", "second"])
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    train(ours, lorafx.create_lorafa_optimizer(ours, lr=1e-2))
    changed = {name for name, p in ours.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "second" in name or "default" in name} - {
        "mid.lora_A.default.weight",
        "mid.lora_A.second.weight",
    }


def test_pefts_lorafa_pairs_each_a_with_its_b_whatever_else_there_is():
    ours = lorafx.compile(Net(), {"r": 2, "target_modules": ["mid", "emb"]})
    ours.add_adapter("second", {"r": 3, "target_modules": ["mid"], "lora_bias": True})
    ours.set_adapter(["default", "second"])
    twin = copy.deepcopy(ours)
    train(ours, optimizers.create_lorafa_optimizer(ours, r=2, lora_alpha=8, lr=1e-2))
    train(twin, lorafx.create_lorafa_optimizer(twin, lr=1e-2))
    for (name, got), expected in zip(ours.named_parameters(), twin.parameters()):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, msg=name)
    assert all(name in dict(twin.named_parameters()) for name, _ in ours.named_parameters())

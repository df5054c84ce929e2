"""Planning: which sites and tensors an adapter gets, and that nothing is made or changed for it."""

import pytest
import torch
from graphs import Chain
from torch import nn

import lorafx
from lorafx.adapters.planning import plan
from lorafx.errors import SelectionError


def test_planning_touches_nothing():
    model = Chain()
    before = dict(model.named_modules()), dict(model.named_parameters())
    planned = plan(model, "task", lorafx.LoraConfig(target_modules=["second"], bias="lora_only"))
    assert (dict(model.named_modules()), dict(model.named_parameters())) == before
    assert sorted(planned.paths) == [
        "second.lora_A.task.weight",
        "second.lora_B.task.weight",
        "second.trained_bias.task.bias",
    ]


def test_a_bias_of_a_saved_module_is_trained_there():
    config = lorafx.LoraConfig(target_modules=["first"], modules_to_save=["second"], bias="all")
    assert plan(Chain(), "task", config).replaced == {
        "second.weight": "second.modules_to_save.task.weight",
        "second.bias": "second.modules_to_save.task.bias",
    }


def test_only_what_is_called_bias_is_trained():
    """As in PEFT: the packed bias of an attention stays."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    planned = plan(model, "task", lorafx.LoraConfig(r=2, target_modules=["attention"], bias="lora_only"))
    assert planned.replaced == {"attention.out_proj.bias": "attention.out_proj.trained_bias.task.bias"}


class Packed(nn.Linear):
    """A layer that keeps two numbers of its weight in a byte, as quantised ones do."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(torch.zeros(inputs * outputs // 2, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("targets", [["0"], "all-linear"])
def test_a_quantised_weight_that_no_storage_knows_is_refused_by_name(targets):
    base = nn.Sequential(Packed(4, 6), nn.Linear(6, 3), nn.Linear(3, 3))
    before = {path: parameter.requires_grad for path, parameter in base.named_parameters()}
    with pytest.raises(SelectionError, match=r"0 \(test_planning\.Packed\) keeps its weight as torch\.uint8"):
        lorafx.compile(base, {"r": 2, "target_modules": targets})
    assert {path: parameter.requires_grad for path, parameter in base.named_parameters()} == before

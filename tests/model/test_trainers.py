"""What trainers ask of a model with adapters: to pass for PEFT's, and to take a file's values where they are."""

from __future__ import annotations

import copy

import models
import peft
import pytest
import torch
from huggingface_hub import ModelCard

import lorafx
from lorafx.errors import AdapterError


def adapted(**config):
    lora = lorafx.compile(models.mlp(), {"r": 3, "target_modules": "all-linear", "init_lora_weights": False, **config})
    return lora, models.call(lora)


def test_loading_into_an_adapter_that_is_there(tmp_path):
    lora, (x,) = adapted()
    lora.save_pretrained(tmp_path)
    expected, parameters = lora(x), [p for p in lora.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1)
    assert not torch.equal(lora(x), expected)
    lora.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(lora(x), expected) and lora.training
    assert all(
        a is b and a.requires_grad for a, b in zip(parameters, (p for p in lora.parameters() if p.requires_grad))
    )
    lora.load_adapter(tmp_path, "default")
    assert not lora.training and all(p.requires_grad for p in parameters)
    lora.merge_adapter()
    with pytest.raises(AdapterError, match="merged"):
        lora.load_adapter(tmp_path, "default")


@pytest.mark.parametrize(
    ("change", "named"), [({"lora_alpha": 5}, "lora_alpha"), ({"target_modules": ["up"]}, "modules")]
)
def test_an_adapter_takes_no_other_adapter_s_values(tmp_path, change, named):
    lora, (x,) = adapted()
    adapted(**change)[0].save_pretrained(tmp_path)
    before = lora(x)
    with pytest.raises(AdapterError, match=f"already.*{named}"):
        lora.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(lora(x), before)


def test_peft_s_classes_and_habits_are_answered_to(tmp_path):
    base = models.t5()
    lora = lorafx.compile(base, {"r": 2, "target_modules": ["q"]})
    assert isinstance(lora, peft.PeftModel) and isinstance(lora, type(base)) and not isinstance(base, peft.PeftModel)
    assert not issubclass(type(lora), peft.PeftModel) and not hasattr(lora, "get_prompt")
    assert lora.base_model.model is lora is lora.get_base_model() and "model" not in vars(base)
    cls = lora.__class__
    lora.__class__ = type(f"Sharded{cls.__name__}", (cls,), {"extra": 1})  # as FSDP2 does
    assert type(lora).__name__ == f"Sharded{type(base).__name__}" and lora.extra == 1
    assert isinstance(lora, peft.PeftModel) and isinstance(lora, lorafx.AdaptedModel) and isinstance(lora, type(base))
    copied = copy.deepcopy(lora)
    assert copied.base_model.model is copied and type(copied).__name__ == type(base).__name__
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nHand-written.\n")
    lora.config._name_or_path = "some/base"
    lora.create_or_update_model_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("peft", "some/base", "mit")
    assert "Hand-written." in card.text

"""Adapters of several kinds on one model, as PEFT's mixed models, which cannot be saved: each has a folder here."""

import pytest
import torch
from graphs import Chain

import lorafx

TARGETS = {"target_modules": ["first", "second"]}


@pytest.mark.slow
def test_a_mixed_model_is_saved_and_loaded_and_its_order_is_stated(tmp_path):
    torch.manual_seed(0)
    model, again = Chain().double(), Chain().double()
    again.load_state_dict(model.state_dict())
    x = torch.randn(5, 4, dtype=torch.float64)
    lora = lorafx.get_peft_model(model, lorafx.LoraConfig(r=2, **TARGETS), "lora", mixed=True)
    lora.add_adapter("ia3", lorafx.IA3Config(**TARGETS, feedforward_modules=[]))
    lora.add_adapter("vera", lorafx.VeraConfig(r=3, **TARGETS))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if any(f".{adapter}" in name for adapter in lora.peft_config):
                parameter.add_(torch.randn_like(parameter) / 4)
    assert isinstance(lora, lorafx.PeftMixedModel)
    orders = (["lora", "ia3", "vera"], ["ia3", "vera", "lora"])
    expected = []
    for order in orders:
        lora.set_adapter(order)
        expected.append(lora(x))
    assert not torch.allclose(*expected), "the order makes a difference"
    lora.save_pretrained(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["ia3", "lora", "vera"]

    loaded = lorafx.PeftMixedModel.from_pretrained(again, tmp_path / "lora", "lora")
    for name in ("ia3", "vera"):
        loaded.load_adapter(tmp_path / name, name)
    for order, outputs in zip(orders, expected):
        loaded.set_adapter(order)
        torch.testing.assert_close(loaded(x), outputs, rtol=1e-12, atol=1e-12)
        loaded.merge_adapter()
        torch.testing.assert_close(again(x), outputs, rtol=1e-12, atol=1e-12)
        loaded.unmerge_adapter()

"""PEFT's functions that take a model: each says what the model's method does, of a model that is compiled as well."""

import pytest
import torch
from graphs import Chain, adapted

import lorafx
from lorafx.errors import AdapterError


@pytest.fixture
def lora():
    return adapted(Chain().double())


@pytest.mark.parametrize("wrapped", [lambda lora: lora, lambda lora: torch.compile(lora, backend="eager")])
def test_they_do_what_the_methods_do(lora, wrapped, tmp_path):
    model, x = wrapped(lora), torch.randn(5, 4, dtype=torch.float64)
    assert lorafx.get_layer_status(model) == lora.get_layer_status()
    assert lorafx.get_model_status(model) == lora.get_model_status()
    before = lora(x)
    with lorafx.rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(lora(x), lora._lorafx.base(x), rtol=1e-12, atol=1e-12)
    lora.save_pretrained(tmp_path)
    lorafx.prepare_model_for_compiled_hotswap(model, target_rank=4)
    with torch.no_grad():
        lora.second.lora_B.default.weight.zero_()
    lorafx.hotswap_adapter(model, tmp_path, "default", subfolder=None)
    torch.testing.assert_close(lora(x), before, rtol=1e-12, atol=1e-12)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(AdapterError, match="this Chain is not adapted"):
        lorafx.get_model_status(Chain())

"""Building: which dtype and device an adapter's tensors have, and that they are hung all or not at all."""

import pytest
import torch
from torch import nn

import lorafx
from lorafx.adapters.building import build
from lorafx.adapters.planning import plan

VERA = {"peft_type": "VERA", "r": 3, "target_modules": ["0", "1"]}


@pytest.mark.parametrize("widened", [True, False])
def test_what_is_fixed_is_widened_like_what_trains(widened):
    base = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).bfloat16()
    lora = lorafx.compile(base, VERA, autocast_adapter_dtype=widened)
    dtype = torch.float32 if widened else torch.bfloat16
    assert lora[0].vera_lambda_b.default.dtype == lora[0].vera_A.default.shared.dtype == dtype
    assert lora(torch.randn(4, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_sites_of_several_dtypes_have_one_shared_tensor_for_each():
    base = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 5))
    base[1].double()
    lora = lorafx.compile(base, VERA | {"target_modules": ["0", "1", "2"]})
    one, other, third = (layer.vera_A.default.shared for layer in lora)
    assert one is third and other.dtype == torch.float64
    assert torch.equal(one.double(), other)


def test_on_the_meta_device_nothing_is_lost_that_no_state_dict_has():
    base = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    lora = lorafx.compile(base, VERA, low_cpu_mem_usage=True)
    assert lora[0].vera_lambda_b.default.is_meta and not lora[0].vera_A.default.shared.is_meta
    drawn = lorafx.compile(lora.unload(), VERA)[0].vera_A.default.shared
    assert torch.equal(lorafx.compile(base, VERA, low_cpu_mem_usage=True)[0].vera_A.default.shared, drawn)


UNSAVED = {
    "shared": VERA,
    "its own": lorafx.FourierFTConfig(n_frequency=4, target_modules=["0", "1"], init_weights=False),
    "normed": {"r": 2, "target_modules": ["0", "1"], "use_dora": True, "init_lora_weights": False},
}


@pytest.mark.parametrize("config", UNSAVED.values(), ids=UNSAVED)
def test_a_base_on_the_meta_device_gets_all_that_a_state_dict_does_not_bring(config):
    def base():
        return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))

    lora, x = lorafx.compile(base(), config), torch.randn(4, 5)
    with torch.device("meta"):
        bare = lorafx.compile(base(), config)
    assert all(tensor.is_meta for tensor in (*bare.parameters(), *bare.buffers()))
    bare.load_state_dict(lora.state_dict(), assign=True)
    assert torch.equal(bare(x), lora(x))


def test_what_cannot_be_hung_leaves_nothing_behind():
    base = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    adapter = plan(base, "default", lorafx.VeraConfig(r=3, target_modules=["0", "1"]))
    base[1].vera_lambda_d = nn.Parameter(torch.zeros(2))  # a name that the adapter needs
    before = {name for name, _ in base.named_modules()}
    with pytest.raises((KeyError, AttributeError, TypeError)):
        build(base, adapter)
    assert {name for name, _ in base.named_modules()} == before


def test_an_adapter_that_is_added_for_inference_may_train_later():
    lora = lorafx.compile(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), VERA, capture="sites")
    with torch.inference_mode():
        lora.add_adapter("later", {"r": 2, "target_modules": ["1"], "modules_to_save": ["0"]})
    lora.set_adapter("later")
    lora(torch.randn(4, 5)).sum().backward()
    assert lora[1].lora_B.later.weight.grad is not None

"""What an adapted model merges: the adapters asked for, in the order in which they act, and back again."""

import warnings

import pytest
import torch
from graphs import Chain, adapted

from lorafx.errors import AdapterError

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def lora():
    lora = adapted(Chain().double(), target_modules=["second"])
    lora.add_adapter("other", {"r": 3, "target_modules": ["first", "second"], "init_lora_weights": False})
    return lora


def test_the_active_ones_unless_others_are_named(lora):
    lora.merge_adapter()
    assert lora.merged_adapters == ["default"]
    lora.merge_adapter(["other"])
    assert lora.merged_adapters == ["default", "other"]
    lora.unmerge_adapter()
    lora.set_adapter(["other", "default"])
    lora.merge_adapter(["default", "other"])
    assert lora.merged_adapters == ["other", "default"], "in the order in which they act"


def test_what_is_merged_already_or_not_there_is_said(lora):
    lora.merge_adapter()
    with pytest.warns(UserWarning, match="merged already"):
        lora.merge_adapter()
    with pytest.raises(AdapterError, match="no adapter 'third'"):
        lora.merge_adapter(["third"])
    assert lora.merged_adapters == ["default"]


def test_unloading_merged_gives_the_base_with_just_these_adapters(lora):
    x = torch.randn(5, 4, dtype=torch.float64)
    lora.set_adapter(["default", "other"])
    both = lora(x)
    lora.set_adapter("other")
    lora.merge_adapter()
    base = lora.merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(base(x), both, **CLOSE)
    assert not [name for name, _ in base.named_parameters() if "lora" in name]


def test_merging_and_unmerging_twice_is_said_and_nothing_else_is():
    lora = adapted(Chain())
    with pytest.warns(UserWarning, match="nothing to unmerge"):
        lora.unmerge_adapter()
    lora.merge_adapter()
    with pytest.warns(UserWarning, match="merged already"):
        lora.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.unmerge_adapter()
        with lora.disable_adapter():
            pass
        lora.unload()

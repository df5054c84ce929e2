"""What an adapted model merges: the adapters asked for, in the order in which they act, and back again."""

import warnings

import pytest
import torch
from graphs import Chain, adapted
from transformers import T5Config, T5ForConditionalGeneration

import lorafx
from lorafx.errors import AdapterError, MergeError

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


def trains_biases():
    """A model whose first adapter trains the bias that the second, merged into it, adds to; both active."""
    lora = adapted(Chain().double(), target_modules=["second"], bias="lora_only")
    lora.add_adapter("other", {"r": 3, "target_modules": ["second"], "lora_bias": True, "init_lora_weights": False})
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn_like(parameter))
    lora.set_adapter(["default", "other"])
    return lora, torch.randn(5, 4, dtype=torch.float64)


@pytest.mark.parametrize("merged_before", [False, True])
def test_what_is_merged_for_good_is_not_merged_into_copies_that_are_dropped(merged_before):
    lora, x = trains_biases()
    lora.set_adapter("other")
    alone = lora(x)
    lora.set_adapter(["default", "other"])
    if merged_before:
        lora.merge_adapter(["other"])
    base = lora.merge_and_unload(adapter_names=["other"])
    torch.testing.assert_close(base(x), alone, **CLOSE)


def test_an_adapter_that_cannot_be_merged_for_good_leaves_the_others_active():
    lora, x = trains_biases()
    before = lora(x)
    with torch.no_grad():
        lora.second.lora_A.other.weight.fill_(torch.inf)
    with pytest.raises(MergeError, match="finite"):
        lora.merge_and_unload(adapter_names=["other"], safe_merge=True)
    assert lora.active_adapters == ["default", "other"] and lora.merged_adapters == []
    lora.set_adapter("default")
    assert lora(x).shape == before.shape and lora(x).isfinite().all()


def test_what_was_merged_while_the_others_were_disabled_acts_with_their_copies():
    lora, x = trains_biases()
    both = lora(x)
    lora.disable_adapter_layers()
    lora.merge_adapter(["other"])
    lora.enable_adapter_layers()
    torch.testing.assert_close(lora(x), both, **CLOSE)


def test_a_copy_that_others_are_merged_into_is_kept_as_it_is():
    lora, x = trains_biases()
    values = {key: value.clone() for key, value in lorafx.get_peft_model_state_dict(lora).items()}
    lora.merge_adapter(["other"])
    both = lora(x)
    for change in (lambda: lora.delete_adapter("default"), lambda: lora.load_adapter_state_dict(values)):
        with pytest.raises(AdapterError, match=r"'other' merged into second\.bias as 'default' trains it"):
            change()
    assert torch.equal(lora(x), both)
    assert all(torch.equal(v, values[key]) for key, v in lorafx.get_peft_model_state_dict(lora).items())
    lora.unmerge_adapter()
    lora.load_adapter_state_dict(values)


def test_adapters_with_their_own_copies_of_one_tensor_are_not_merged_together():
    lora = adapted(Chain(), target_modules=["first"], modules_to_save=["second"])
    lora.add_adapter("other", {"r": 3, "target_modules": ["first"], "modules_to_save": ["second"]})
    both = ["default", "other"]
    for merge in (
        lambda: lora.merge_adapter(["other"]),
        lambda: lora.merge_and_unload(adapter_names=both),
    ):
        with pytest.raises(AdapterError, match=r"each has its own second\.weight"):
            merge()
    assert lora.merged_adapters == [] and lora.active_adapters == ["default"]


def test_what_is_merged_while_rescaled_is_merged_as_it_is_afterwards(lora):
    x = torch.randn(5, 4, dtype=torch.float64)
    before = lora(x)
    with lora.rescale(0.5):
        lora.merge_adapter()
        halved = lora(x)
    assert lora.merged_adapters == ["default"] and not torch.allclose(halved, before)
    torch.testing.assert_close(lora(x), before, **CLOSE)


@pytest.mark.parametrize("meanwhile", ["disable_adapter", "rescale"])
def test_adapters_may_be_deleted_meanwhile(lora, meanwhile):
    with lora.rescale(2.0) if meanwhile == "rescale" else lora.disable_adapter():
        lora.delete_adapter("default")
    assert lora.active_adapters == ["other"]
    assert {"other" in name for name, p in lora.named_parameters() if p.requires_grad} == {True}


def test_adapters_made_active_while_disabled_act_afterwards(lora):
    x = torch.randn(5, 4, dtype=torch.float64)
    lora.set_adapter("other")
    other = lora(x)
    lora.set_adapter("default")
    with lora.disable_adapter():
        base = lora(x)
        lora.set_adapter("other")
        assert torch.equal(lora(x), base) and not any(p.requires_grad for p in lora.parameters())
    assert torch.equal(lora(x), other)
    assert {"other" in name for name, p in lora.named_parameters() if p.requires_grad} == {True}


def test_one_name_is_one_adapter_and_its_letters_are_none(lora, tmp_path):
    for letter in "ab":
        lora.add_adapter(letter, {"target_modules": ["first"]})
    lora.add_adapter("ab", {"target_modules": ["first"]})
    lora.merge_adapter("ab")
    assert lora.merged_adapters == ["ab"]
    lora.save_pretrained(tmp_path, selected_adapters="ab")
    assert [folder.name for folder in tmp_path.iterdir()] == ["ab"]
    assert lora.merge_and_unload(adapter_names="ab") is not None


@pytest.mark.parametrize("merged_before", [False, True])
def test_ends_of_a_tie_that_merging_undoes_come_back_from_a_file(merged_before, tmp_path):
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    call = {"input_ids": torch.randint(50, (2, 5)), "decoder_input_ids": torch.randint(50, (2, 3))}
    with pytest.warns(UserWarning, match="tied no longer"):
        lora = lorafx.compile(base, {"r": 2, "target_modules": ["q"], "modules_to_save": ["shared"]}, capture="sites")
    with torch.no_grad():
        lora.shared.modules_to_save.default.weight.add_(torch.randn(50, 16))
        expected = lora(**call).logits
        if merged_before:
            lora.merge_adapter()
        lora.merge_and_unload().save_pretrained(tmp_path)
        again = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(**call).logits, expected)


def test_a_base_made_for_inference_is_merged_into_under_inference_mode():
    with torch.inference_mode():
        base = Chain()
    lora = adapted(base, target_modules=["second"])
    before = base.second.weight.clone()
    with pytest.raises(MergeError, match=r"second.weight was made under `torch.inference_mode\(\)`"):
        lora.merge_adapter()
    assert torch.equal(base.second.weight, before) and not lora.merged_adapters
    with torch.inference_mode():
        lora.merge_adapter()
        assert not torch.equal(base.second.weight, before)
        lora.unmerge_adapter()
    assert torch.equal(base.second.weight, before)

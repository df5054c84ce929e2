"""LoRA with `trainable_token_indices`, beside PEFT's."""

import copy
import warnings

import models
import pytest
import torch
from safetensors.torch import load_file

import lorafx
from lorafx.errors import ConfigError, SelectionError

TOKENS = [7, 1, 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*one site")
@pytest.mark.parametrize(
    ("tokens", "tied", "dora"),
    [(TOKENS, True, False), ({"embed_tokens": TOKENS}, False, False), (TOKENS, True, True)],
    ids=["tied", "by name", "DoRA"],
)
def test_lora_has_them_beside_it_as_in_peft(tokens, tied, dora, tmp_path):
    peft = pytest.importorskip("peft")
    fields = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": tokens, "use_dora": dora}
    fields |= {"init_lora_weights": False}
    base, call = models.llama(num_hidden_layers=1, tie_word_embeddings=tied), models.call("llama", labels=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
        with torch.no_grad():
            theirs.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].normal_()
        theirs.save_pretrained(tmp_path / "theirs")
    lora = lorafx.load(base, tmp_path / "theirs", is_trainable=True)
    with torch.no_grad():
        expected, found = (models.logits(models.run(model.eval(), call)) for model in (theirs, lora))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        lora.save_pretrained(tmp_path / "ours")
        lora.merge_adapter()
        torch.testing.assert_close(models.logits(models.run(lora, call)), expected, rtol=1e-4, atol=1e-4)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(lora.unload()), tmp_path / "ours")
        torch.testing.assert_close(models.logits(models.run(again.eval(), call)), expected, rtol=0, atol=0)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_module_cannot_have_both():
    fields = {"r": 2, "target_modules": ["wte"], "trainable_token_indices": {"wte": TOKENS}}
    with pytest.raises(ConfigError, match="is in `target_modules` and in `trainable_token_indices`"):
        lorafx.compile(models.gpt2(), lorafx.LoraConfig(**fields))
    fields = {"target_modules": ["c_attn"], "trainable_token_indices": {"nowhere": [1]}}
    with pytest.raises(SelectionError, match="asks for nowhere, which the model does not have"):
        lorafx.compile(models.gpt2(), lorafx.LoraConfig(**fields))


def test_its_scale_is_that_of_lora_alone():
    fields = {"r": 2, "target_modules": ["c_fc"], "trainable_token_indices": TOKENS, "init_lora_weights": False}
    lora = lorafx.compile(models.gpt2(), lorafx.LoraConfig(**fields), capture="sites")
    call = models.call("gpt2", labels=False)
    with torch.no_grad():
        before = models.logits(models.run(lora.eval(), call))
        lora.set_scale("default", 0.5)
        assert not torch.equal(models.logits(models.run(lora, call)), before)
    assert all("c_fc" in site for site in lora._lorafx.adapters["default"].scales)

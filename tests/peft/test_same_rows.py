"""Rows with adapters of their own give what PEFT gives for the same files and names, in calls and in `generate`."""

import copy

import peft
import pytest
import torch
from models import gpt2, llama
from rows import BASE

import lorafx

pytestmark = pytest.mark.slow  # real PEFT beside lorafx


@pytest.mark.parametrize(("make", "targets"), [(llama, ["q_proj", "embed_tokens"]), (gpt2, ["c_attn", "c_fc"])])
def test_rows_are_those_of_peft(make, targets, tmp_path, monkeypatch):
    monkeypatch.setattr("lorafx.serving.early_calls.REPEATS", 100)
    base, options = make(), {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    configs = {
        "a": peft.LoraConfig(r=3, lora_alpha=9, target_modules=targets, **options),
        "b": peft.LoraConfig(r=5, use_rslora=True, target_modules=targets[:1], **options),
    }
    theirs = peft.get_peft_model(copy.deepcopy(base), configs["a"], adapter_name="a")
    theirs.add_adapter("b", configs["b"])
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = lorafx.load(base, tmp_path / "a", adapter_name="a")
    ours.load_adapter(tmp_path / "b", "b")
    ids, names = torch.randint(3, 90, (4, 6)), ["b", BASE, "a", "b"]
    with torch.no_grad():
        expected = theirs.eval()(ids, adapter_names=names).logits
        found = ours.eval()(ids, adapter_names=names).logits
    limit = 512 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)
    mask = torch.ones_like(ids)
    how = {"adapter_names": names, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    assert torch.equal(ours.generate(input_ids=ids, **how), theirs.generate(input_ids=ids, **how))

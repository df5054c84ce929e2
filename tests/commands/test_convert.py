"""`lorafx convert`: PEFT's old formats, as today's."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import lorafx.testing
from lorafx.__main__ import main


@pytest.fixture
def old(on_disk, tmp_path):
    """The adapter as PEFT 0.2 would have written it: tensors in a pickle, of one memory, and fields that are gone."""
    folder, _ = on_disk
    (tmp_path / "old").mkdir()
    tensors = load_file(folder / "adapter/adapter_model.safetensors")
    whole = torch.cat([tensor.flatten() for tensor in tensors.values()])
    views = dict(zip(tensors, whole.split([tensor.numel() for tensor in tensors.values()])))
    torch.save({key: views[key].view_as(tensors[key]) for key in tensors}, tmp_path / "old/adapter_model.bin")
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    del config["peft_version"]
    config |= {"merge_weights": False, "enable_lora": None}
    (tmp_path / "old/adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "old"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:config fields that lorafx does not know")
def test_a_pickle_becomes_safetensors_that_lorafx_and_peft_load(on_disk, old, tmp_path, capsys):
    folder, _ = on_disk
    assert main(["convert", str(old), "-o", str(tmp_path / "new"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"out": str(tmp_path / "new"), "tensors": 12, "left_out": ["merge_weights", "enable_lora"]}
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "merge_weights" not in (tmp_path / "new/adapter_config.json").read_text()
    lorafx.testing.assert_same_tensors(
        load_file(tmp_path / "new/adapter_model.safetensors"), load_file(folder / "adapter/adapter_model.safetensors")
    )
    ids = torch.randint(0, 32, (2, 5))
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), tmp_path / "new")
    ours = lorafx.load(LlamaForCausalLM.from_pretrained(folder / "base"), tmp_path / "new")
    limits = lorafx.testing.tolerance(ours, lambda model: model(input_ids=ids).logits)
    with torch.no_grad():
        lorafx.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, limits)


@pytest.mark.filterwarnings("ignore:config fields that lorafx does not know")
def test_what_nobody_reads_any_longer_or_is_there_already_is_refused(old, tmp_path, capsys):
    assert main(["convert", str(old), "-o", str(old)]) == 1
    assert "is there already" in capsys.readouterr().err
    config = json.loads((old / "adapter_config.json").read_text()) | {"enable_lora": [True, False, True]}
    (old / "adapter_config.json").write_text(json.dumps(config))
    assert main(["convert", str(old), "-o", str(tmp_path / "new")]) == 1
    assert "enable_lora" in capsys.readouterr().err and not (tmp_path / "new").exists()

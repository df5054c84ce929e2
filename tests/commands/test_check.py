"""`lorafx check`: a verdict for a base and an adapter."""

import json

import pytest
import torch

from lorafx.__main__ import main


@pytest.mark.slow
def test_check_holds_for_a_sound_pair_and_says_what_does_not(on_disk, capsys, monkeypatch):
    folder, _ = on_disk
    words = ["check", str(folder / "base"), str(folder / "adapter"), "--json"]
    assert main(words) == 0
    results = json.loads(capsys.readouterr().out)
    assert len(results) == 7 and all(each["holds"] for each in results)
    monkeypatch.setattr(
        "lorafx.adapters.kinds.lora.Lora.delta", lambda self, name, at: at.product(at.lora_A, at.lora_B)
    )
    assert main(words) == 1
    wrong = [each["check"] for each in json.loads(capsys.readouterr().out) if not each["holds"]]
    assert wrong == ["merged, outputs are the same", "a plain model with W + ΔW for weights gives the same"]


@pytest.mark.slow
def test_check_takes_a_config_alone(on_disk, capsys, tmp_path):
    folder, _ = on_disk
    (tmp_path / "config.json").write_text(json.dumps({"r": 2, "target_modules": ["down_proj"]}))
    torch.manual_seed(5)
    assert main(["check", str(folder / "base"), str(tmp_path / "config.json")]) == 0
    assert "holds" in capsys.readouterr().out

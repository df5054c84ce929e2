"""`lorafx info`: what an adapter's files say."""

import json
import shutil

import pytest

from lorafx.__main__ import main


def test_info_tells_of_the_config_and_of_each_tensor_by_layer(on_disk, capsys):
    folder, lora = on_disk
    assert main(["info", str(folder / "adapter"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "LORA" and told["options"]["r"] == 3 and told["dtypes"] == ["float32"]
    a, b = 3 * 16 + 16 * 3, 3 * 16 + 24 * 3
    assert told["parameters"] == 3 * (a + b) and told["bytes"] == 4 * told["parameters"]
    named = {each["key"]: each for each in told["tensors"]}
    up = named["model.layers.*.mlp.up_proj.lora_B.weight"]
    assert up["shapes"] == [[24, 3]]
    expected = [layer.mlp.up_proj.lora_B.default.weight.norm().item() for layer in lora.model.layers]
    assert up["norms"] == pytest.approx(expected, rel=1e-6)


def test_info_tells_what_is_false_or_empty_on_purpose(on_disk, capsys, tmp_path):
    adapter = shutil.copytree(on_disk[0] / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    said = {"kasa_config": {}, "init_lora_weights": False, "target_parameters": []}
    (adapter / "adapter_config.json").write_text(json.dumps(config | said))
    assert main(["info", str(adapter), "--json"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert options["kasa_config"] == {} and options["init_lora_weights"] is False
    assert options.keys().isdisjoint({"target_parameters", "loftq_config", "rank_pattern", "use_dora"})


def test_info_prints_a_table_and_draws(on_disk, capsys, tmp_path):
    folder, _ = on_disk
    assert main(["info", str(folder / "adapter"), "--plot", str(tmp_path / "norms.png")]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj.lora_A.weight" in printed and "r=3" in printed
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")


def test_an_adapter_that_is_not_there_is_one_line(on_disk, capsys, tmp_path):
    assert main(["info", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("info: ") and error.count("\n") == 1 and "adapter_config.json" in error

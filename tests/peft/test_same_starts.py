"""Start values that are taken out of the base are PEFT's, and each library reads what the other has saved of them."""

from __future__ import annotations

import copy
import importlib.util
import json

import models
import peft
import pytest
import torch
from on_cpu import OnCpu
from safetensors.torch import load_file
from torch import nn

import lorafx

pytestmark = pytest.mark.slow  # real PEFT beside lorafx
QUANTISES = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="LoftQ quantises by bitsandbytes")
CASES = [
    ("llama", {"init_lora_weights": "pissa"}),
    ("gpt2", {"init_lora_weights": "pissa", "target_modules": ["c_fc", "c_proj"]}),
    ("llama", {"init_lora_weights": "olora", "rank_pattern": {"q_proj": 3}, "use_rslora": True}),
    *(
        pytest.param("llama", {"init_lora_weights": "loftq", "loftq_config": options}, marks=QUANTISES)
        for options in ({"loftq_bits": 4, "loftq_iter": 3}, peft.LoftQConfig(loftq_bits=8, loftq_iter=2))
    ),
]


def both(base: nn.Module, config: dict) -> tuple[nn.Module, nn.Module]:
    settings = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    with OnCpu():
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    return lorafx.compile(base, settings), theirs


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    atoms = ("base_model.model.", ".base_layer")
    return {name.removeprefix(atoms[0]).replace(atoms[1], ""): p for name, p in model.named_parameters()}


def train(model: nn.Module) -> torch.Tensor:
    """Move the adapter a little; what the model computes then."""
    with torch.no_grad():
        for name, parameter in sorted(parameters(model).items()):
            if parameter.requires_grad:
                parameter.mul_(1 + 0.01 * len(name))
    return outputs(model)


def outputs(model: nn.Module) -> torch.Tensor:
    kind = "gpt2" if hasattr(model, "transformer") or hasattr(model.get_base_model(), "transformer") else "llama"
    with torch.no_grad():
        return model.eval()(**models.call(kind)).logits


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out", "ignore:.*Rank-Stabilized")
@pytest.mark.parametrize(("family", "config"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_start_values_and_what_is_left_are_pefts_and_files_are_exchanged(tmp_path, family, config, dtype):
    def base():
        return getattr(models, family)().to(dtype)

    ours, theirs = both(base(), config)
    mine, expected = parameters(ours), parameters(theirs)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():  # the same library's functions on the same numbers
        torch.testing.assert_close(mine[name], value, rtol=torch.finfo(dtype).eps, atol=1e-6)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 2e-2}
    computed = train(ours)
    torch.testing.assert_close(computed, train(theirs), **tolerance)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    with OnCpu():
        read = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    torch.testing.assert_close(outputs(read), computed, **tolerance)
    again = lorafx.load(base(), tmp_path / "theirs")
    torch.testing.assert_close(outputs(again), computed, **tolerance)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_reads_what_was_converted_and_writes_the_same(tmp_path, init):
    ours, theirs = both(models.llama(), {"init_lora_weights": init, "alpha_pattern": {"q_proj": 3}})
    ours.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's documentation says
    theirs.save_pretrained(tmp_path / "their_start")
    computed = train(ours)
    train(theirs)
    start = "path_initial_model_for_weight_conversion"
    ours.save_pretrained(tmp_path / "ours", **{start: tmp_path / "start"})
    theirs.save_pretrained(tmp_path / "theirs", **{start: str(tmp_path / "their_start")})
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert first.keys() == second.keys()
    for key, value in second.items():
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights"):
        assert configs[0][field] == configs[1][field], field
    read = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "ours")
    torch.testing.assert_close(outputs(read), computed, rtol=0, atol=1e-5)


@QUANTISES
def test_olora_on_a_quantised_base_quantises_what_is_left_as_peft_does(tmp_path):
    import quantised

    first, second = (quantised.quantised(tmp_path, "fp4") for _ in range(2))
    config = quantised.CONFIG | {"init_lora_weights": "olora"}
    ours, theirs = lorafx.compile(first, config), peft.get_peft_model(second, peft.LoraConfig(**config))
    quantised.as_trained(theirs)
    torch.testing.assert_close(outputs(ours), outputs(theirs), rtol=0, atol=1e-5)


@QUANTISES
def test_what_pissa_leaves_is_quantised_and_the_adapter_loaded_there_as_in_peft(tmp_path):
    import quantised

    base = models.llama()
    ours, theirs = both(base, {"init_lora_weights": "pissa"})
    config = ours.peft_config["default"]
    ours.save_pretrained(tmp_path / "ours")
    base.save_pretrained(tmp_path / "left")  # the object that was adapted, which is left with the rest
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.unload().save_pretrained(tmp_path / "their_left")

    with pytest.raises(lorafx.errors.ConfigError, match="quantise what is left"):
        lorafx.load(quantised.quantised(tmp_path / "left", "fp4"), tmp_path / "ours")
    again = lorafx.load(
        quantised.quantised(tmp_path / "left", "fp4"),
        tmp_path / "ours",
        config=config.replace(init_lora_weights=True),
    )
    read = peft.PeftModel.from_pretrained(quantised.quantised(tmp_path / "their_left", "fp4"), tmp_path / "theirs")
    torch.testing.assert_close(outputs(again), outputs(quantised.as_trained(read)), rtol=0, atol=1e-5)

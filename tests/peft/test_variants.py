"""What variants of LoRA have beside their equation, as PEFT's have it. The rest is in `test_kinds.py`.

PEFT has QA-LoRA for GPTQ's layers alone; here such a layer wraps one that is not quantised.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import models
import peft
import pytest
import torch
from kind_cases import CASES, CLOSE, IN_FLOAT32, KindCase, both, shake, step, trained
from peft.tuners.lora.gptq import GPTQLoraLinear
from safetensors.torch import load_file
from torch import nn

import lorafx
from lorafx.errors import AdapterError
from lorafx.serving import early_calls

FIELDS = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.3, "use_qalora": True, "qalora_group_size": 4}
CASE = KindCase("linear", "LoraConfig", FIELDS)


def theirs() -> peft.LoraConfig:
    config = CASE.theirs()
    config._register_custom_module({nn.Linear: GPTQLoraLinear})
    return config


@pytest.mark.slow
def test_qalora_computes_trains_and_files_what_pefts_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_calls, "REPEATS", 1)
    base, x = CASE.base(), CASE.x()
    model = peft.get_peft_model(copy.deepcopy(base), theirs())
    shake(model)
    model.save_pretrained(tmp_path / "theirs")
    ours = lorafx.load(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True)
    for _ in range(2):  # by sites, then by a graph
        (expected, wanted), (found, gradients) = step(model, CASE.inputs), step(ours, CASE.inputs)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert gradients.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(gradients[name], gradient, **CLOSE)
    assert ours.explain().calls[-1].served_by == "graph"

    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", config=theirs()).eval()
    expected, before = model.eval()(x), {name: t.clone() for name, t in ours.state_dict().items()}
    assert torch.equal(again(x), expected)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[1][key], files[0][key]) for key in files[0])
    ours.eval().merge_adapter()  # which PEFT has not for such layers
    torch.testing.assert_close(ours(x), expected, **CLOSE)
    ours.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_groups_of_inputs_are_pooled_on_4_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from quantised import quantised

    base = quantised(tmp_path / "base", "nf4")
    lora = lorafx.compile(base, {**FIELDS, "target_modules": ["q_proj"], "init_lora_weights": False}, random_state=0)
    layer = lora.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features)
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    pooled = x.unflatten(1, (-1, 4)).mean(2) * a.shape[1]
    with torch.no_grad():
        expected = base.model.layers[0].self_attn.q_proj(x) + pooled @ a.T @ b.T * (5 / 3)
        torch.testing.assert_close(lora.eval().model.layers[0].self_attn.q_proj(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_kasa_trains_with_its_penalty_as_pefts_does(tmp_path: Path) -> None:
    case = CASES["kasa patterns"]
    pair = both(dataclasses.replace(case, fields=case.fields | {"lora_dropout": 0.0}), tmp_path)
    optimizers = [torch.optim.Adam(trained(model).values(), 0.02) for model in (pair.ours, pair.theirs)]
    for _ in range(3):
        losses = []
        for model, optimizer in zip((pair.ours, pair.theirs), optimizers):
            penalty = model.get_penalty() if model is pair.ours else model._get_kasa_loss()
            losses.append(model.train()(pair.case.x()).square().mean() + penalty)
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses, **IN_FLOAT32)
    assert float(pair.ours.get_penalty("default")) > 0.5
    with pytest.raises(AdapterError, match=r"'default' changes the base's weights for good \(Kasa\)"):
        pair.ours.add_adapter("lora", {"r": 2, "target_modules": ["up"]})
    pair.ours.add_adapter("other", pair.case.ours())
    pair.ours.set_adapter(["default", "other"])
    with pytest.raises(AttributeError, match="get_penalty"):
        pair.ours._get_kasa_loss()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*saved along")
def test_mica_starts_trains_and_files_what_pefts_does(tmp_path: Path) -> None:
    """In float32: PEFT takes singular vectors of nothing wider."""
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"}
    base, call = models.llama(num_hidden_layers=1), models.call("llama", labels=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    pair = [lorafx.compile(copy.deepcopy(base), fields, capture="graph"), theirs]
    optimizers = [torch.optim.SGD(trained(model).values(), 0.1) for model in pair]
    assert all("lora_B" not in name and "embedding_B" not in name for name in trained(pair[0]))
    for _ in range(3):
        (found, gradients), (expected, wanted) = (step(model, call) for model in pair)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert gradients.keys() == wanted.keys()
        for optimizer in optimizers:
            optimizer.step()
    for model, name in zip(pair, ("ours", "theirs")):
        lorafx.of(model).save_pretrained(tmp_path / name) if name == "ours" else model.save_pretrained(tmp_path / name)
    ours, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    again = lorafx.load(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True)
    assert trained(again).keys() == trained(theirs).keys()
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", is_trainable=True)
    assert trained(read).keys() == trained(theirs).keys()
    with torch.no_grad():
        results = [models.logits(models.run(model.eval(), call)) for model in (pair[0], read, again, theirs)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[2], results[3], rtol=1e-5, atol=1e-5)

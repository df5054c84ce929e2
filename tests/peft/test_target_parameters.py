"""`target_parameters`: PEFT's files, outputs, gradients and merged weights, on experts of transformers' models."""

import copy

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import lorafx

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]


def qwen():
    config = transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=20, num_experts=3)
    return config, [*EXPERTS, "mlp.gate.weight"]


def oss():
    return transformers.GptOssConfig(**SIZES, num_local_experts=3), EXPERTS


# Grouped products are read in graphs, the loop of `eager` by sites.
@pytest.mark.parametrize(
    "made, how", [pytest.param(qwen, "grouped_mm", marks=pytest.mark.slow), (qwen, "eager"), (oss, "grouped_mm")]
)
def test_files_outputs_gradients_and_merged_weights_are_pefts(tmp_path, made, how):
    torch.manual_seed(0)
    config, parameters = made()
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    base.set_experts_implementation(how)
    for p in base.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": False}
    options |= {"target_parameters": parameters, "rank_pattern": {"experts.down_proj": 2}}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lorafx.load(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True).eval()
    ours.save_pretrained(tmp_path / "ours")
    written = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(written[0][key], written[1][key]) for key in written[0])

    ids = torch.randint(0, 50, (2, 7))
    expected, found = (model(input_ids=ids).logits for model in (theirs, ours))
    near = {"rtol": 1e-5, "atol": 1e-5 * float(expected.detach().abs().max())}
    assert (base(input_ids=ids).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(found, expected, **near)
    for logits in (expected, found):
        logits.square().sum().backward()
    gradients = [dict(_gradients(model)) for model in (theirs, ours)]
    assert len(gradients[0]) == len(gradients[1]) == len(written[0])
    for total, other in zip(sorted(gradients[0].values()), sorted(gradients[1].values())):
        assert abs(total - other) <= 1e-4 * total
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, expected, **near)
    before = {name: p.clone() for name, p in ours.named_parameters()}
    ours.merge_adapter()
    torch.testing.assert_close(ours(input_ids=ids).logits, expected, **near)
    ours.unmerge_adapter()
    assert all(torch.equal(before[name], p) for name, p in ours.named_parameters())


def _gradients(model):
    return ((name, float(p.grad.abs().sum())) for name, p in model.named_parameters() if p.grad is not None)

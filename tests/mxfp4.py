"""A tiny GPT-OSS whose experts are packed in MXFP4, on disk as OpenAI ships it, and in memory as on a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, convert_moe_packed_tensors

EXPERTS, HIDDEN, MIDDLE, BLOCK = 3, 64, 32, 32
PROJECTIONS = {"gate_up_proj": (2 * MIDDLE, HIDDEN), "down_proj": (HIDDEN, MIDDLE)}


def checkpoint(folder: Path) -> Path:
    """A checkpoint in bfloat16, but for experts: two numbers of 4 bits a byte, and an exponent for each 32 numbers."""
    sizes = {"vocab_size": 48, "hidden_size": HIDDEN, "intermediate_size": MIDDLE, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    config = transformers.GptOssConfig(**sizes, **heads, **experts, max_position_embeddings=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
        tensors = {}
        for key, tensor in model.state_dict().items():
            if key.rpartition(".")[2] in PROJECTIONS:
                rows, columns = PROJECTIONS[key.rpartition(".")[2]]
                groups = (EXPERTS, rows, columns // BLOCK)
                tensors[f"{key}_blocks"] = torch.randint(256, (*groups, BLOCK // 2), dtype=torch.uint8)
                tensors[f"{key}_scales"] = torch.randint(118, 123, groups, dtype=torch.uint8)
            else:
                tensors[key] = tensor.contiguous()
    config.architectures = ["GptOssForCausalLM"]
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "router"]}
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def dequantised(folder: Path) -> Any:
    """What transformers makes of it on a CPU, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class Experts(Mxfp4GptOssExperts):
    """transformers' class, with weights as its kernels have them, which are no tensors; it multiplies by itself."""

    def __init__(self, config: Any, stored: dict[str, Tensor], path: str):
        super().__init__(config)
        for name in PROJECTIONS:
            del self._parameters[name]
            parts = {each: stored[f"{path}.{name}_{each}"] for each in ("blocks", "scales")}
            setattr(self, name, SimpleNamespace(storage=SimpleNamespace(**parts)))
            getattr(self, f"{name}_bias").data = stored[f"{path}.{name}_bias"].float()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        stored = [getattr(self, name).storage for name in PROJECTIONS]
        up, down = (convert_moe_packed_tensors(each.blocks, each.scales, dtype=torch.float32) for each in stored)
        result = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            both = hidden_states @ up[expert] + self.gate_up_proj_bias[expert]
            gate, x = both[:, ::2].clamp(max=self.limit), both[:, 1::2].clamp(-self.limit, self.limit)
            y = (x + 1) * gate * torch.sigmoid(self.alpha * gate) @ down[expert] + self.down_proj_bias[expert]
            result = result + y * (top_k_weights * (top_k_index == expert)).sum(-1, keepdim=True)
        return result


def packed(folder: Path) -> Any:
    """The model with its experts packed, as transformers has it where there are kernels."""
    model, stored = dequantised(folder), load_file(folder / "model.safetensors")
    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts = Experts(model.config, stored, f"model.layers.{number}.mlp.experts")
    return model

"""What a forward pass keeps for backward: KiB per token and layer, of a Llama-3-8B layer in bfloat16, r = 16.

python tests/bench/memory.py [--json out.json]

Widths are an eighth of the real ones and the figures are given for the real ones; what is counted are the storages that
autograd saves, parameters left out, by which a model of four layers has more than one of two. Compiled models are cut
into forward and backward by the same partitioner as with Inductor, whatever the device. With CUDA the models are there,
and what is offloaded does not count; without it nothing is offloaded, and the row is that of checkpointing.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import lorafx
from lorafx.tables import table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHRINK, TOKENS, PARTITIONED = 8, (2, 64), "aot_eager_decomp_partition"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(layers: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 4096 // SHRINK, "intermediate_size": 14336 // SHRINK, "vocab_size": 128}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "use_cache": False}
    config = transformers.LlamaConfig(**sizes, **heads, num_hidden_layers=layers)
    return transformers.LlamaForCausalLM(config).to(DEVICE, torch.bfloat16).train()


def ours(**options: Any) -> Callable[[int], nn.Module]:
    config = {"r": 16 // SHRINK, "target_modules": TARGETS}
    return lambda layers: lorafx.compile(base(layers), config, capture="graph", **options)


def theirs(compiled: bool, **options: Any) -> Callable[[int], nn.Module]:
    def make(layers: int) -> nn.Module:
        config = peft.LoraConfig(r=16 // SHRINK, target_modules=TARGETS)
        model = peft.get_peft_model(base(layers), config, **options)
        for layer in model.base_model.model.model.layers if compiled else ():
            layer.compile(backend=PARTITIONED, dynamic=True)
        return model

    return make


CONTESTANTS: dict[str, Callable[[int], nn.Module]] = {
    "PEFT, float32 adapters": theirs(False),
    "PEFT, bfloat16 adapters": theirs(False, autocast_adapter_dtype=False),
    "lorafx, float32 adapters": ours(),
    "lorafx, bfloat16 adapters": ours(autocast_adapter_dtype=False),
    "lorafx, bfloat16 adapters, checkpointing": ours(autocast_adapter_dtype=False, gradient_checkpointing=True),
    "lorafx, bfloat16 adapters, offload": ours(autocast_adapter_dtype=False, gradient_checkpointing="offload"),
    "PEFT by layer, bfloat16 adapters, compiled": theirs(True, autocast_adapter_dtype=False),
    "lorafx, float32 adapters, compiled": ours(backend=PARTITIONED),
    "lorafx, bfloat16 adapters, compiled": ours(backend=PARTITIONED, autocast_adapter_dtype=False),
    "lorafx, bfloat16 adapters, compiled, budget 0.5": ours(
        backend=PARTITIONED, autocast_adapter_dtype=False, activation_budget=0.5
    ),
}


def kept(model: nn.Module) -> int:
    """Bytes that a forward pass keeps, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.device.type == DEVICE:
            storages[storage.data_ptr()] = storage  # alive, so that no address is given twice
        return tensor

    ids = torch.randint(0, 128, TOKENS, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=ids, labels=ids)
    assert output.loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    tokens = TOKENS[0] * TOKENS[1]
    figures = {}
    for name, make in CONTESTANTS.items():
        per_layer = (kept(make(4)) - kept(make(2))) / 2
        figures[name] = per_layer * SHRINK / tokens / 1024
    reference = figures["PEFT, bfloat16 adapters"]
    rows = [(name, figure, figure / reference) for name, figure in figures.items()]
    print(table(f"kept for backward, {DEVICE}", ("contestant", "KiB per token and layer", "to PEFT, bfloat16"), rows))
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

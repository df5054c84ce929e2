"""The kernel of `gemm_update` compiled for GPUs that need not be there; tests/test_gemm_update.py runs this.

Triton's interpreter takes more Python than its compiler does. A process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module = importlib.import_module("lorafx.ops.gemm_update")
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
POINTERS = ("out", "x", "weight", "bias", "hidden", "update")
SIZES = ("m", "n", "about_m")


def ptx(capability: int, dtype: torch.dtype, forward: bool, rank: int, blocks: tuple[int, ...]) -> str:
    """What a call with contiguous tensors is compiled to; forward the weight is transposed, and there is a bias."""
    rows, columns, depth, stages, warps = blocks
    program = module.kernel().fn
    along = {"x_k", "hidden_r", "bias_n", *(("weight_k", "update_r") if forward else ("weight_n", "update_n"))}
    constants = dict.fromkeys(along, 1) | {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "GROUP": 8, "k": 4096}
    constants |= {"rank": rank, "RANKS": 16, "HAS_BIAS": forward, "PRECISION": "ieee", "WIDEN": False}
    constants |= {} if forward else {"bias": None}
    kinds = dict.fromkeys(POINTERS, TYPES[dtype]) | {"scaling": "fp32"}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in program.arg_names}
    aligned = [name for name in program.arg_names if name not in constants and name != "scaling"]
    attributes = {(program.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(program, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


@pytest.mark.parametrize("capability, dtype, forward, rank, blocks, instruction", [
    (90, torch.bfloat16, True, 16, module._BLOCKS[0], "wgmma.mma_async"),
    (90, torch.bfloat16, False, 20, module._BLOCKS[1], "wgmma.mma_async"),
    (80, torch.float16, True, 1, module._BLOCKS[4], "mma.sync"),
    (80, torch.float32, False, 16, module._BLOCKS[-1], "fma.rn.f32"),
])  # fmt: skip
def test_it_compiles(capability, dtype, forward, rank, blocks, instruction, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert instruction in ptx(capability, dtype, forward, rank, blocks)


def test_nothing_runs_on_a_cpu():
    assert not module._is_interpreted() and not module.runs(torch.randn(3, 4))


def test_large_blocks_are_left_out_without_tensor_cores():
    configs, given = module.kernel().configs, {"x": torch.empty(0)}
    assert module._worth_trying(configs, given, PRECISION="tf32") == configs
    assert module._worth_trying(configs, {"x": torch.empty(0, dtype=torch.bfloat16)}, PRECISION="ieee") == configs
    assert 0 < len(module._worth_trying(configs, given, PRECISION="ieee")) < len(configs)


def test_fake_tensors_on_cuda_are_for_the_kernel():
    """What a compiler sees of a call on a GPU."""
    with FakeTensorMode():
        x, weight, lora_A, lora_B = (torch.empty(s, device="cuda") for s in ((2, 5, 8), (6, 8), (3, 8), (6, 3)))
        hidden = torch.nn.functional.linear(x, lora_A)
        assert module.runs(x, weight, None, hidden, lora_B) and not module.runs(x.double(), weight.double())
        y = torch.ops.lorafx.lora_linear(x, weight, None, None, lora_A, lora_B, 1.0, "triton")
        assert y.shape == (2, 5, 6) and y.device.type == "cuda"

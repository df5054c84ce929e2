"""Decoder-only language models."""

from __future__ import annotations

from typing import Any

from .entry import VOCABULARY, Entry, pretrained, sequences

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Grouped heads, their total width not the hidden size: q 48 -> 64, k and v 48 -> 32, o 64 -> 48.
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    **SPECIAL,
}
UNGROUPED = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
MAMBA = {k: v for k, v in UNGROUPED.items() if k != "intermediate_size"} | {"state_size": 8}

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATED = ["gate_proj", "up_proj", "down_proj"]
ENDS = ["embed_tokens", "lm_head"]
FUSED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def causal(name: str, targets: list[str] | str, base: dict[str, Any] = DECODER, **settings: Any) -> Entry:
    return pretrained(f"{name}ForCausalLM", sequences, targets, base | settings)


ENTRIES = (
    causal("Llama", [*ATTENTION, *GATED, *ENDS]),
    causal("Mistral", "all-linear", sliding_window=4),
    causal("Qwen2", ATTENTION + GATED, tie_word_embeddings=True),
    causal("Qwen3", ATTENTION + GATED),
    causal("Gemma2", ATTENTION + GATED, **SLIDING, tie_word_embeddings=True),
    causal("Gemma3", ATTENTION + GATED, **SLIDING, tie_word_embeddings=True),
    causal("Phi", ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]),
    causal("Phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    causal("Granite", ATTENTION + GATED, embedding_multiplier=3.0, residual_multiplier=0.5),
    causal("Cohere2", ATTENTION + GATED, **SLIDING, tie_word_embeddings=True),
    causal("Starcoder2", [*ATTENTION, "c_fc", "c_proj"], sliding_window=4),
    causal("Olmo2", ATTENTION + GATED),
    causal("SmolLM3", ATTENTION + GATED, no_rope_layers=[1, 0]),
    causal("StableLm", ATTENTION + GATED, UNGROUPED, num_key_value_heads=2, partial_rotary_factor=0.5),
    # Experts are stacked parameters and routers modules of their own kind, so no linear target reaches either. To PEFT
    # `gate_proj` and the like mean stacked experts in these models, also where a dense or shared layer has such.
    causal("Qwen3Moe", ATTENTION, **EXPERTS, num_experts=4),
    causal("Mixtral", [*ATTENTION, "lm_head"], **EXPERTS, num_local_experts=4),
    causal("Phimoe", ATTENTION, **EXPERTS, num_local_experts=4),
    causal("GptOss", ATTENTION, **EXPERTS, **SLIDING, num_local_experts=4),
    causal(
        "DeepseekV3",
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        UNGROUPED,
        **EXPERTS,
        **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        **{"q_lora_rank": 20, "kv_lora_rank": 14, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6},
    ),
    pretrained(
        "GPT2LMHeadModel",
        sequences,
        ["c_attn", "c_proj", "c_fc", "wpe"],
        UNGROUPED | {"n_inner": 80, "tie_word_embeddings": True},
    ),
    # Its embeddings are called otherwise than others'.
    causal(
        "GPTJ",
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out", "wte"],
        {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 80, "rotary_dim": 4, **SPECIAL},
    ),
    causal("GPTNeoX", [*FUSED, "embed_in"], UNGROUPED),
    causal("Bloom", FUSED, UNGROUPED),
    causal("Falcon", FUSED, UNGROUPED, new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=80),
    causal("OPT", [*ATTENTION[:3], "out_proj", "fc1", "fc2"], UNGROUPED, ffn_dim=80, word_embed_proj_dim=40),
    causal("Mamba", ["in_proj", "x_proj", "embeddings"], MAMBA, time_step_rank=5),
    causal("Mamba2", ["in_proj", "embeddings"], MAMBA, num_heads=6, head_dim=16, n_groups=2, chunk_size=4),
    causal("Lfm2", [*ATTENTION[:3], "out_proj", "in_proj", "w1"], layer_types=["conv", "full_attention"]),
)

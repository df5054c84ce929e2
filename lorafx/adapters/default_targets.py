"""PEFT's default `target_modules` for each architecture, by `config.model_type`: for most kinds, and for some."""

Targets = dict[str, tuple[str, ...] | str]


def _by_type(groups: Targets) -> Targets:
    return {model_type: targets for names, targets in groups.items() for model_type in names.split()}


_GROUPS: dict[str, tuple[str, ...] | str] = {
    "t5 mt5": ("q", "v"),
    "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3": (
        "q_proj",
        "v_proj",
    ),
    "gpt2 gpt_bigcode": ("c_attn",),
    "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon": ("query_key_value",),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "bert roberta xlm-roberta electra layoutlm": ("query", "value"),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "mpt": ("Wqkv",),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}

DEFAULT_TARGETS = _by_type(_GROUPS)

IA3_TARGETS = _by_type(
    {
        "t5": ("k", "v", "wo"),
        "mt5": ("k", "v", "wi_1"),
        "gpt2 gpt_bigcode": ("c_attn", "mlp.c_proj"),
        "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
        "bert roberta": ("key", "value", "output.dense"),
        "opt": ("q_proj", "k_proj", "fc2"),
        "gptj": ("q_proj", "v_proj", "fc_out"),
        "gpt_neox RefinedWebModel RefinedWeb falcon": ("query_key_value", "dense_4h_to_h"),
        "gpt_neo": ("q_proj", "v_proj", "c_proj"),
        "bart phi": ("q_proj", "v_proj", "fc2"),
        "llama mistral": ("k_proj", "v_proj", "down_proj"),
        "llama4 gemma gemma2 gemma3_text qwen2 qwen3": ("q_proj", "v_proj", "down_proj"),
        "mixtral": ("k_proj", "v_proj", "w2"),
        "deberta-v2": ("key_proj", "value_proj", "output.dense"),
        "deberta": ("in_proj", "output.dense"),
    }
)
_FEEDFORWARD = {"wo", "mlp.c_proj", "mlp.dense_4h_to_h", "output.dense", "fc2", "fc_out", "dense_4h_to_h", "c_proj"}
_FEEDFORWARD |= {"down_proj", "w2"}
# Of these, the ones whose inputs (IA)³ multiplies.
IA3_FEEDFORWARD = {
    model_type: tuple(name for name in targets if name in _FEEDFORWARD) for model_type, targets in IA3_TARGETS.items()
}

_AS_LORA = "gpt2 gpt_bigcode bloom gpt_neox gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3 bert deberta"
ADALORA_TARGETS = {name: DEFAULT_TARGETS[name] for name in (*_AS_LORA.split(), "gemma4", "nemotron_h")} | _by_type(
    {
        "t5": ("q", "k", "v", "o", "wi", "wo"),
        "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
        "bart opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        "roberta": ("query", "key", "value", "dense"),
        "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    }
)
VERA_TARGETS = DEFAULT_TARGETS | {"phi": ("q_proj", "v_proj")}
SHIRA_TARGETS = VERA_TARGETS
FOURIERFT_TARGETS = DEFAULT_TARGETS | _by_type({"gpt2 gpt_bigcode": ("mlp.c_proj",)})
C3A_TARGETS = FOURIERFT_TARGETS
LN_TUNING_TARGETS = _by_type(
    {
        "llama mistral gemma": ("input_layernorm", "post_attention_layernorm", "norm"),
        "bloom falcon": ("input_layernorm", "post_attention_layernorm", "ln_f"),
        "llava": (
            *("multi_modal_projector", "input_layernorm", "post_attention_layernorm", "norm"),
            *("embed_tokens", "lm_head"),
        ),
        "t5 mt5": ("layer_norm", "final_layer_norm"),
        "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
        "gpt2": ("ln_1", "ln_2", "ln_f"),
        "blip-2": ("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"),
        "gptj": ("ln_1", "ln_f"),
        "phi": ("input_layernorm", "final_layernorm"),
        "gemma2 gemma3_text": (
            *("input_layernorm", "post_attention_layernorm"),
            *("pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"),
        ),
        "qwen2 qwen3": ("post_attention_layernorm",),
    }
)

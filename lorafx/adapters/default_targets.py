"""PEFT's default `target_modules` for each architecture, by `config.model_type`."""

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

DEFAULT_TARGETS = {model_type: targets for names, targets in _GROUPS.items() for model_type in names.split()}

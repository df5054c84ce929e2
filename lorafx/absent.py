"""Names of PEFT's that lorafx does not have: who imports one is told what to use instead."""

from __future__ import annotations

import re

from .errors import MissingNameError

_LOAD = "load the base by transformers, then the adapter by `lorafx.load(base, folder)`"
_COMPILE = "`lorafx.compile(model, config)` adapts a model of any class"
_PROMPTS = "prompt learning is not implemented"
# Patterns of names; the first that fits counts.
_INSTEAD = {
    r"AutoPeftModel(For\w+)?": _LOAD,
    r"inject_adapter_in_model": "`lorafx.compile(model, config)`, or `add_adapter(name, config)` for one more adapter",
    r"load_peft_weights": "`lorafx.load(model, folder)`, or `set_peft_model_state_dict` with safetensors' `load_file`",
    r"get_peft_config|PEFT_TYPE_TO_CONFIG_MAPPING": "take the config's own class, such as `LoraConfig.from_dict`",
    r"LoftQConfig": '`LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4})`',
    r"PeftType": "a config's `peft_type` is a plain string here, as in PEFT's files",
    r"PeftError|NoMatchingPeftModuleError|PeftWarning": "lorafx's errors are in `lorafx.errors`",
    r"cast_mixed_precision_params": "`autocast_adapter_dtype`, and `torch.autocast` around calls",
    r"(get|set)_base_model_state_dict": "the base is the object that was adapted: its own `state_dict()`",
    r"save_as_lora|convert_to_lora": "conversion of other kinds to LoRA is not implemented",
    r"\w*(Prompt|Prefix|Cartridge|prompt|prefix|cartridge)\w*|CPT\w+": _PROMPTS,
    r"\w+Model": _COMPILE,
    r"\w+Config": "this kind is not implemented; docs/kinds.md lists those that are",
}


def refuse(name: str) -> None:
    """Raise `MissingNameError` for a name that PEFT has, or may have, and lorafx has not; return for any other."""
    for pattern, instead in _INSTEAD.items():
        if re.fullmatch(pattern, name):
            raise MissingNameError(f"lorafx has no {name}: {instead}", name=name)

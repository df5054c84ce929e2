"""The names that users of PEFT and Unsloth import. Each builds a config and calls `compile` or `load`.

Signatures and defaults are those of peft 0.21 and of Unsloth in 2026. A request that lorafx cannot honour is a
`ConfigError`, or a warning that says what happens instead.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.config import AdapterConfig, is_named
from .adapters.expert_names import with_experts
from .adapters.kinds import LoraConfig, config_of
from .api import compile, load
from .errors import ConfigError, warn
from .files import checkpoint
from .files.hub import Source
from .model.adaptation import of
from .model.adapted_model import AdaptedModel
from .model.adapters import LoadResult
from .tree.lookup import tensor_at

SEVEN_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EMBEDDINGS = ("embed_tokens", "lm_head")
# Where experts are stacked, the parameter that has a projection.
_STACKED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "gate_up_proj": "gate_up_proj"}
_STACKED |= {"down_proj": "down_proj"}
HUB = tuple(field.name for field in dataclasses.fields(Source) if field.name != "place")
LOAD = (*HUB, "weights_only", "backend", "mode", "capture", "pipeline", "adapter_compute_dtype")
LOAD += ("example_inputs", "observers", "gradient_checkpointing", "activation_budget")


class TaskType(StrEnum):
    """Values of `LoraConfig.task_type`."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig | Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> AdaptedModel:
    """`lorafx.compile` under PEFT's name: `model` itself keeps its modules and its forward.

    `revision` is the base model's, recorded in the adapter's config. `mixed` changes nothing: adapters of any kinds can
    always be added and be active together, the first of `set_adapter([...])` innermost, and are saved and loaded. (In
    PEFT their order is that in which they were added, and they cannot be saved.) Errors are those of `compile`.
    """
    config = config_of(peft_config)
    name = vars(model).get("name_or_path") or None
    for field, old, new in (
        ("base_model_name_or_path", config.base_model_name_or_path, name),
        ("revision", config.revision, revision or config.revision),
    ):
        if old is not None and old != new:
            warn(f"the config says {field}={old!r}; {new!r} is recorded instead")
        config = config.replace(**{field: new})
    return compile(
        model,
        config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


class _Named(type):
    """The metaclass of a class by PEFT's name: its instances, for `isinstance`, are those of lorafx's class `of`."""

    of: type

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.of)


class PeftModel(metaclass=_Named):
    """PEFT's name for adapted models: `isinstance(lora, PeftModel)` holds for every `AdaptedModel`."""

    of = AdaptedModel

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | Any | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> AdaptedModel:
        """`lorafx.load` under PEFT's name, for inference unless `is_trainable`.

        `kwargs` are further ones of `load`. `low_cpu_mem_usage` changes nothing: a loaded adapter is never initialised
        first. Raises what `load` raises, and `ConfigError` for `ephemeral_gpu_offload`, `key_mapping` and unknown
        keywords.
        """
        _refuse("PeftModel.from_pretrained", ephemeral_gpu_offload=ephemeral_gpu_offload, key_mapping=key_mapping)
        _refuse("PeftModel.from_pretrained", **{key: kwargs[key] for key in kwargs if key not in LOAD})
        return load(
            model,
            model_id,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            autocast_adapter_dtype=autocast_adapter_dtype,
            **kwargs,
        )


PeftMixedModel = PeftModel  # which has adapters of any kinds at once
PeftModelForCausalLM = PeftModelForSeq2SeqLM = PeftModel
PeftModelForSequenceClassification = PeftModelForTokenClassification = PeftModel
PeftModelForQuestionAnswering = PeftModelForFeatureExtraction = PeftModel


class PeftConfig(metaclass=_Named):
    """PEFT's name for configs: `isinstance(config, PeftConfig)` holds for every config of an adapter."""

    of = AdapterConfig

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> AdapterConfig:
        """The config of a saved adapter, such as to learn its base model; `kwargs` and errors are those of `load`."""
        _refuse("PeftConfig.from_pretrained", **{key: kwargs[key] for key in kwargs if key not in HUB})
        return checkpoint.read_config(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


def get_peft_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """PEFT's function: an adapter's tensors by the keys of its file. `state_dict` has values to take instead, by path.

    Raises `AdapterError` for a model that is not adapted, or an unknown name. Base embeddings are not among them.
    """
    return of(model).adapter_state_dict(adapter_name, state_dict)


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> LoadResult:
    """PEFT's function: give an adapter these values, by the keys of its file.

    What is returned has no keys: a missing or unexpected one is a `CheckpointError`, with all values as they were.
    """
    of(model).load_adapter_state_dict(peft_model_state_dict, adapter_name)
    return LoadResult([], [])


class FastLanguageModel:
    """Unsloth's entry. Load the base model with transformers; `get_peft_model` adapts it."""

    @staticmethod
    def get_peft_model(
        model: nn.Module,
        r: int = 16,
        target_modules: Sequence[str] | str | None = SEVEN_PROJECTIONS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: Sequence[int] | int | None = None,
        layers_pattern: Sequence[str] | str | None = None,
        finetune_last_n_layers: int | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        max_seq_length: int = 2048,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Mapping[str, Any] | None = {},
        temporary_location: str = "_unsloth_temporary_saved_buffers",
        qat_scheme: str | None = None,
        target_parameters: Sequence[str] | None = None,
        ensure_weight_tying: bool | None = None,
        **kwargs: Any,
    ) -> AdaptedModel:
        """`lorafx.compile` under Unsloth's name, with Unsloth's defaults.

        `random_state` seeds the adapter's start values and nothing else. `max_seq_length` and `temporary_location` are
        taken and unused: graphs take any length, and nothing is offloaded to disk. `embed_tokens` and `lm_head` are
        moved from `target_modules` to `modules_to_save`; the stacked weights of experts are adapted if one of their
        projections is a target; what is trained whole of a float16 base trains in float32.
        `kwargs` are further fields of `LoraConfig`. Raises `ConfigError` for `qat_scheme`, for keywords that are no
        fields, and what `compile` raises.
        """
        _refuse("FastLanguageModel.get_peft_model", qat_scheme=qat_scheme)
        targets, saved = _embeddings_moved(target_modules, modules_to_save)
        config = _config(
            r=r,
            target_modules=targets,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            layers_to_transform=_layers(model, layers_to_transform, finetune_last_n_layers),
            layers_pattern=layers_pattern,
            use_rslora=use_rslora,
            modules_to_save=saved,
            init_lora_weights=init_lora_weights,
            loftq_config=loftq_config or {},
            target_parameters=target_parameters,
            ensure_weight_tying=bool(ensure_weight_tying),
            **{"task_type": _task(model), **kwargs},
        )
        checkpointing = "offload" if use_gradient_checkpointing == "unsloth" else use_gradient_checkpointing
        config = _with_experts(model, config)
        adapted = compile(model, config, random_state=random_state, gradient_checkpointing=checkpointing)
        _widen_copies(adapted)
        return adapted


def _refuse(where: str, **asked: Any) -> None:
    """Raise `ConfigError` if any of these keywords is set, to anything but None, False or {}."""
    if wrong := [f"{name}={value!r}" for name, value in asked.items() if value not in (None, False, {})]:
        raise ConfigError(f"{where} of lorafx does not know {', '.join(wrong)}, and will not ignore it")


def _config(**fields: Any) -> LoraConfig:
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    _refuse("FastLanguageModel.get_peft_model", **{name: fields[name] for name in fields if name not in known})
    return LoraConfig(**fields)


def _embeddings_moved(
    targets: Sequence[str] | str | None, saved: Sequence[str] | None
) -> tuple[Sequence[str] | str | None, list[str] | None]:
    """The targets and the modules to save, with embeddings moved from the former to the latter, as Unsloth does."""
    given = None if saved is None else list(saved)
    if targets is None or isinstance(targets, str):
        return targets, given
    moved = [name for name in targets if name.rpartition(".")[2] in EMBEDDINGS]
    if not moved:
        return list(targets), given
    warn(f"{', '.join(moved)} moved from `target_modules` to `modules_to_save`: trained whole")
    return [name for name in targets if name not in moved], list(dict.fromkeys([*(given or ()), *moved]))


def _with_experts(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config with the stacked weights of experts that Unsloth adapts if one of their projections is a target."""
    config = with_experts(model, config)  # type: ignore[assignment]
    targets = config.target_modules
    if config.target_parameters is not None or isinstance(targets, str):
        return config
    wanted = {f"experts.{_STACKED[name]}" for name in targets or () if name in _STACKED}
    excluded = config.exclude_modules
    stacked = [
        name
        for name, p in model.named_parameters()
        if p.dim() == 3 and not any(is_named(excluded, each) for each in (name, name.rpartition(".")[0]))
    ]
    experts = sorted(ending for ending in wanted if any(name.endswith(f".{ending}") for name in stacked))
    if not experts:
        return config
    modules = [path for path, _ in model.named_modules()]
    kept = [name for name in targets or () if name not in _STACKED or any(is_named((name,), path) for path in modules)]
    return config.replace(target_modules=kept, target_parameters=experts)


def _layers(model: nn.Module, chosen: Sequence[int] | int | None, last: int | None) -> Sequence[int] | int | None:
    """The numbers of the layers to adapt: those chosen, else the last `last`, else None for all."""
    if chosen is not None or last is None:
        return chosen
    config: Any = getattr(model, "config", None)
    total = getattr(config.get_text_config() if config is not None else None, "num_hidden_layers", None)
    if total is None:
        raise ConfigError("`finetune_last_n_layers` needs a model whose config says `num_hidden_layers`")
    return list(range(total - max(1, min(last, total)), total))


def _widen_copies(adapted: AdaptedModel) -> None:
    """Let what is trained as a whole train in float32 where it would in float16, which loses small updates."""
    for adapter in adapted._lorafx.adapters.values():
        for path in adapter.replaced.values():
            copy = tensor_at(adapted, path)
            if isinstance(copy, nn.Parameter) and copy.dtype == torch.float16:
                copy.data = copy.data.float()


def _task(model: nn.Module) -> str:
    return TaskType.SEQ_CLS if "Classification" in type(model).__name__ else TaskType.CAUSAL_LM

"""lorafx: a declarative graph-rewriting compiler for LoRA on torch.fx."""

from typing import Any

# `checkout` first: it shows where the passes are.
from . import checkout, errors, passes  # type: ignore[attr-defined]  # noqa: F401
from .absent import refuse as _refuse
from .adapters.kinds.adalora_config import AdaLoraConfig
from .adapters.kinds.boft import BOFTConfig
from .adapters.kinds.c3a import C3AConfig
from .adapters.kinds.delora import DeloraConfig
from .adapters.kinds.fourierft import FourierFTConfig
from .adapters.kinds.hira import HiraConfig
from .adapters.kinds.hra import HRAConfig
from .adapters.kinds.ia3 import IA3Config
from .adapters.kinds.ln_tuning import LNTuningConfig
from .adapters.kinds.loha import LoHaConfig
from .adapters.kinds.lokr import LoKrConfig
from .adapters.kinds.lora_config import LoraConfig
from .adapters.kinds.miss import MissConfig
from .adapters.kinds.oft import OFTConfig
from .adapters.kinds.randlora import RandLoraConfig
from .adapters.kinds.road import RoadConfig
from .adapters.kinds.shira import ShiraConfig
from .adapters.kinds.trainable_tokens import TrainableTokensConfig
from .adapters.kinds.vera import VeraConfig
from .adapters.site import Selection, Site
from .api import compile, load
from .capture.export import trace
from .compat import (
    FastLanguageModel,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from .functions import (
    get_layer_status,
    get_model_status,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    rescale_adapter_scale,
)
from .graph.printing import diff
from .merging.streaming import merge
from .model.adaptation import Adaptation, of
from .model.adapted_model import AdaptedModel
from .model.conversion import to_float8
from .model.eva import get_eva_state_dict, initialize_lora_eva_weights
from .model.loftq import replace_lora_weights_loftq
from .model.preparation import prepare_model_for_kbit_training
from .model.preprocessing import preprocess_corda, preprocess_loraga
from .model.rows import loss_by_adapter
from .optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from .pipeline import Context, Pass, Pipeline

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Say what to use instead of a name of PEFT's, by an error that `from lorafx import …` shows as it is."""
    _refuse(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AdaLoraConfig",
    "Adaptation",
    "AdaptedModel",
    "BOFTConfig",
    "C3AConfig",
    "Context",
    "DeloraConfig",
    "FastLanguageModel",
    "FourierFTConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "MissConfig",
    "OFTConfig",
    "Pass",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "Pipeline",
    "RandLoraConfig",
    "RoadConfig",
    "Selection",
    "ShiraConfig",
    "Site",
    "TaskType",
    "TrainableTokensConfig",
    "VeraConfig",
    "compile",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "diff",
    "errors",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "initialize_lora_eva_weights",
    "load",
    "loss_by_adapter",
    "merge",
    "of",
    "passes",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "set_peft_model_state_dict",
    "to_float8",
    "trace",
]

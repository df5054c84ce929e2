"""lorafx: a declarative graph-rewriting compiler for LoRA on torch.fx."""

from . import errors, passes  # type: ignore[attr-defined]
from .api import compile, load
from .capture import trace
from .compat import (
    FastLanguageModel,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    TaskType,
    get_peft_model,
)
from .config import LoraConfig
from .model import AdaptedModel
from .pipeline import Context, Pass, Pipeline
from .report import diff
from .sites import Selection, Site

__version__ = "0.1.0"

__all__ = [
    "AdaptedModel",
    "Context",
    "FastLanguageModel",
    "LoraConfig",
    "Pass",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "Pipeline",
    "Selection",
    "Site",
    "TaskType",
    "compile",
    "diff",
    "errors",
    "get_peft_model",
    "load",
    "passes",
    "trace",
]

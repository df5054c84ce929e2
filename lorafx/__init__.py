"""lorafx: a declarative graph-rewriting compiler for LoRA on torch.fx."""

from . import errors, passes  # type: ignore[attr-defined]
from .api import compile, load
from .capture import trace
from .config import LoraConfig
from .model import AdaptedModel
from .pipeline import Context, Pass, Pipeline
from .report import diff
from .sites import Selection, Site

__version__ = "0.1.0"

__all__ = [
    "AdaptedModel",
    "Context",
    "LoraConfig",
    "Pass",
    "Pipeline",
    "Selection",
    "Site",
    "compile",
    "diff",
    "errors",
    "load",
    "passes",
    "trace",
]

"""The passes, one file each, and the pipelines made of them. Installed as `lorafx.passes`."""

from lorafx.pipeline import Pipeline

from .canonicalize import Canonicalize
from .elide_casts import ElideCasts
from .elide_dropout import ElideDropout
from .fold_scaling import FoldScaling
from .freeze_base import FreezeBase
from .insert_adapters import InsertAdapters
from .match_targets import MatchTargets
from .merge_adapters import MergeAdapters
from .restore_linear import RestoreLinear
from .split_reads import SplitReads

default = Pipeline(
    Canonicalize(),
    SplitReads(),
    RestoreLinear(),
    MatchTargets(),
    InsertAdapters(),
    MergeAdapters(),
    FreezeBase(),
    ElideCasts(),
    ElideDropout(),
    FoldScaling(),
)

__all__ = [
    "Canonicalize",
    "ElideCasts",
    "ElideDropout",
    "FoldScaling",
    "FreezeBase",
    "InsertAdapters",
    "MatchTargets",
    "MergeAdapters",
    "RestoreLinear",
    "SplitReads",
    "default",
]

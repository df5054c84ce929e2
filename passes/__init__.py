"""The passes, one file each, and `default`, the pipeline that `compile` runs. Installed as `lorafx.passes`."""

from lorafx.pipeline import Pipeline

from .canonicalize import Canonicalize
from .checkpoint_blocks import CheckpointBlocks
from .choose_kernels import ChooseKernels
from .elide_casts import ElideCasts
from .elide_dropout import ElideDropout
from .elide_empty import ElideEmpty
from .elide_packed import ElidePacked
from .elide_slices import ElideSlices
from .fold_scaling import FoldScaling
from .freeze_base import FreezeBase
from .fuse_dropout import FuseDropout
from .fuse_lora import FuseLora
from .fuse_loss import FuseLoss
from .fuse_own_layers import FuseOwnLayers
from .inline_blocks import InlineBlocks
from .insert_adapters import InsertAdapters
from .match_targets import MatchTargets
from .merge_adapters import MergeAdapters
from .multiply_in_float8 import MultiplyInFloat8
from .outline_blocks import OutlineBlocks
from .restore_causal import RestoreCausal
from .restore_gqa import RestoreGqa
from .restore_linear import RestoreLinear
from .restore_norm import RestoreNorm
from .restore_rotary import RestoreRotary
from .share_input import ShareInput
from .split_reads import SplitReads
from .sum_weights import SumWeights

default = Pipeline(
    Canonicalize(),
    ElideCasts(),
    ElideSlices(),
    ElideEmpty(),
    OutlineBlocks(),
    RestoreCausal(),
    RestoreGqa(),
    RestoreNorm(),
    RestoreRotary(),
    SplitReads(),
    RestoreLinear(),
    MatchTargets(),
    InsertAdapters(),
    MergeAdapters(),
    FreezeBase(),
    ElidePacked(),
    ElideCasts(),
    ElideDropout(),
    FuseLora(),
    FuseOwnLayers(),
    FuseLoss(),
    ShareInput(),
    FuseDropout(),
    SumWeights(),
    FoldScaling(),
    ChooseKernels(),
    CheckpointBlocks(),
)

__all__ = [
    "Canonicalize",
    "CheckpointBlocks",
    "ChooseKernels",
    "ElideCasts",
    "ElideDropout",
    "ElideEmpty",
    "ElidePacked",
    "ElideSlices",
    "FoldScaling",
    "FreezeBase",
    "FuseDropout",
    "FuseLora",
    "FuseLoss",
    "FuseOwnLayers",
    "InlineBlocks",
    "InsertAdapters",
    "MatchTargets",
    "MergeAdapters",
    "MultiplyInFloat8",
    "OutlineBlocks",
    "RestoreCausal",
    "RestoreGqa",
    "RestoreLinear",
    "RestoreNorm",
    "RestoreRotary",
    "ShareInput",
    "SplitReads",
    "SumWeights",
    "default",
]

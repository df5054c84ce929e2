"""`lorafx merge`: adapters onto a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..merging import streaming
from .refusals import refusing


@refusing
def merge(
    base: Annotated[str, typer.Argument(help="folder or Hub id of the original model")],
    adapters: Annotated[list[str], typer.Argument(help="folders or Hub ids of adapters in PEFT's format")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder to write; not there yet, or empty")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="of the merged weights; default: each as it is stored"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="of a base on the Hub: branch, tag or commit")] = None,
) -> int:
    """Merge adapters onto a checkpoint on disk, shard by shard, without the model in memory.

    Example: lorafx merge base/ adapter/ -o merged/ --dtype bfloat16
    """
    print(f"merged into {streaming.merge(base, adapters, out, dtype=dtype, revision=revision)}")
    return 0

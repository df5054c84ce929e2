"""`lorafx show`: what the passes make of a model with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..model.adaptation import of
from .adapted import adapted, base_of, example_call
from .refusals import refusing


@refusing
def show(
    base: Annotated[str, typer.Argument(help="folder or Hub id of the base model")],
    adapter: Annotated[str, typer.Argument(help="folder or Hub id of an adapter, or a config's JSON file")],
    name: Annotated[
        str | None,
        typer.Argument(help="a site, module, layer or pass; without it, the whole call"),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="also write a page of the whole call to this file")] = None,
    train: Annotated[bool, typer.Option(help="a training step instead of an evaluation")] = False,
) -> int:
    """Show what the passes made of one place of a model's graph, as text and as a page.

    Example: lorafx show base/ adapter/ model.layers.0.self_attn.q_proj --html graph.html
    """
    lora = adapted(base_of(base), adapter).train(train)
    print(of(lora).show(name, html=html, **example_call(lora)))
    return 0

"""Model cards: the README.md of an adapter's folder, which the Hub shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

CARD = "README.md"


def new_card(values: Mapping[str, Any]) -> str:
    """The text of a card for an adapter that has none yet, from the values of its config."""
    base = values["base_model_name_or_path"]
    data = ModelCardData(library_name="peft", base_model=base or None, tags=["lora", "lorafx"])
    text = f"---\n{data.to_yaml()}\n---\n\n# Adapter\n\nTrained with lorafx; in PEFT's format. Load it with "
    load = '`lorafx.load(model, "this/folder")` or `peft.PeftModel.from_pretrained(model, "this/folder")`.\n'
    own = ", ".join(f"{name} {values[name]}" for name in ("r", "lora_alpha") if name in values)
    what = f"\nType {values['peft_type']}{own and f', {own}'}, base model {base or 'not recorded'}.\n"
    return str(ModelCard(text + load + what))


def add_tags(file: Path, tags: Sequence[str]) -> None:
    """Add tags to a card."""
    card = ModelCard.load(file)
    card.data.tags = [*card.data.tags, *tags]
    card.save(file)


def say_it_is_an_adapter(file: Path, base: str | None) -> None:
    """Say in a card, new or not, that its folder holds an adapter, and of which base model."""
    card = ModelCard.load(file) if file.exists() else ModelCard("---\nbase_model: null\n---\n")
    data: Any = card.data
    data.library_name = "peft"
    data.base_model = base or data.base_model
    card.save(file)

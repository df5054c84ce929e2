"""Model cards: the README.md of an adapter's folder, which the Hub shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..errors import warn

CARD = "README.md"
TAGS = ["lora", "lorafx"]


def new_card(values: Mapping[str, Any]) -> str:
    """The text of a card for an adapter that has none yet, from the values of its config."""
    base = values["base_model_name_or_path"]
    data = ModelCardData(library_name="peft", base_model=base or None, tags=TAGS)
    text = f"---\n{data.to_yaml()}\n---\n\n# Adapter\n\nTrained with lorafx; in PEFT's format. Load it with "
    load = '`lorafx.load(model, "this/folder")` or `peft.PeftModel.from_pretrained(model, "this/folder")`.\n'
    own = ", ".join(f"{name} {values[name]}" for name in ("r", "lora_alpha") if name in values)
    what = f"\nType {values['peft_type']}{own and f', {own}'}, base model {base or 'not recorded'}.\n"
    return str(ModelCard(text + load + what))


def marked_card(text: str, base: str | None) -> str:
    """A card that somebody has written, with the metadata by which the Hub knows an adapter; its own words stay.

    Warns, and leaves the card as it is, where its metadata cannot be read.
    """
    try:
        card = ModelCard(text if text.lstrip().startswith("---") else f"---\nlibrary_name: peft\n---\n{text}")
    except Exception as error:  # whatever a parser of YAML makes of it
        warn(f"the metadata of {CARD} cannot be read, and does not say that this is an adapter: {error}")
        return text
    data: Any = card.data
    tags = [*(data.tags or ()), *(tag for tag in TAGS if tag not in (data.tags or ()))]
    if (data.library_name, data.base_model or None, data.tags) == ("peft", base or data.base_model or None, tags):
        return text
    data.library_name, data.base_model, data.tags = "peft", base or data.base_model, tags
    return str(card)


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

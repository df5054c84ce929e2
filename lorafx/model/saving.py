"""The saving of an adapted model: its adapters to a folder in PEFT's format, or to the Hub."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..files import checkpoint
from ..files.hub import upload
from ..files.model_card import CARD, add_tags
from ..tree.lookup import find_tensor
from ..tree.mirror import MIRRORED_AS
from ..tree.wrappers import unwrapped
from .state import State


class Saving(nn.Module):
    """The part of an adapted model that writes its adapters."""

    _lorafx: State
    _adapter: Callable[[str], Adapter]

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the adapters in PEFT's format: `"default"` into the folder itself, others into subfolders.

        `selected_adapters` are names, None for all. `save_embedding_layers` also writes the base's embedding weights;
        `"auto"` does so when they are adapted or the vocabulary was resized since the model was compiled. `state_dict`
        gives values to write instead of the model's own, as a trainer that gathers shards has them. Nothing is written
        unless `is_main_process`. The files of a folder are replaced at once.

        Raises `CheckpointError` for what the file system refuses, and for `safe_serialization=False`; `AdapterError`
        for an unknown name.
        """
        if not safe_serialization:
            raise checkpoint.CheckpointError("adapters are written as safetensors only; drop safe_serialization=False")
        if not is_main_process:
            return
        ledger = self._lorafx.ledger
        names = list(self._lorafx.adapters) if selected_adapters is None else list(selected_adapters)
        for adapter in [self._adapter(name) for name in names]:
            if adapter.is_rescaled(self):
                warnings.warn(f"{adapter.name!r} is saved without its scale, for which PEFT's format has no place")
            folder = Path(save_directory) / ("" if adapter.name == "default" else adapter.name)
            embeddings = {
                path: ledger.original(self, path) for path in self._embeddings_to_save(adapter, save_embedding_layers)
            }
            name = getattr(getattr(self, "config", None), "name_or_path", None) or None
            base = getattr(type(self), MIRRORED_AS)
            mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
            unmerged = {path: ledger.original(self, path) for path in ledger.entries if path in set(adapter.paths)}
            values = {**(state_dict or {}), **unmerged}
            checkpoint.write(self, adapter, folder, embeddings, name, mapping, values)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] | None = None,
        **save: Any,
    ) -> CommitInfo:
        """Upload what `save_pretrained(**save)` writes to a repository on the Hub, which is made if need be.

        Arguments are those of transformers' `push_to_hub`; `tags` go into the model card. If the repository has a card
        (README.md) already, that one stays. Returns the commit. Raises `CheckpointError`.
        """
        if not save.get("is_main_process", True):
            raise checkpoint.CheckpointError("push_to_hub writes on one process; call it there only")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save)
            card = Path(folder) / CARD
            if tags and card.exists():
                add_tags(card, tags)
            return upload(
                folder,
                repo_id,
                keep=(CARD,),
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload adapter",
                commit_description=commit_description,
            )

    def _embeddings_to_save(self, adapter: Adapter, wanted: bool | str) -> list[str]:
        paths = [path for path in checkpoint.embedding_weights(self) if path not in adapter.replaced]
        adapted = [path for path in paths if path.rpartition(".")[0] in adapter.selection.by_name]
        if wanted == "auto":
            wanted = bool(adapted) or any(_resized(unwrapped(self._lorafx.base), self, path) for path in paths)
        return (adapted or paths) if wanted else []


def _resized(base: nn.Module, tree: nn.Module, path: str) -> bool:
    before, now = find_tensor(base, path), find_tensor(tree, path)
    return before is None or now is None or before.shape != now.shape

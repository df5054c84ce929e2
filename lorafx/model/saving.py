"""The saving of an adapted model: its adapters to a folder in PEFT's format, or to the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.slots import put, used, without_room
from ..errors import AdapterError, CheckpointError, warn
from ..files import checkpoint
from ..files.given import Given
from ..files.hub import upload
from ..files.model_card import CARD, add_tags
from ..tree.lookup import copy_into, find_tensor, first_name
from ..tree.wrappers import unwrapped
from .merges import Merges

# Names of embeddings whose base weights PEFT writes along with their adapter.
KNOWN_EMBEDDINGS = ("embed_tokens", "lm_head")


class Saving(Merges):
    """The part of an adapted model that writes its adapters."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the adapters in PEFT's format: `"default"` into the folder itself, others into subfolders.

        `selected_adapters` are names, None for all. `save_embedding_layers` also writes the base's embedding weights;
        `"auto"` does so for adapted ones of the names that PEFT knows (`embed_tokens`, `lm_head`), and where the
        vocabulary was resized since the model was compiled. `state_dict` gives values to write instead of the model's
        own, as a trainer that gathers shards has them, under the model's names, those that a wrapper makes of them, or
        the keys of PEFT's files. Only with `is_main_process` something is written, but every process of several has to
        call this: together they gather what is sharded. The files of a folder are replaced at once.

        An adapter that took its start values out of the base (PiSSA, OLoRA) fits what is left of it, or a base that
        they are taken out of again, as loading does. With `path_initial_model_for_weight_conversion`, a folder it was
        saved to before training, it is written as one of twice the rank for the base as it was.

        Raises `CheckpointError` for what the file system refuses, for `safe_serialization=False`, for a `state_dict`
        that lacks a parameter of the adapters, and for a folder that holds no such adapter; `AdapterError` for an
        unknown name and where there is no adapter, `ConfigError` for a conversion that PEFT's format cannot say.
        """
        if not safe_serialization:
            raise CheckpointError("adapters are written as safetensors only; drop safe_serialization=False")
        initial = path_initial_model_for_weight_conversion
        start = None if initial is None else checkpoint.read(initial)
        names = list(self._lorafx.adapters) if selected_adapters is None else self._listed(selected_adapters)
        if not self._lorafx.adapters:
            raise AdapterError("there is no adapter to save; `merge_and_unload()` and `unload()` return the base")
        for adapter in (adapters := [used(self._adapter(name)) for name in names]):
            adapter.require_in_place(self.tree)
        if not is_main_process and state_dict is not None:
            return  # the values are gathered already
        given, alone = None if state_dict is None else Given(state_dict), len(adapters) == 1
        values_of = [{} if given is None else given.values_for(self.tree, adapter, alone) for adapter in adapters]
        gathered = [
            self._gathered(adapter, values | self._unmerged_values(adapter), save_embedding_layers, given, start)
            for adapter, values in zip(adapters, values_of)
        ]
        if is_main_process:
            self._write(gathered, Path(save_directory))

    def _write(self, gathered: Sequence[tuple[Adapter, dict[str, Tensor]]], directory: Path) -> None:
        self._warn_of_what_is_left_out({checkpoint.base_path(key) for _, tensors in gathered for key in tensors})
        for adapter, tensors in gathered:
            if adapter.is_rescaled(self.tree):
                warn(f"{adapter.name!r} is saved without its scale, for which PEFT's format has no place")
            folder = directory / ("" if adapter.name == "default" else adapter.name)
            checkpoint.write(self.tree, adapter, folder, tensors)

    def _warn_of_what_is_left_out(self, written: Container[str]) -> None:
        """Warn of parameters that train and are no adapter's: what they have learnt is in no folder of an adapter."""
        of_adapters = {path for adapter in self._lorafx.adapters.values() for path in adapter.paths}
        trained = [name for name, parameter in self.tree.named_parameters() if parameter.requires_grad]
        if left := [name for name in trained if name not in of_adapters and name not in written]:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            warn(
                f"{left[0]}{more} of the base may train, and what is saved are adapters alone: name such modules in "
                "`modules_to_save`, or save the model's `state_dict()` too"
            )

    def _unmerged_values(self, adapter: Adapter) -> dict[str, Tensor]:
        """The adapter's copies of base tensors that others are merged into, as they are without these."""
        merged = [path for path in adapter.paths if path in self._lorafx.ledger.entries]
        return {path: self._lorafx.ledger.original(self.tree, path) for path in merged}

    def _gathered(
        self,
        adapter: Adapter,
        values: Mapping[str, Tensor],
        save_embedding_layers: bool | str,
        given: Given | None,
        start: checkpoint.Checkpoint | None,
    ) -> tuple[Adapter, dict[str, Tensor]]:
        """What to write of an adapter: one for the base as it was if there is the adapter's `start`."""
        embeddings = self._embeddings_to_save(adapter, save_embedding_layers, given)
        tensors = checkpoint.gather(self.tree, adapter, embeddings, values)
        if start is not None:
            return _since(adapter, tensors, start, self.tree)
        config, left = adapter.kind.filed(adapter.config, tensors)
        return replace(adapter, config=config), left

    def adapter_state_dict(
        self, adapter_name: str = "default", state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """An adapter's tensors, shared and not copied, by the keys that they have in its file.

        Of a copy that other adapters are merged into it is the value without them. `state_dict` has values to take
        instead, by path.
        """
        adapter = used(self._adapter(adapter_name))
        paths, given = checkpoint.keys(adapter), state_dict or {}
        whole = {path: given[path] if path in given else self._without_merged(path) for path in paths.values()}
        own = without_room(adapter, whole)
        tensors = {key: own[path] for key, path in paths.items()}
        return tensors | checkpoint.repeats(self.tree, adapter, tensors)

    def load_adapter_state_dict(self, values: Mapping[str, Tensor], adapter_name: str = "default") -> None:
        """Give an adapter that is there these values, in place; keys are those of `adapter_state_dict`.

        Raises `CheckpointError`, with all values as they were, for a missing or unexpected key or another shape, and
        `AdapterError` for an adapter that is unknown or merged.
        """
        adapter = used(self._require_unmerged(adapter_name, "loading other values into it"))
        paths, own = checkpoint.keys(adapter), self.adapter_state_dict(adapter_name)
        expected = {key: (tuple(own[key].shape), own[key].is_floating_point()) for key in paths}
        values = adapter.kind.unfiled(adapter.config, checkpoint.without_repeats(self.tree, adapter, values))
        given = checkpoint.Checkpoint(Path("state_dict"), adapter.config, values)
        embeddings = checkpoint.check(given, expected, self.tree)
        put(self.tree, adapter, {path: values[key] for key, path in paths.items()})
        copy_into(self.tree, embeddings)

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
            raise CheckpointError("push_to_hub writes on one process; call it there only")
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

    def _embeddings_to_save(self, adapter: Adapter, wanted: bool | str, given: Given | None) -> dict[str, Tensor]:
        """The base's embedding weights to write along, by path: those of a state dict, or the model's own."""
        every = checkpoint.embedding_weights(self.tree)
        paths = [path for path in every if path not in adapter.replaced]
        owners = {path: path.rpartition(".")[0] for path in paths}
        known = [p for p in paths if owners[p].rpartition(".")[2] in KNOWN_EMBEDDINGS]
        adapted = [p for p in known if owners[p] in adapter.selection.by_name and adapter.kind.saves_embeddings]
        resized = any(_resized(unwrapped(self._lorafx.base), self.tree, path) for path in paths)
        if wanted == "auto" and (adapted or resized):
            warn(
                f"{', '.join(paths if resized else adapted)}: saved along with {adapter.name!r}, being "
                f"{'of another size than when the model was compiled' if resized else 'adapted'}; pass "
                "save_embedding_layers=False to leave them out"
            )
        if wanted is True and not every:
            warn("save_embedding_layers=True saves none: the model has no `get_input_embeddings` to tell them")
        wanted = bool(resized or adapted) if wanted == "auto" else wanted
        chosen = [] if not wanted else paths if resized else adapted or paths
        return {path: self._embedding(path, given) for path in chosen}

    def _embedding(self, path: str, given: Given | None) -> Tensor:
        ledger = self._lorafx.ledger
        value = None if given is None or first_name(self.tree, path) in ledger.entries else given.get(path)
        return ledger.original(self.tree, path) if value is None else value


def _since(
    adapter: Adapter, tensors: dict[str, Tensor], start: checkpoint.Checkpoint, tree: nn.Module
) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter for the base as it was before start values were taken out of it, and its tensors by key."""
    named = {**checkpoint.keys(adapter), **checkpoint.repeats(tree, adapter, tensors)}
    own = [key for key in named if key in tensors]
    expected = {key: (tuple(tensors[key].shape), tensors[key].is_floating_point()) for key in own}
    checkpoint.check(start, expected, tree)
    config, joined = adapter.kind.since(adapter.config, tensors, start.tensors)
    return replace(adapter, config=config), joined


def _resized(base: nn.Module, tree: nn.Module, path: str) -> bool:
    before, now = find_tensor(base, path), find_tensor(tree, path)
    return before is None or now is None or before.shape != now.shape

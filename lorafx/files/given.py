"""Values for an adapter from a state dict, as trainers hand one to `save_pretrained` that they have gathered.

Its names may be the model's own, those in a wrapper around the model (`module.`, `_orig_mod.`, `base_model.model.`), or
the keys of PEFT's files, which do not say the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..errors import CheckpointError
from ..tree.lookup import tensor_at
from .checkpoint import PREFIX, keys

# What torch.compile, FSDP and activation checkpointing put before the names below what they wrap.
_OF_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Given:
    """A state dict, asked by the model's names. `values_for` an adapter are all of its tensors or an error."""

    def __init__(self, state_dict: Mapping[str, Tensor]):
        self.state_dict = state_dict
        self.by_plain = {_plain(name): tensor for name, tensor in state_dict.items()}
        self.file_keys = {_plain(name): name for name in state_dict if PREFIX in name}

    def get(self, path: str) -> Tensor | None:
        """The value of the tensor at `path`, whatever wrappers add to its name."""
        return self.state_dict[path] if path in self.state_dict else self.by_plain.get(_plain(path))

    def values_for(self, root: nn.Module, adapter: Adapter, alone: bool) -> dict[str, Tensor]:
        """Values of the adapter's tensors, by path; of buffers as far as there are any.

        Raises `CheckpointError` if a parameter has none, or is named as in a file, which does not say of which adapter
        it is, though this one is not `alone` in being saved.
        """
        found = {path: self._value(key, path, alone) for key, path in keys(adapter).items()}
        lacking = [p for p, value in found.items() if value is None and isinstance(tensor_at(root, p), nn.Parameter)]
        if lacking:
            raise CheckpointError(
                f"the state dict has no value for {lacking[0]} of adapter {adapter.name!r}, nor under a name that a "
                f"wrapper would give it; it has {', '.join(list(self.state_dict)[:3]) or 'nothing'}"
            )
        return {path: value for path, value in found.items() if value is not None}

    def _value(self, key: str, path: str, alone: bool) -> Tensor | None:
        value, name = self.get(path), self.file_keys.get(_plain(key))
        if value is not None or name is None:
            return value
        if not alone:
            raise CheckpointError(f"{name} of the state dict does not say whose adapter's it is; save one at a time")
        return self.state_dict[name]


def _plain(name: str) -> str:
    """A tensor's name without what wrappers add to it."""
    atoms = [atom for atom in name.split(".") if atom not in _OF_WRAPPERS]
    while atoms[:1] == ["module"] or atoms[:2] == ["base_model", "model"]:
        atoms = atoms[1 if atoms[0] == "module" else 2 :]
    return ".".join(atoms)

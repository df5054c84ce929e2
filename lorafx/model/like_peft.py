"""Names that PEFT documents for its models with LoRA and that lorafx itself does without: what an adapter is and does.

Where PEFT has a method for which there is nothing here, `INSTEAD` says what to use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapters.adapter import TRAINED_BIAS, Adapter
from ..adapters.config import AdapterConfig
from ..adapters.peft_itself import refuse_peft_itself
from ..adapters.storages import DENSE, weights_of
from ..errors import AdapterError
from ..tree.lookup import tensor_at
from .part import Part
from .trainers import Inner

INSTEAD = {
    "_get_kasa_loss": "`get_penalty()`",
    "_get_monteclora_loss": "`get_penalty()`",
    "from_pretrained": "`lorafx.load(model, folder)`, or `load_adapter` for one more adapter",
    "get_model_config": "`model.config.to_dict()`",
    "get_prompt": "prompt learning is not implemented",
    "get_prompt_embedding_to_save": "prompt learning is not implemented",
    "inject_adapter": "`add_adapter(name, config)`",
    "prefix": "an adapter's tensors are those in `lorafx.of(model).peft_config` and `named_parameters()`",
    "prepare_model_for_gradient_checkpointing": "`compile(gradient_checkpointing=True)`",
    "rescale_adapter_scale": "`with model.rescale(factor)`",
    "set_scaling": "`set_scale(name, factor)`",
    "subtract_mutated_init": "`save_pretrained(folder, path_initial_model_for_weight_conversion=…)`",
    "supports_lora_conversion": "conversion of other kinds to LoRA is not implemented",
    "target_module_mapping": "`lorafx.adapters.default_targets.DEFAULT_TARGETS`",
    "tuner_layer_cls": "there are no layers of lorafx's; `model.sites` lists what is adapted",
}
# What PEFT calls the libraries that quantise, by lorafx's names for how they store weights.
_BACKENDS = {"bitsandbytes 4-bit": "bnb 4bit", "bitsandbytes 8-bit": "bnb 8bit"}


@dataclass(frozen=True, kw_only=True)
class Status:
    """What PEFT says of adapters, at one layer or in all; a flag that differs from tensor to tensor is "irregular"."""

    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass(frozen=True, kw_only=True)
class LayerStatus(Status):
    """What PEFT's `get_layer_status` says of an adapted layer, under PEFT's names."""

    name: str
    module_type: str


@dataclass(frozen=True, kw_only=True)
class ModelStatus(Status):
    """What PEFT's `get_model_status` says of a model, under PEFT's names."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int


class LikePeft(Part):
    """The part of an adapted model that has the rest of PEFT's names."""

    @property
    def base_model(self) -> Any:
        """The model, as what PEFT puts around it: `base_model.model` is the model itself."""
        refuse_peft_itself("the methods `get_layer_status()` and `get_model_status()` of the model")
        return Inner(self.tree, self.tree)

    @property
    def active_peft_config(self) -> AdapterConfig:
        """The config of the first active adapter. Raises `AdapterError` if none is active."""
        if not self._lorafx.active:
            raise AdapterError("no adapter is active")
        return self._lorafx.configs[self._lorafx.active[0]]

    @property
    def peft_type(self) -> str:
        """The PEFT type of the first active adapter."""
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        """The modules that some adapter trains as a whole, as its config names them; None if there are none."""
        return {n for config in self._lorafx.configs.values() for n in config.modules_to_save or ()} or None

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of all modules that some adapter adapts."""
        return list(dict.fromkeys(site.module for each in self._lorafx.adapters.values() for site in each.selection))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of parameters (trainable, all). Of a trained bias and the base's it replaces, `all` counts one.

        A quantised weight counts as the numbers that it stands for, not as what they are packed into.
        """
        replicas = self._lorafx.replicas
        again = replicas.numbers if replicas is not None else ()  # what lies in another's memory counts once
        own = [(name, parameter) for name, parameter in self.tree.named_parameters() if id(parameter) not in again]
        counts = [(name, self._numbers_in(name, parameter), parameter.requires_grad) for name, parameter in own]
        total = sum(number for name, number, _ in counts if TRAINED_BIAS not in name.split("."))
        return sum(number for _, number, trainable in counts if trainable), total

    def _numbers_in(self, path: str, parameter: nn.Parameter) -> int:
        owner, _, name = path.rpartition(".")
        module = self.tree.get_submodule(owner)
        packed = next((storage for weight, _, storage in weights_of(module) if weight == name and storage.lossy), None)
        return math.prod(packed.shape(module, name)) if packed else parameter.numel()

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def get_layer_status(self) -> list[LayerStatus]:
        """Of each adapted module: which adapters it has, which of them act, train and are merged, and where."""
        return [self._layer_status(name) for name in self.targeted_module_names]

    def _layer_status(self, name: str) -> LayerStatus:
        here = [a for a in self._lorafx.adapters.values() if any(site.module == name for site in a.selection)]
        state, names = self._lorafx, [adapter.name for adapter in here]
        return LayerStatus(
            name=name,
            module_type=f"lora.{type(self.tree.get_submodule(name)).__name__}",
            enabled=not state.disabled,
            active_adapters=list(state.active),
            merged_adapters=[each for each in state.ledger.names if each in names],
            requires_grad={each.name: self._trains(each, name) for each in here},
            available_adapters=sorted(names),
            devices={each.name: self._devices(each, name) for each in here},
            quantization_backend=_irregular(self._backends(here, name)),
        )

    def get_model_status(self) -> ModelStatus:
        """The same of the model as a whole, with its numbers of parameters."""
        state = self._lorafx
        trainable, total = self.get_nb_trainable_parameters()
        return ModelStatus(
            base_model_type=type(state.base).__name__,
            adapter_model_type="AdaptedModel",
            peft_types={name: config.peft_type for name, config in state.configs.items()},
            trainable_params=trainable,
            total_params=total,
            num_adapter_layers=len(self.targeted_module_names),
            enabled=not state.disabled,
            active_adapters=list(state.active),
            merged_adapters=list(state.ledger.names),
            requires_grad={name: self._trains(adapter) for name, adapter in state.adapters.items()},
            available_adapters=sorted(state.adapters),
            devices={name: self._devices(adapter) for name, adapter in state.adapters.items()},
            quantization_backend=_irregular(self._backends(state.adapters.values())),
        )

    def _trains(self, adapter: Adapter, module: str | None = None) -> bool | str:
        return _irregular({tensor_at(self.tree, path).requires_grad for path in _paths(adapter, module)}) or False

    @staticmethod
    def _backends(adapters: Iterable[Adapter], module: str | None = None) -> set[str | None]:
        """Who has quantised the weights of these adapters' sites, by PEFT's names; None for dense ones."""
        stored = {site.storage for each in adapters for site in each.selection if module in (None, site.module)}
        return {None if storage == DENSE else _BACKENDS.get(storage.name, storage.name) for storage in stored}

    def _devices(self, adapter: Adapter, module: str | None = None) -> list[str]:
        return sorted({tensor_at(self.tree, path).device.type for path in _paths(adapter, module)})


def _irregular(found: set[Any]) -> Any:
    """The one thing that holds everywhere, None if there is nothing, or PEFT's word for several."""
    return "irregular" if len(found) > 1 else next(iter(found), None)


def _paths(adapter: Adapter, module: str | None) -> list[str]:
    """The paths of an adapter's own tensors, at one module or at all."""
    sites = [site for site in adapter.selection if module in (None, site.module)]
    return [path for site in sites for path in adapter.tensors[site.name].values()]

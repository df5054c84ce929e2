"""What PEFT's optimizers for LoRA are shown of an adapted model, so that they train it as they train PEFT's models.

`create_loraplus_optimizer` and `create_lorafa_optimizer` of PEFT's go through a model's parameters by name. Of each
they look up the layer: whether it is PEFT's `Embedding`, and what its scaling is. Here there are no such layers, so
these two functions are given names that lead to stand-ins below the model's attribute `LAYERS`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..adapters.kinds import SCALING
from ..adapters.peft_itself import asking_function_of_peft
from ..tree.lookup import tensor_at
from ..tree.mirror import STATE
from .state import State

LAYERS = "_layers_of_peft"
Named = Iterator[tuple[str, nn.Parameter]]


class Layer(nn.Module):
    """Stands for a layer of PEFT's: LoRA+ asks whether it is an embedding, and it is; LoRA-FA asks for its scaling."""

    def __init__(self, scaling: float | None = None):
        super().__init__()
        self.scaling = {} if scaling is None else {"scaled": scaling}

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return sys.modules["peft.tuners.lora.layer"].Embedding


def shown_to_peft(tree: nn.Module, named: Named) -> Named:
    """A model's named parameters; under other names if one of those two functions asks. The tensors are the same."""
    show = {"create_loraplus_optimizer": _to_loraplus, "create_lorafa_optimizer": _to_lorafa}
    function = asking_function_of_peft()
    return show[function](tree, named) if function in show else named


def _to_loraplus(tree: nn.Module, named: Named) -> Named:
    """Tensors of embeddings' adapters are shown as those of PEFT's embedding."""
    vars(tree)[STATE].layers_of_peft = nn.ModuleList([Layer()])
    for name, parameter in named:
        yield (f"{LAYERS}.0.{name.replace('.', ' ')}.weight" if ".lora_embedding_" in name else name), parameter


def _to_lorafa(tree: nn.Module, named: Named) -> Named:
    """Each A beside its B, and nothing frozen: the optimizer takes two that follow each other for a pair."""
    state: State = vars(tree)[STATE]
    found = list(pairs(tree))
    paired = {id(tensor) for a, b, _ in found for tensor in (a, b)}
    others = [(name, parameter) for name, parameter in named if parameter.requires_grad and id(parameter) not in paired]
    state.layers_of_peft = nn.ModuleList(Layer(scaling) for _, _, scaling in found)
    for number, (a, b, _) in enumerate(found):
        yield f"{LAYERS}.{number}.lora_A.scaled", a
        yield f"{LAYERS}.{number}.lora_B.scaled", b
    for number, (_, parameter) in enumerate(others):
        yield f"other {number}", parameter


def pairs(tree: nn.Module) -> Iterator[tuple[Any, Any, float]]:
    """A (r, in), B (out, r) and scaling of each linear site that the active adapters of an adapted model train."""
    state: State = vars(tree)[STATE]
    for adapter in map(state.adapters.__getitem__, state.active):
        for site in adapter.selection:
            paths = adapter.tensors[site.name]
            if {"lora_A.weight", "lora_B.weight"} <= paths.keys():
                a, b = (tensor_at(tree, paths[suffix]) for suffix in ("lora_A.weight", "lora_B.weight"))
                if b.requires_grad and a.ndim == b.ndim == 2:
                    yield a, b, adapter.numbers(tree, site)[SCALING]

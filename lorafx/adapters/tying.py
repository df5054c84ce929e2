"""Tied weights: the input embedding's, which other modules have, too, and `ensure_weight_tying`.

LoRA at a tied weight is one adapter in any case, which acts wherever the weight is read. With `ensure_weight_tying` it
is the input embedding's whichever of the modules is asked for, as in PEFT, whose files have its tensors once more for
each of the others, turned to how that one reads the weight. Of a module to save the copy is the weight of them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from ..tree.lookup import given_by, tensor_at
from .kinds import Kind
from .site import Site
from .storages import weights_of


def input_embedding(model: nn.Module) -> str:
    """The name of the model's input embedding; empty if it does not tell."""
    embedding = given_by(model, "get_input_embeddings")
    return next((name for name, module in model.named_modules() if module is embedding), "")


def tied_to_embedding(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules that have the input embedding's weight, that itself first; none if it has it alone."""
    name = input_embedding(model)
    weight = getattr(model.get_submodule(name), "weight", None) if name else None
    if weight is None:
        return ()
    others = [
        other
        for other, module in model.named_modules()
        if other != name and any(parameter is weight for parameter in module._parameters.values())
    ]
    return (name, *others) if others else ()


def with_twins(root: nn.Module, replaced: Mapping[str, str], below: str) -> dict[str, str]:
    """Copies by the base tensor's path, with one for all modules of the input embedding's weight if one has a copy.

    That one hangs in the embedding, at `below`.
    """
    tied = tied_to_embedding(root)
    weights = [path for name in tied for path in _paths_of(root, name, tensor_at(root, f"{tied[0]}.weight"))]
    if not any(path in replaced for path in weights):
        return dict(replaced)
    return {**replaced, **dict.fromkeys(weights, f"{tied[0]}.{below}.weight")}


def parted(root: nn.Module, replaced: Mapping[str, str]) -> set[int]:
    """The base tensors, by identity, that several modules have, of which not all read one copy."""
    owners = Counter(id(p) for module in root.modules() for p in module._parameters.values()) if replaced else Counter()
    copies: dict[int, list[str]] = {}
    for base, copy in replaced.items():
        copies.setdefault(id(tensor_at(root, base)), []).append(copy)
    return {tensor for tensor, named in copies.items() if owners[tensor] > len(named) or len(set(named)) > 1}


def read_at(root: nn.Module, named: Mapping[int, str], replaced: Mapping[str, str]) -> dict[int, tuple[str, ...]]:
    """Where the model reads each base tensor, of these names by identity: at the copies of it that replace it.

    If these are for some of its modules alone, it is read for the others as well.
    """
    places: dict[int, tuple[str, ...]] = {tensor: (name,) for tensor, name in named.items()}
    copies: dict[int, dict[str, None]] = {}  # each once, in order
    for base, copy in replaced.items():
        copies.setdefault(id(tensor_at(root, base)), {})[copy] = None
    apart = parted(root, replaced)
    for tensor, own in copies.items():
        places[tensor] = (*own, *(places.get(tensor, ()) if tensor in apart else ()))
    return places


def turned(
    root: nn.Module, kind: Kind, config: object, site: Site, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, Tensor]]:
    """What each other module of a tied site has of an adapter's tensors there: the module, a suffix, the value."""
    for name in site.tied:
        module = root.get_submodule(name)
        for parameter, reading, storage in weights_of(module):
            if tensor_at(module, parameter) is tensor_at(root, site.weight):
                other = replace(site, module=name, parameter=parameter, reading=reading, storage=storage)
                values = tensors if reading.lookup == site.reading.lookup else kind.transposed(tensors)
                for key, spec in kind.tensors(other, config).items():
                    yield name, spec.suffix, values[key]


def _paths_of(root: nn.Module, name: str, tensor: Tensor | nn.Module | None) -> list[str]:
    return [f"{name}.{last}" for last, each in root.get_submodule(name)._parameters.items() if each is tensor]

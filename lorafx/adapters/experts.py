"""Experts that one parameter stacks: which parameters these are, and what the layers were called that they were before.

transformers 4 had a layer for each projection of each expert, and configs go on naming these. transformers 5 has them
in one parameter, with projections of one input below one another. PEFT knows the same names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from .config import AdapterConfig, is_named
from .mismatches import can_be_adapted

ROUTER = "gate.weight"
# What the projections of experts, and routers, were called, by the ending of the parameter that has them now; by the
# type of model that had these names first.
_NAMES = {
    "mixtral": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",), ROUTER: ("gate",)},
    "qwen2_moe": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",), ROUTER: ("gate",)},
}
_WAS = {"mixtral": {".mlp.": ".block_sparse_moe."}}  # what else was called otherwise


class Stack(NamedTuple):
    """A parameter, and what the layers were called that were its parts: `parts` has full names by the last of them.

    `ending` is that of its path. Layers of experts are named once with the first expert's number, and once without one.
    """

    path: str
    ending: str
    parts: dict[str, list[str]]

    @property
    def module(self) -> str:
        """The path of the module that has the parameter."""
        return self.path.rpartition(".")[0]

    @property
    def names(self) -> list[str]:
        """All names of all its parts."""
        return [name for names in self.parts.values() for name in names]

    def is_excluded(self, config: AdapterConfig) -> bool:
        """Whether the config excludes the parameter or its module by their names of today."""
        return any(is_named(config.exclude_modules, name) for name in (self.path, self.module))


def stacks(model: nn.Module) -> Iterator[Stack]:
    """The parameters of a model that were layers once; none of a model that PEFT does not know as one of these."""
    family = _family(model)
    known = _NAMES.get(family, {})
    for path, module in model.named_modules() if known else ():
        for name, parameter in module._parameters.items():
            whole = f"{path}.{name}"
            ending = next((each for each in known if is_named((each,), whole)), None)
            if ending is None or parameter is None or can_be_adapted(module):
                continue
            places = (path, *(path.replace(now, once) for now, once in _WAS.get(family, {}).items()))
            if ending == ROUTER:
                yield Stack(whole, ending, {"gate": [*places]})
            elif parameter.ndim == 3:
                named = {last: [f"{at}{of}.{last}" for at in places for of in ("", ".0")] for last in known[ending]}
                yield Stack(whole, ending, named)


def names_of_experts(model: nn.Module) -> set[str]:
    """The last names of layers that PEFT takes for experts' in this model, whatever they are of."""
    known = _NAMES.get(_family(model), {})
    return {last for ending, names in known.items() if ending != ROUTER for last in names}


def _family(model: nn.Module) -> str:
    """The type of model after whose rules transformers reads the checkpoints of this one; empty if it has its own."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return ""
    from ..torch_private.loading import family  # imports transformers, which a model of its own has done

    return family(model.config.model_type)

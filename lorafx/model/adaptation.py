"""Adaptation: all that lorafx knows of an adapted model and does with it, under names that cannot collide."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from torch import nn

from ..adapters.config import AdapterConfig
from ..adapters.site import Selection
from ..errors import AdapterError
from ..graph.blocks import repeated_modules
from ..pipeline import Context
from ..serving.early_calls import EarlyCalls
from ..serving.programs import Program
from ..tree.mirror import STATE
from .allocation import Allocation
from .graphs import Graphs
from .hotswap import HotSwap
from .like_peft import LikePeft
from .penalties import Penalties
from .report import Call, Explanation, Report
from .saving import Saving
from .trainers import Trainable
from .weighted import Weighted


# Whoever changes what acts asks what is merged, so parts are made of others: Scales of Merges, Adapters of Scales, and
# of Adapters Weighted and HotSwap. Saving and Allocation need Merges alone, and the other parts none.
class Adaptation(LikePeft, Weighted, HotSwap, Saving, Allocation, Penalties, Trainable, Graphs):
    """The whole interface of an adapted model, apart from the model; made by `lorafx.of(model)`.

    The model has these names as well, as far as its base does not use them for something of its own.
    """

    @property
    def sites(self) -> Selection:
        """The sites of the active adapters, as a table when printed."""
        return Context(tuple(self._lorafx.adapters[name] for name in self._lorafx.active)).selection

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, in order, each with its own parameters and adapters: what to give to FSDP2's `fully_shard`."""
        return repeated_modules(self.tree)

    @property
    def peft_config(self) -> Mapping[str, AdapterConfig]:
        """The config of each adapter by name: one mapping, which follows what is added and deleted."""
        return self._lorafx.configs

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in order."""
        return list(self._lorafx.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the names if there are several."""
        return self._lorafx.active[0] if len(self._lorafx.active) == 1 else list(self._lorafx.active)

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into the base weights, in order."""
        return list(self._lorafx.ledger.names)

    def get_base_model(self) -> nn.Module:
        """This model itself: the base model that PEFT returns here computes with the adapters, too.

        The object that was compiled has none; `unload` returns it.
        """
        return self.tree

    def report(self) -> Report:
        """What each pass did to each kept graph, and what merging holds; prints as tables."""
        graphs = {
            f"graph {number} ({program.title}), captured in {program.seconds:.2f} s": program.steps
            for number, program in enumerate(p for d in self._lorafx.dispatchers for p in d if p.gm is not None)
        }
        return Report(graphs, len(self.sites), self._lorafx.ledger.sizes(self.tree), self._lorafx.ledger.lost)

    def explain(self) -> Explanation:
        """What has served each kind of call (a graph, or the model by sites), why and how often; prints as a table."""
        dispatchers = list(self._lorafx.dispatchers)
        calls = [_explained(program, each.early) for each in dispatchers for program in each]
        pieces = chain.from_iterable(each.graphs.lowering.pieces.values() for each in dispatchers)
        compiled = tuple((p.title, p.compiled, "\n".join(p.reasons)) for p in pieces)
        operators = sum(len(each.by_sites.operators) for each in dispatchers)
        dropped = sum(each.programs.dropped for each in dispatchers)
        return Explanation(tuple(calls), operators, dropped, compiled)

    def __repr__(self) -> str:
        state = self._lorafx
        adapters = ", ".join(f"{n}{'*' if n in state.active else ''}" for n in state.adapters) or "none"
        return f"AdaptedModel({type(state.base).__name__}, {len(self.sites)} sites, adapters: {adapters})"


def _explained(program: Program, calls: EarlyCalls) -> Call:
    how = "sites" if program.gm is None else "graph"
    early = program.hits + 1 if program.waits else program.early
    texts = program.why, program.reason, program.loss, program.launched
    waits_for = calls.left(program.key) if program.waits else 0
    return Call(program.title, how, program.hits, program.seconds, *texts, early, waits_for)


def of(model: nn.Module) -> Adaptation:
    """All that lorafx knows of an adapted model and does with it, whatever names the model itself uses.

    `lorafx.of(model).sites` is `model.sites`, unless the base model has `sites` of its own; and so for every name.
    Raises `AdapterError` for a model that is not adapted.
    """
    if STATE not in vars(model):
        raise AdapterError(f"this {type(model).__name__} is not adapted: pass what `lorafx.compile` or `load` returned")
    return Adaptation(model)  # type: ignore[arg-type]

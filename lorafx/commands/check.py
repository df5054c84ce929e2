"""`lorafx check`: whether lorafx computes with this model and adapter what their formulas say."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import PreTrainedModel

from .. import testing
from ..errors import CaptureError, LorafxError
from ..model.adaptation import of
from ..model.adapted_model import AdaptedModel
from ..tables import table
from .adapted import adapted, base_of, example_call, is_config
from .refusals import refusing

# Batch and length of the calls that are compared: sizes of one and others, in turn, of one graph or several.
_SIZES = ((2, 9), (3, 7), (1, 9), (2, 1))


@refusing
def check(
    base: Annotated[str, typer.Argument(help="folder or Hub id of the base model")],
    adapter: Annotated[str, typer.Argument(help="folder or Hub id of an adapter, or a config's JSON file")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> int:
    """Check a model and an adapter: graphs, the model's own Python, the formula, gradients, merging, files.

    Exit status 0 if all of it holds, else 1. Inputs are random, tolerances are derived from the dtypes, and a config's
    adapter has random values. There are up to four copies of the model in memory, one of them of at least 32 bits.

    Example: lorafx check base/ adapter/
    """
    torch.manual_seed(0)
    subject = Subject(base_of(base).eval(), adapter)
    results = [(name, _verdict(test)) for name, test in subject.tests()]
    if as_json:
        print(json.dumps([{"check": name, "holds": not fault, "fault": fault} for name, fault in results], indent=2))
    else:
        rows = [(name, fault or "holds") for name, fault in results]
        print(table(f"{base} with {adapter}", ("check", "verdict"), rows))
        print(of(subject.lora).explain())
    return int(any(fault for _, fault in results))


def _verdict(test: Callable[[], object]) -> str:
    """What is wrong, or nothing."""
    try:
        test()
    except (AssertionError, LorafxError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    except Exception as error:  # what a wrong graph makes torch raise is a verdict, too
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


class Subject:
    """A base, the same with the adapter, and calls of both."""

    def __init__(self, plain: PreTrainedModel, adapter: str) -> None:
        self.plain, self.adapter, self.capture = plain, adapter, "graph"
        self.lora = self._adapted()
        self.calls = [example_call(plain, *size) for size in _SIZES]
        for each in self.lora._lorafx.adapters.values():
            self._invoke(each.kind.invocation(each.config))

    def _invoke(self, tokens: tuple[int, ...]) -> None:
        """Have the first row of each call that is long enough invoke an adapter that waits for these tokens."""
        for call in self.calls:
            ids = call["input_ids"][0] if tokens else torch.empty(0)
            if len(ids) > len(tokens) > 0:
                ids[-len(tokens) - 1 : -1] = torch.tensor(tokens)

    def _adapted(self, capture: str | None = None) -> AdaptedModel:
        lora = adapted(copy.deepcopy(self.plain), self.adapter, capture=capture or self.capture).eval()
        if is_config(self.adapter):
            testing.randomize(lora)
        return lora

    @cached_property
    def wide(self) -> AdaptedModel:
        """The model with the adapter in float32 if its dtype has fewer bits, and no weights are packed.

        Float64 would not be finer: norms and softmaxes of transformers' models round to float32, whatever goes in.
        """
        lora = self._adapted()
        is_wide = self.plain.dtype.itemsize >= 4 or getattr(self.plain, "is_quantized", False)
        return lora if is_wide else lora.float()

    def _outputs(self, model: nn.Module) -> list[Any]:
        return [model(**call) for call in self.calls]

    def _output(self, model: nn.Module) -> Any:
        """Of the first call alone, for graphs of further kinds: one for each size would take long."""
        return model(**self.calls[0])

    def tests(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """What is checked, in words, with the function that raises where it does not hold."""
        yield "every call has a graph of the whole", self._have_graphs
        yield "switched off, the adapter leaves the base's outputs", self._is_the_base_when_off
        yield "by the model's own Python, site by site, outputs are the same", self._is_the_same_by_sites
        yield "merged, outputs are the same", partial(testing.assert_merged_equals_unmerged, self.lora, self._outputs)
        yield "unmerging gives back every bit", partial(testing.assert_merge_is_exact, self.lora)
        if all(each.kind.derives for each in self.lora._lorafx.adapters.values()):
            yield "gradients are what outputs change by", self._has_the_gradients_of_its_outputs
        yield "a plain model with W + ΔW for weights gives the same", self._is_the_plain_model_of_the_formula
        yield "in training, graph and sites draw the same and give the same", self._trains_alike
        yield "saved and loaded, it is the same", self._is_the_same_when_loaded

    @torch.no_grad()
    def _have_graphs(self) -> None:
        """Where they have none, all else is checked by sites."""
        try:
            for call in self.calls:
                of(self.lora).graph(**call)
        except CaptureError:
            self.capture = "sites"
            self.lora = self._adapted()
            raise

    @torch.no_grad()
    def _is_the_base_when_off(self) -> None:
        with of(self.lora).disable_adapter():
            limits = testing.tolerance(self.lora, self._outputs)
            state = self.lora._lorafx
            is_other = state.replicas is not None or any(each.takes_from_base for each in state.adapters.values())
            base = state.base if is_other else self.plain
            testing.assert_close(self._outputs(self.lora), self._outputs(base), limits)

    @torch.no_grad()
    def _is_the_same_by_sites(self) -> None:
        limits = [2 * each for each in testing.tolerance(self.lora, self._outputs)]
        testing.assert_close(self._outputs(self.lora), self._outputs(self._adapted("sites")), limits)

    def _has_the_gradients_of_its_outputs(self) -> None:
        of(self.wide).set_requires_grad(of(self.wide).active_adapters)  # a loaded one is frozen
        testing.assert_gradients(self.wide, self._output)

    def _is_the_plain_model_of_the_formula(self) -> None:
        testing.assert_unloaded_equals_unmerged(self.wide, self._output)

    @torch.no_grad()
    def _trains_alike(self) -> None:
        def seeded(model: nn.Module) -> Any:
            torch.manual_seed(0)
            return self._output(model)

        graph, sites = self._adapted().train(), self._adapted("sites").train()
        limits = [2 * each for each in testing.tolerance(graph, seeded)]
        testing.assert_close(seeded(graph), seeded(sites), limits)

    def _is_the_same_when_loaded(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            testing.assert_roundtrip(self.lora, Path(folder))

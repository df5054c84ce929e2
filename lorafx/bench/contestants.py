"""Contestants: how each is set up, as fast as its own documentation knows, on the same weights and start values.

Each maker takes the case and the frozen base and gives a setup. Bases share their tensors (`twin`); adapters
start from values that their names decide, B among them, so that every gradient has something to say.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers.models.llama import modeling_llama

import lorafx

from ..torch_private.compilers import ACTIVATION_BUDGET, aot_autograd, lookup_backend
from .cases import Case
from .models import twin

_PEFT_PREFIX = "base_model.model."
WITHOUT = "lorafx-without-"
MERGING = lorafx.passes.default + [lorafx.passes.MergeOnTheFly()]


Around = Callable[[], AbstractContextManager[Any]]


class Missing(Exception):
    """A contestant that cannot run here, and why."""


@dataclass(frozen=True)
class Setup:
    """A model to run, and what is around each forward and backward of it."""

    model: nn.Module
    each: Around = nullcontext


Maker = Callable[[Case, nn.Module], Setup]


def base_model(case: Case, base: nn.Module) -> Setup:
    """The limit: no adapter at all."""
    model = twin(base)
    if case.checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    return Setup(model)


def with_peft(case: Case, base: nn.Module, default: bool = False) -> Setup:
    """PEFT as it comes (adapters of a half-precision base in float32), or with adapters in the base's dtype."""
    return Setup(_peft(case, base, default))


def _peft(case: Case, base: nn.Module, default: bool = False) -> nn.Module:
    config = peft.LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules=list(case.targets))
    config.lora_dropout = case.dropout
    model: Any = peft.get_peft_model(twin(base), config, autocast_adapter_dtype=default)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    return filled(model.train(), case)


def with_compiled_peft(case: Case, base: nn.Module, budget: float = 1.0, whole: bool = False) -> Setup:
    """PEFT compiled layer by layer (equal layers share one compilation) or as a whole, for the sizes of the case."""
    model, inductor = _peft(case, base), lookup_backend("inductor")

    def backend(gm: GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        """Inductor with this budget; a function of its own, or Dynamo would take what another budget's gave."""
        with aot_autograd.patch({ACTIVATION_BUDGET: budget}):
            return inductor(gm, inputs, **options)

    layers = [module for module in model.modules() if isinstance(module, modeling_llama.LlamaDecoderLayer)]
    for module in [model] if whole or not layers else layers:
        module.compile(backend=backend, dynamic=False)
    return Setup(model)


def with_lorafx(case: Case, base: nn.Module, default: bool = False, **options: Any) -> Setup:
    """lorafx, its adapters in the base's dtype or as it comes."""
    config = {"r": case.rank, "lora_alpha": 2 * case.rank, "target_modules": case.targets, "lora_dropout": case.dropout}
    chosen: dict[str, Any] = {"backend": "eager", "gradient_checkpointing": case.checkpointing} | options
    return Setup(filled(lorafx.compile(base, config, autocast_adapter_dtype=default, **chosen).train(), case))


def merged(case: Case, base: nn.Module, mode: str | None = None) -> Setup:
    """A plain model whose weights hold the update: for inference, what adapters should cost."""
    own = twin(base)
    for name, parameter in list(own.named_parameters()):
        if name.endswith(tuple(f"{target}.weight" for target in case.targets)):
            parent, _, last = name.rpartition(".")
            setattr(own.get_submodule(parent), last, nn.Parameter(parameter.clone(), requires_grad=False))
    model = _peft(case, own).merge_and_unload()  # type: ignore[operator]
    if mode:
        model.compile(mode=mode)
    return Setup(model)


def with_liger(case: Case, base: nn.Module) -> Setup:
    """Liger's kernels below PEFT's layers. What it puts into transformers' module stays there only during its steps."""
    _need("liger_kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    own, before = twin(base), dict(vars(modeling_llama))
    apply_liger_kernel_to_llama(model=own)
    patches = {name: value for name, value in vars(modeling_llama).items() if before.get(name) is not value}
    vars(modeling_llama).update({name: before[name] for name in patches})
    return Setup(_peft(case, own), each=partial(_patched, patches))


@contextmanager
def _patched(patches: dict[str, Any]) -> Iterator[None]:
    before = {name: vars(modeling_llama)[name] for name in patches}
    vars(modeling_llama).update(patches)
    try:
        yield
    finally:
        vars(modeling_llama).update(before)


def with_unsloth(case: Case, base: nn.Module) -> Setup:
    """Unsloth on a saved copy of the base, as it loads models itself. Importing it changes transformers for all."""
    _need("unsloth")
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)  # type: ignore[operator]
        options = {"load_in_4bit": False, "dtype": getattr(torch, case.dtype)}
        model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=case.sequence, **options)
    adapters = {"r": case.rank, "lora_alpha": 2 * case.rank, "target_modules": list(case.targets)}
    options = {"lora_dropout": case.dropout, "use_gradient_checkpointing": case.checkpointing}
    return Setup(filled(FastLanguageModel.get_peft_model(model, **adapters, **options).train(), case))


def _need(library: str) -> None:
    try:
        import_module(library)
    except Exception as error:
        raise Missing(f"not importable: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


MAKERS: dict[str, Maker] = {
    "base": base_model,
    "merged": merged,
    "merged-graphs": partial(merged, mode="reduce-overhead"),
    "peft-default": partial(with_peft, default=True),
    "peft": with_peft,
    "peft-compiled": with_compiled_peft,
    "peft-compiled-0.9": partial(with_compiled_peft, budget=0.9),
    "peft-compiled-whole": partial(with_compiled_peft, whole=True),
    "liger": with_liger,
    "unsloth": with_unsloth,
    "lorafx-default": partial(with_lorafx, default=True),
    "lorafx": with_lorafx,
    "lorafx-compiled": partial(with_lorafx, backend="inductor"),
    "lorafx-compiled-1.0": partial(with_lorafx, backend="inductor", activation_budget=1.0),
    "lorafx-tuned": partial(with_lorafx, backend="inductor", mode="max-autotune-no-cudagraphs"),
    "lorafx-graphs": partial(with_lorafx, backend="inductor", mode="reduce-overhead"),
    "merging": partial(with_lorafx, pipeline=MERGING),  # not lorafx-…, so that no bar is held by an option that rounds
    "merging-compiled": partial(with_lorafx, pipeline=MERGING, backend="inductor"),
}


def without(name: str) -> tuple[str, Maker]:
    """lorafx run eagerly without one pass, to see that pass's own gain. `PipelineError`: there is no such pass."""
    return WITHOUT + name, partial(with_lorafx, pipeline=lorafx.passes.default.without(name))


def of_case(case: Case, extra: tuple[str, ...] = ()) -> list[str]:
    """Who runs a case: in full precision the defaults of PEFT and lorafx are what runs anyway.

    With dropout nothing can be merged.
    """
    same = {"peft-default", "lorafx-default"} if case.dtype == "float32" else set()
    same |= {"merging", "merging-compiled"} if case.dropout else set()
    return [name for name in (*case.contestants, *extra) if name not in same]


def filled(model: nn.Module, case: Case) -> nn.Module:
    """Adapter tensors by their names, of values that the case's dtype can hold, whatever their own dtype is."""
    with torch.no_grad():
        for name, parameter in adapter_tensors(model).items():
            rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = 0.02 if ".lora_B." in name else parameter.shape[1] ** -0.5
            parameter.copy_((scale * torch.randn(parameter.shape, generator=rng)).to(getattr(torch, case.dtype)))
    return model


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that train, by the names that PEFT's and lorafx's have in common."""
    named = {name.removeprefix(_PEFT_PREFIX): p for name, p in model.named_parameters() if p.requires_grad}
    return {name: p for name, p in named.items() if ".lora_" in name}

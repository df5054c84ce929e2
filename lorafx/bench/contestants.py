"""Contestants: each is set up the fastest way that its own documentation gives, on the same weights and adapter values.

Each maker takes the case and the frozen base and gives a setup. Bases share their tensors (`twin`). Adapter tensors are
filled with random numbers seeded by their names; B too, since with B = 0 the gradient of A would be zero.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama import modeling_llama

import lorafx

from ..torch_private.compilers import ACTIVATION_BUDGET, aot_autograd, lookup_backend
from .cases import Case
from .models import twin

_PEFT_PREFIX = "base_model.model."
_APART = re.compile(r"^models\.\d+\.")
WITHOUT = "lorafx-without-"
COARSER = frozenset({"lorafx-float8"})  # by their users' wish: differences are shown, and not judged
ONE_ADAPTER = frozenset({"lorafx"})  # where others have several: it computes something else
IN_FLOAT8 = lorafx.passes.default + [lorafx.passes.MultiplyInFloat8()]


Around = Callable[[], AbstractContextManager[Any]]


class Missing(Exception):
    """A contestant cannot run here; the message says why."""


@dataclass(frozen=True)
class Setup:
    """A model to run, a context manager for each forward and backward, and arguments besides the batch."""

    model: nn.Module
    each: Around = nullcontext
    arguments: dict[str, Any] = field(default_factory=dict)


Maker = Callable[[Case, nn.Module], Setup]


def base_model(case: Case, base: nn.Module, compiled: bool = False) -> Setup:
    """The limit: no adapter at all; eager, or compiled as PEFT is."""
    model = twin(base)
    if case.checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    return Setup(_compiled(model) if compiled else model)


def with_peft(case: Case, base: nn.Module, default: bool = False) -> Setup:
    """PEFT with adapters in the base's dtype, or with its `default`: float32 adapters on a half-precision base."""
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
    return Setup(_compiled(_peft(case, base), budget, whole))


def _compiled(model: nn.Module, budget: float = 1.0, whole: bool = False) -> nn.Module:
    inductor = lookup_backend("inductor")

    def backend(gm: GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        """Inductor with this budget. A new function for each, or Dynamo would reuse what another budget compiled."""
        with aot_autograd.patch({ACTIVATION_BUDGET: budget}):
            return inductor(gm, inputs, **options)

    layers = [module for module in model.modules() if isinstance(module, modeling_llama.LlamaDecoderLayer)]
    for module in [model] if whole or not layers else layers:
        module.compile(backend=backend, dynamic=False)
    return model


def with_lorafx(case: Case, base: nn.Module, default: bool = False, **options: Any) -> Setup:
    """lorafx with adapters in the base's dtype, or with its `default`: float32 adapters on a half-precision base."""
    config = {"r": case.rank, "lora_alpha": 2 * case.rank, "target_modules": case.targets, "lora_dropout": case.dropout}
    chosen: dict[str, Any] = {
        "backend": "eager",
        "capture": "graph",
        "gradient_checkpointing": case.checkpointing,
    } | options
    return Setup(filled(lorafx.compile(base, config, autocast_adapter_dtype=default, **chosen).train(), case))


def with_rows(case: Case, base: nn.Module) -> Setup:
    """lorafx with an adapter for each row of the batch."""
    names = rows_of(case)
    config = {"r": case.rank, "lora_alpha": 2 * case.rank, "target_modules": case.targets}
    model = lorafx.compile(base, config, adapter_name=names[0], backend="eager", capture="graph").train()
    for name in dict.fromkeys(names[1:]):
        if name != names[0]:
            model.add_adapter(name, config)
    model.set_adapter(list(dict.fromkeys(names)))
    return Setup(filled(model, case), arguments={"adapter_names": names})


def with_peft_rows(case: Case, base: nn.Module) -> Setup:
    """PEFT with an adapter for each row of the batch, which it runs one after the other, in evaluation alone."""
    names = rows_of(case)
    config = peft.LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules=list(case.targets))
    model: Any = peft.get_peft_model(twin(base), config, adapter_name=names[0])
    for name in dict.fromkeys(names[1:]):
        if name != names[0]:
            model.add_adapter(name, config)
    model.base_model.set_adapter(list(dict.fromkeys(names)))
    return Setup(filled(model, case), arguments={"adapter_names": names})


class Apart(nn.Module):
    """Models that take the rows of a batch in turns, each its share; the loss is the mean of theirs."""

    def __init__(self, models: Iterable[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, **arguments: Tensor) -> CausalLMOutput:
        shares = zip(*(value.chunk(len(self.models)) for value in arguments.values()))
        losses = [model(**dict(zip(arguments, share))).loss for model, share in zip(self.models, shares)]
        return CausalLMOutput(loss=torch.stack(losses).mean())


def apart(case: Case, base: nn.Module, by_peft: bool = False) -> Setup:
    """A model of one adapter for each, by lorafx or by PEFT, one after the other on its rows."""
    models: list[nn.Module] = []
    for name in dict.fromkeys(rows_of(case)):
        if by_peft:
            config = peft.LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules=list(case.targets))
            models.append(peft.get_peft_model(twin(base), config, adapter_name=name).train())  # type: ignore[arg-type]
        else:
            own = {"r": case.rank, "lora_alpha": 2 * case.rank, "target_modules": case.targets}
            models.append(lorafx.compile(base, own, adapter_name=name, backend="eager", capture="graph").train())
    return Setup(filled(Apart(models), case))


def rows_of(case: Case) -> list[str]:
    """The adapter of each row: rows of one adapter follow one another."""
    share = case.batch // case.adapters
    return [f"a{number}" for number in range(case.adapters) for _ in range(share)]


def with_float8(case: Case, base: nn.Module) -> Setup:
    """lorafx, compiled, with the weights of the base in float8 and products of float8."""
    return with_lorafx(case, lorafx.to_float8(twin(base)), backend="inductor", pipeline=IN_FLOAT8)


def merged(case: Case, base: nn.Module, mode: str | None = None) -> Setup:
    """A plain model with the adapters merged: in inference, adapters should cost no more than this."""
    own = twin(base)
    for name, parameter in list(own.named_parameters()):
        if name.endswith(tuple(f"{target}.weight" for target in case.targets)):
            parent, _, last = name.rpartition(".")
            setattr(own.get_submodule(parent), last, nn.Parameter(parameter.clone(), requires_grad=False))
    model = _peft(case, own).merge_and_unload()  # type: ignore[operator]
    if mode:
        model.compile(mode=mode, dynamic=False)  # it decodes one token a call, into a cache of one size
    return Setup(model)


def with_liger(case: Case, base: nn.Module) -> Setup:
    """Liger's kernels with PEFT's layers. What Liger patches in transformers is in place only during its own steps."""
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
    """Unsloth, which loads the folder that the base was loaded from. Importing it changes transformers for all."""
    _need("unsloth")
    from unsloth import FastLanguageModel

    options = {"load_in_4bit": case.quantised == "nf4", "dtype": getattr(torch, case.dtype)}
    model, _ = FastLanguageModel.from_pretrained(base.name_or_path, max_seq_length=case.sequence, **options)
    adapters = {"r": case.rank, "lora_alpha": 2 * case.rank, "target_modules": list(case.targets)}
    checkpoints = {"use_gradient_checkpointing": "unsloth" if case.checkpointing else False}
    model = FastLanguageModel.get_peft_model(model, **adapters, **checkpoints, lora_dropout=case.dropout)
    return Setup(filled(model.train(), case))


def _need(library: str) -> None:
    try:
        import_module(library)
    except Exception as error:
        raise Missing(f"not importable: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


MAKERS: dict[str, Maker] = {
    "base": base_model,
    "base-compiled": partial(base_model, compiled=True),
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
    "lorafx-offloaded": partial(with_lorafx, backend="inductor", gradient_checkpointing="offload"),
    "lorafx-float8": with_float8,
    "lorafx-rows": with_rows,
    "lorafx-apart": apart,
    "peft-rows": with_peft_rows,
}


def without(name: str) -> tuple[str, Maker]:
    """The name and maker of lorafx run eagerly without one pass, to see what it gains; `PipelineError` if unknown."""
    return WITHOUT + name, partial(with_lorafx, pipeline=lorafx.passes.default.without(name))


def of_case(case: Case, extra: tuple[str, ...] = ()) -> list[str]:
    """Who runs a case: its contestants and `extra`, less those that run the same as another.

    In float32 the defaults of PEFT and lorafx are what runs anyway.
    """
    same = {"peft-default", "lorafx-default"} if case.dtype == "float32" else set()
    return [name for name in (*case.contestants, *extra) if name not in same]


def filled(model: nn.Module, case: Case) -> nn.Module:
    """Fill adapter tensors with values seeded by their names and rounded to the case's dtype: the same for all."""
    with torch.no_grad():
        for name, parameter in adapter_tensors(model).items():
            rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = 0.02 if ".lora_B." in name else parameter.shape[1] ** -0.5
            parameter.copy_((scale * torch.randn(parameter.shape, generator=rng)).to(getattr(torch, case.dtype)))
    return model


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' trainable tensors, by names that are the same for PEFT and lorafx."""
    trained = ((_APART.sub("", name), p) for name, p in model.named_parameters() if p.requires_grad)
    named = {name.removeprefix(_PEFT_PREFIX): p for name, p in trained}
    return {name: p for name, p in named.items() if ".lora_" in name}

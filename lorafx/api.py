"""compile and load: what a user calls first."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from . import passes  # type: ignore[attr-defined]
from .adapters.adapter import Adapter
from .adapters.config import AdapterConfig
from .adapters.expert_names import with_experts
from .adapters.kinds import config_of
from .adapters.planning import plan
from .errors import AdapterError, ConfigError, PipelineError, warn
from .files import apart, checkpoint  # type: ignore[attr-defined]
from .lowering.backend import Backend
from .model.adaptation import of
from .model.adapted_model import AdaptedModel, adapt
from .model.rows import acting_in
from .pipeline import Observer, Pass, Pipeline
from .serving.dispatcher import Dispatcher
from .tree.attached import ATTACHED
from .tree.lookup import copy_into
from .tree.mirror import mirrored
from .tree.replication import layers_of_others, replicated
from .tree.unfit_bases import require_no_layers_of_peft, require_tensors_in_place
from .tree.wrappers import unwrapped

Passes = Pipeline | Iterable[Pass] | str


def compile(
    model: nn.Module,
    config: AdapterConfig | Mapping[str, Any] | Any,
    *,
    adapter_name: str = "default",
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    backend: str = "auto",
    mode: str | None = None,
    capture: str = "auto",
    pipeline: Passes | None = None,
    observers: Iterable[Observer] = (),
    gradient_checkpointing: bool | str = False,
    activation_budget: float | None = None,
    autocast_adapter_dtype: bool = True,
    adapter_compute_dtype: torch.dtype | str | None = None,
    low_cpu_mem_usage: bool = False,
    random_state: int | None = None,
) -> AdaptedModel:
    """Put a new adapter on a model, by rewriting the model's graph.

    The base's parameters are frozen and shared, never copied; PiSSA, OLoRA and LoftQ take start values out of them.

    Args:
        config: a `LoraConfig` or another kind's config, a config of `peft`, or a dict of its fields.
        example_inputs: the arguments of a call, a mapping by name or a tuple, whose graph is made now.
        backend: "eager", a `torch.compile` backend, or "auto": Inductor on CUDA, eager elsewhere.
        mode: of Inductor: "max-autotune", …; "reduce-overhead" launches calls on a GPU as CUDA graphs, eager ones, too.
        capture: "auto" gives a kind of call that keeps coming a graph, where that is possible, or at once where a
            compiling `backend` or a `mode` is named; "graph" at once, or it is an error; "sites" gives none.
        pipeline: passes to run on each captured graph instead of `lorafx.passes.default`; a pipeline or its text.
        observers: called `(previous pass, graph, next pass)` before each pass and after the last.
        gradient_checkpointing: keep only the layers' inputs for backward, recompute the rest; "offload": on the host.
        activation_budget: of compiled graphs, from 0 (recompute all) to 1 (keep all); None recomputes what is cheap.
        autocast_adapter_dtype: keep adapter parameters in float32 for a base of 16 or 8 bits.
        adapter_compute_dtype: of the adapters' products, as "float32"; None for the activations' dtype.
        low_cpu_mem_usage: make the kind's tensors (not copies of biases and modules) on the meta device, to load later.
        random_state: seed of the adapter's start values; None draws from torch's global generator.

    Raises:
        ConfigError: a field that is wrong or not implemented.
        SelectionError: nothing, or something unfit, matches.
        PipelineError: passes in a wrong order, something that is no pass, or none that inserts adapters.
        CaptureError: `capture="graph"` fails on `example_inputs`.
        AdapterError: an adapted model, or a name that cannot be an adapter's. The model is as it was in each case.
    """
    chosen = _pipeline(model, pipeline, gradient_checkpointing, adapter_compute_dtype)
    adapter = _planned(model, adapter_name, config_of(config))
    dispatcher = Dispatcher(chosen, Backend(backend, mode, activation_budget), tuple(observers), capture)
    adapted = adapt(model, dispatcher, autocast_adapter_dtype, adapter.config.replicates)
    try:
        rests = of(adapted)._install(adapter, random_state=random_state, on_meta=low_cpu_mem_usage)
        of(adapted).set_adapter(adapter_name, inference_mode=adapter.config.inference_mode)
        _ready(adapted, gradient_checkpointing, example_inputs)
    except BaseException:
        of(adapted)._leave()
        raise
    of(adapted)._leave_rests(rests)
    return adapted


def load(
    model: nn.Module,
    adapter: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: AdapterConfig | Mapping[str, Any] | None = None,
    weights_only: bool = False,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    backend: str = "auto",
    mode: str | None = None,
    capture: str = "auto",
    pipeline: Passes | None = None,
    observers: Iterable[Observer] = (),
    gradient_checkpointing: bool | str = False,
    activation_budget: float | None = None,
    autocast_adapter_dtype: bool = True,
    adapter_compute_dtype: torch.dtype | str | None = None,
    **hub: Any,
) -> AdaptedModel:
    """Put a saved adapter on a model: a folder in PEFT's format, or a Hub id.

    For inference unless `is_trainable`: the adapter is frozen and the result in eval mode. `config` is used instead of
    the folder's own. `hub` is `subfolder`, and for a Hub id `revision`, `token`, `cache_dir`, `force_download` and
    `local_files_only`. `weights_only=True` also takes an old `adapter_model.bin`, read through torch's restricted
    unpickler. The other options are those of `compile`; what makes start values has no place here, for the file has
    the values. Embedding weights in the file are written into the base's, and start values that its config takes out of
    the base (PiSSA and the like) are taken out of it again.

    Raises `CheckpointError`, `ConfigError` or `SelectionError` when file and model do not fit, `ConfigError` for an
    option that there is not, and `AdapterError` or `PipelineError` as `compile` does; the model is as it was.
    """
    chosen = _pipeline(model, pipeline, gradient_checkpointing, adapter_compute_dtype)
    found = checkpoint.read(adapter, weights_only=weights_only, **hub)
    if config is not None:
        config = config_of(config)
        config = apart.meant(_plain(model, config), config, found.tensors)
        found = checkpoint.Checkpoint(found.folder, config, found.tensors)
    fitted, values, embeddings = checkpoint.fit(_plain(model, found.config), adapter_name, found, is_trainable)
    dispatcher = Dispatcher(chosen, Backend(backend, mode, activation_budget), tuple(observers), capture)
    adapted = adapt(model, dispatcher, autocast_adapter_dtype, found.config.replicates)
    try:
        rests = of(adapted)._install(fitted, values=values)
        of(adapted).set_adapter(adapter_name, inference_mode=not is_trainable)
        if not is_trainable:
            adapted.eval()
        _ready(adapted, gradient_checkpointing, example_inputs)
    except BaseException:
        of(adapted)._leave()
        raise
    of(adapted)._leave_rests(rests)
    copy_into(adapted, embeddings)
    return adapted


def _ready(
    adapted: AdaptedModel, checkpointing: bool | str, example_inputs: Mapping[str, Any] | tuple[Any, ...] | None
) -> None:
    """Switch on the model's own checkpointing, for calls by sites, and make the program of an example, if given."""
    if checkpointing and getattr(adapted, "supports_gradient_checkpointing", False):
        adapted.gradient_checkpointing_enable()  # type: ignore[operator]
    if example_inputs is None:
        return
    named = isinstance(example_inputs, Mapping)
    if not named and not isinstance(example_inputs, (tuple, list)):
        kind = type(example_inputs).__name__
        raise ConfigError(
            f"example_inputs is a {kind}; give a tuple, as (ids,), or a mapping by name: {{'input_ids': ids}}"
        )
    args, kwargs = ((), dict(example_inputs)) if named else (tuple(example_inputs), {})
    context, kwargs = acting_in(adapted, args, kwargs)
    adapted._lorafx.dispatcher.program(adapted, context, args, kwargs)


def _pipeline(
    model: nn.Module,
    pipeline: Passes | None,
    gradient_checkpointing: bool | str,
    adapter_compute_dtype: torch.dtype | str | None,
) -> Pipeline:
    chosen = passes.default if pipeline is None else Pipeline.of(pipeline)
    if gradient_checkpointing not in (False, True, "offload"):
        raise ConfigError(f'gradient_checkpointing={gradient_checkpointing!r} is none of False, True, "offload"')
    if gradient_checkpointing == "offload" and not torch.cuda.is_available():
        warn("checkpoints stay where they are: there is no CUDA device to move them from")
    if gradient_checkpointing:
        every, offload = not _checkpoints_itself(model), gradient_checkpointing == "offload"
        chosen = chosen + (passes.CheckpointBlocks(every, offload),)
    if adapter_compute_dtype is not None:
        insert = passes.InsertAdapters(str(adapter_compute_dtype).removeprefix("torch."))
        chosen = Pipeline(*(insert if each.name == insert.name else each for each in chosen))
    chosen.check()
    if "adapters" not in chosen.facts:
        raise PipelineError(
            "no pass of the pipeline establishes `adapters`, so that calls would run without any: "
            "`insert_adapters` does, and what it requires is in `lorafx.passes.default`"
        )
    return chosen


def _checkpoints_itself(model: nn.Module) -> bool:
    """Whether the model's own Python checkpoints its layers when it is told to, as transformers' models do."""
    layers = sys.modules.get("transformers.modeling_layers")
    if layers is None or not getattr(model, "supports_gradient_checkpointing", False):
        return False
    return any(isinstance(module, layers.GradientCheckpointingLayer) for module in model.modules())


def _planned(model: nn.Module, name: str, config: AdapterConfig) -> Adapter:
    plain = _plain(model, config)
    return plan(plain, name, with_experts(plain, config))


def _plain(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """What the config is planned for: the model without wrappers, with the layers that the config asks for."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the model is {model!r:.60}, a {type(model).__name__}; it has to be a torch module, loaded already"
        )
    for path, module in unwrapped(model).named_modules():
        if isinstance(module, AdaptedModel) or vars(module).get(ATTACHED):
            what = f"{path} in the model" if path else "the model"
            raise AdapterError(f"{what} is adapted already; use `add_adapter` or `load_adapter` of the adapted model")
        if isinstance(module, torch.jit.ScriptModule):
            raise AdapterError(f"{path or 'the model'} is scripted by torch.jit: adapt what it was made from")
    require_no_layers_of_peft(unwrapped(model))
    require_tensors_in_place(unwrapped(model))
    if config.replicates not in ((), layers_of_others(model)):
        return replicated(model, config.replicates)[0]
    if isinstance(model, torch.fx.GraphModule):
        return model
    return mirrored(model)

"""AdaptedModel: a mirror of the base model's modules, with adapters beside what they adapt and graphs for calls."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.fx import GraphModule

from ..adapters.adapter import TRAINED_BIAS, Adapter, build, plan, remove, trainable_paths
from ..adapters.config import AdapterConfig, require
from ..adapters.kinds import config_of
from ..adapters.site import Selection
from ..capture.caches import register_caches
from ..errors import AdapterError, CaptureError
from ..files import checkpoint
from ..graph.blocks import repeated_modules
from ..graph.modules import refresh
from ..pipeline import Context
from ..serving.dispatcher import Dispatcher
from ..torch_private.compilers import compiler_in_charge, not_traced, uncompiled
from ..tree.attached import set_trainable
from ..tree.lookup import copy_into, find_tensor
from ..tree.mirror import MIRRORED_AS, STATE, mirrored
from .merges import Merges
from .report import Call, Explanation, Report
from .saving import Saving
from .scales import Scales
from .state import State
from .trainers import Trainable, name_self, require_same, with_model


class PartCall:
    """The forward of a module that holds sites: a call of this part alone is a call of its own, with its own graph.

    `replaced` has the `forward` that was an attribute of the module itself before, if there was one.
    """

    lorafx = True

    def __init__(self, tree: AdaptedModel, path: str):
        self.tree, self.path = tree, path
        self.replaced = {k: v for k, v in vars(tree.get_submodule(path)).items() if k == "forward"}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tree._serve(self.path, args, kwargs)


# What Dynamo says where somebody wants a graph of more than the adapted model.
WITHIN_DYNAMO = (
    "a model adapted by lorafx is a graph of its own: give torch.compile that model with fullgraph=True, or the "
    "function around it with fullgraph=False; and torch.export the model with strict=False"
)
ROWS = "adapter_names"  # PEFT's keyword of a call


class LoadResult(NamedTuple):
    """What `load_adapter` returns, by PEFT's names: keys that the file lacks, and keys that no site takes."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class AdaptedModel(Trainable, Merges, Scales, Saving):
    """A base model with adapters, called exactly like the base model and an instance of its class.

    Made by `lorafx.compile` and `lorafx.load`. Parameters have the base model's names; an adapter's tensors hang below
    the module they adapt (`…q_proj.lora_A.default.weight`). The base object keeps its own structure and forward and
    shares the weights. Each kind of call is captured as a graph when it first comes, rewritten by the pipeline, and
    kept; a call that cannot be captured runs by sites (`capture` of `compile`).
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Calling the class makes a plain model of the base's class, as `sequential[:2]` does. See `compile`."""
        return getattr(cls, MIRRORED_AS)(*args, **kwargs)

    # --- calls -----------------------------------------------------------------------------------------------------

    @not_traced(WITHIN_DYNAMO)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Hooks, then `forward`. Within torch.compile the rewritten graph is compiled as that says, not lorafx."""
        return nn.Module.__call__(self, *args, **kwargs)

    @not_traced(WITHIN_DYNAMO)
    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:  # what `Module.compile` has compiled
        return nn.Module._call_impl(self, *args, **kwargs)

    @not_traced(WITHIN_DYNAMO)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._serve("", args, kwargs)

    def graph(self, *args: Any, **kwargs: Any) -> GraphModule:
        """The rewritten graph that serves this call; captured now if none is kept. The call is not run.

        Raises `CaptureError` when the call cannot be captured as a whole.
        """
        program = self._lorafx.dispatcher.program(self, self._lorafx.context, args, kwargs)
        if program.gm is None:
            raise CaptureError(f"this call is served by sites, there is no graph of the whole: {program.reason}")
        refresh(program.gm, self)
        return program.gm

    def get_compiled_call(self, compile_config: Any = None) -> Any:
        """What `generate` is to call with a static cache, which transformers would compile: this model, as it is.

        Its graphs are compiled already, as `compile` was told to. torch would compile lorafx's own Python with them.
        """
        return self.__call__

    @not_traced(WITHIN_DYNAMO)
    def _serve(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = getattr(type(self), MIRRORED_AS).forward
        if kwargs.get(ROWS) is not None and ROWS not in inspect.signature(forward).parameters:
            raise AdapterError(
                f"{ROWS}, an adapter for each row, is not implemented: run each adapter's rows by themselves"
            )
        dispatcher = self._lorafx.dispatcher_within(compiler_in_charge())
        return dispatcher.serve(self, self._lorafx.context, path, args, kwargs)

    # --- what there is -----------------------------------------------------------------------------------------------

    @property
    def sites(self) -> Selection:
        """The sites of the active adapters, as a table when printed."""
        return Context(tuple(self._lorafx.adapters[name] for name in self._lorafx.active)).selection

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, in order, each with its own parameters and adapters: what to give to FSDP2's `fully_shard`."""
        return repeated_modules(self)

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """The config of each adapter, by name."""
        return {name: adapter.config for name, adapter in self._lorafx.adapters.items()}

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
        return self

    def report(self) -> Report:
        """What each pass did to each kept graph, and what merging holds; prints as tables."""
        graphs = {
            f"graph {number} ({program.title}), captured in {program.seconds:.2f} s": program.steps
            for number, program in enumerate(p for d in self._lorafx.dispatchers for p in d if p.gm is not None)
        }
        return Report(graphs, len(self.sites), self._lorafx.ledger.sizes(self))

    def explain(self) -> Explanation:
        """What has served each kind of call (a graph, or the model by sites), why and how often; prints as a table."""
        dispatchers = list(self._lorafx.dispatchers)
        calls = [
            Call(p.title, "sites" if p.gm is None else "graph", p.hits, p.seconds, p.why, p.reason, p.loss, p.launched)
            for p in chain.from_iterable(dispatchers)
        ]
        pieces = chain.from_iterable(each.graphs.lowering.pieces.values() for each in dispatchers)
        compiled = tuple((p.title, p.compiled, "\n".join(p.reasons)) for p in pieces)
        operators, dropped = (sum(len(d.operators) for d in dispatchers), sum(d.programs.dropped for d in dispatchers))
        return Explanation(tuple(calls), operators, dropped, compiled)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of parameters (trainable, all). Of a trained bias and the base's it replaces, `all` counts one."""
        counts = [(name, p.numel(), p.requires_grad) for name, p in self.named_parameters()]
        total = sum(number for name, number, _ in counts if TRAINED_BIAS not in name.split("."))
        return sum(number for _, number, trainable in counts if trainable), total

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (getattr(type(self), MIRRORED_AS),), self.__dict__

    def __repr__(self) -> str:
        state = self._lorafx
        adapters = ", ".join(f"{n}{'*' if n in state.active else ''}" for n in state.adapters) or "none"
        return f"AdaptedModel({type(self).__name__}, {len(self.sites)} sites, adapters: {adapters})"

    # --- adapters ----------------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: AdapterConfig | Mapping[str, Any] | Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool | None = None,
        *,
        random_state: int | None = None,
    ) -> None:
        """Add a new adapter; `set_adapter` makes it active.

        The options are those of `compile`; without `autocast_adapter_dtype` it is as when this model was made.
        Raises `AdapterError` for a name that is taken, `ConfigError` or `SelectionError` for a config that is unfit.
        """
        adapter = plan(mirrored(self), adapter_name, config_of(peft_config))
        self._install(adapter, autocast_adapter_dtype, random_state=random_state, on_meta=low_cpu_mem_usage)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool | None = None,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        *,
        weights_only: bool = False,
        **hub: Any,
    ) -> LoadResult:
        """Add an adapter from a folder or Hub id; `set_adapter` makes it active. Errors are those of `lorafx.load`.

        Positions and names are PEFT's. `torch_device` and `low_cpu_mem_usage` change nothing: values go from the file
        to where the base's weights are. `ConfigError` for `ephemeral_gpu_offload`, `key_mapping` and
        `ignore_mismatched_sizes`. What is returned has no keys: a missing or unexpected one is a `CheckpointError`.

        An adapter of that name that is there already takes the file's values, in place: its parameters stay the same
        objects, as a trainer that resumes needs. Raises `AdapterError` if it differs in more than values, or is merged.
        """
        require(not ephemeral_gpu_offload, "ephemeral_gpu_offload", ephemeral_gpu_offload, "False")
        require(not key_mapping, "key_mapping", key_mapping, "None")
        require(not ignore_mismatched_sizes, "ignore_mismatched_sizes", ignore_mismatched_sizes, "False")
        found = checkpoint.read(model_id, weights_only=weights_only, **hub)
        adapter, values, embeddings = checkpoint.fit(mirrored(self), adapter_name, found, is_trainable)
        if adapter_name in self._lorafx.adapters:
            require_same(self._adapter(adapter_name), adapter, self._lorafx.ledger.names)
            copy_into(self, values)
        else:
            self._install(adapter, autocast_adapter_dtype, values=values)
        copy_into(self, embeddings)
        if not is_trainable:
            self.eval()
        return LoadResult([], [])

    def _install(self, adapter: Adapter, autocast_adapter_dtype: bool | None = None, **how: Any) -> None:
        state = self._lorafx
        if adapter.name in state.adapters:
            raise AdapterError(f"there is an adapter {adapter.name!r} already; delete it or choose another name")
        wide = state.autocast_adapter_dtype if autocast_adapter_dtype is None else autocast_adapter_dtype
        build(self, adapter, autocast_adapter_dtype=wide, **how)
        state.adapters[adapter.name] = adapter
        for path in _parts(adapter):
            part = self.get_submodule(path)
            if not isinstance(vars(part).get("forward"), PartCall):
                part.__dict__["forward"] = PartCall(self, path)
        self._set_trainable()

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make these adapters, and no others, active and (unless in inference mode) trainable.

        The first acts innermost. A merged model is unmerged first, with a warning. Raises `AdapterError` for an unknown
        name, for adapters that both replace one tensor (a bias, a saved module), and for weights.
        """
        if isinstance(adapter_name, Mapping):
            raise AdapterError("adapters have no weights here: activate them by name, and give each its `set_scale`")
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(dict.fromkeys(adapter_name))
        adapters = [self._adapter(name) for name in names]
        replaced = [base for adapter in adapters for base in adapter.replaced]
        twice = next((base for base in replaced if replaced.count(base) > 1), None)
        if twice:
            raise AdapterError(f"{' and '.join(names)} cannot be active together: each has its own {twice}")
        if self._lorafx.ledger.names:
            warnings.warn("the model was merged; it is unmerged before the active adapters change")
            self.unmerge_adapter()
        self._lorafx.active = names
        self._set_trainable()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its tensors. If none is active then, the first that is left becomes active.

        Raises `AdapterError` for an unknown name, or while the adapter is merged.
        """
        adapter, state = self._adapter(adapter_name), self._lorafx
        if adapter_name in state.ledger.names:
            raise AdapterError(f"{adapter_name!r} is merged; unmerge it before deleting it")
        remove(self, adapter)
        del state.adapters[adapter_name]
        state.forget_programs()
        if adapter_name in state.active:
            rest = tuple(name for name in state.active if name != adapter_name)
            state.active = rest or tuple(state.adapters)[:1]
        self._set_trainable()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run as the base model within a `with` block: no adapter acts, and merged ones are unmerged meanwhile."""
        state = self._lorafx
        active, merged = state.active, state.ledger.names
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.unmerge_adapter()
        state.active = ()
        self._set_trainable()
        try:
            yield
        finally:
            state.active = active
            if merged:
                self._merge([self._adapter(name) for name in merged])
            for parameter in trained:
                parameter.requires_grad_(True)

    def _adapter(self, name: str) -> Adapter:
        if name not in self._lorafx.adapters:
            raise AdapterError(f"there is no adapter {name!r}; there are {list(self._lorafx.adapters)}")
        return self._lorafx.adapters[name]

    def _set_trainable(self) -> None:
        """Let the active adapters train, and no others. What the user trains of the base besides stays as it is."""
        state = self._lorafx
        owned = [path for adapter in state.adapters.values() for path in adapter.paths]
        set_trainable(self, owned, trainable_paths(self, [state.adapters[name] for name in state.active]))

    def _leave(self) -> nn.Module:
        """Drop the adapters and give the base its `requires_grad` flags back."""
        state = self._lorafx
        for adapter in state.adapters.values():
            remove(self, adapter)
        state.adapters, state.active = {}, ()
        state.forget_programs()
        for path, flag in state.base_requires_grad.items():
            parameter = find_tensor(state.base, path)
            if parameter is not None and parameter.is_floating_point():
                parameter.requires_grad_(flag)
        return state.base


def _parts(adapter: Adapter) -> Iterator[str]:
    """Paths of the modules that contain an adapter's sites or own copies, at any depth; the root is not among them."""
    owners = [site.module for site in adapter.selection] + [base.rpartition(".")[0] for base in adapter.replaced]
    paths = {".".join(owner.split(".")[:depth]) for owner in owners for depth in range(1, owner.count(".") + 2)}
    yield from sorted(path for path in paths if path)


def adapt(base: nn.Module, dispatcher: Dispatcher, autocast_adapter_dtype: bool) -> AdaptedModel:
    """An AdaptedModel over `base` with no adapter yet."""
    register_caches(base)
    tree = mirrored(base)
    tree.__class__ = _class_for(type(tree))  # type: ignore[arg-type]
    flags = {path: parameter.requires_grad for path, parameter in base.named_parameters(remove_duplicate=False)}
    tree.__dict__[STATE] = State(base, dispatcher, autocast_adapter_dtype, flags)
    tree.requires_grad_(False)
    if "forward" in vars(tree):  # a library has replaced the forward of the model object itself
        tree.__dict__["forward"] = PartCall(tree, "")  # type: ignore[arg-type]
    name_self(tree)
    return tree  # type: ignore[return-value]


def _empty(base: type[nn.Module]) -> AdaptedModel:
    """An AdaptedModel without attributes, for copy and pickle to fill."""
    return object.__new__(_class_for(base))  # type: ignore[arg-type]


@functools.cache
def _class_for(base: type[nn.Module]) -> type[AdaptedModel]:
    """AdaptedModel as a subclass of a model's class, under the same name: libraries look models up by it."""

    @not_traced(WITHIN_DYNAMO)
    @functools.wraps(uncompiled(base.forward))
    def forward(self: AdaptedModel, *args: Any, **kwargs: Any) -> Any:
        return self._serve("", args, kwargs)

    names = {"forward": forward, "__module__": base.__module__, MIRRORED_AS: base}
    if isinstance(getattr(base, "base_model", None), property):
        names["base_model"] = with_model(base.base_model)  # type: ignore[attr-defined]
    return type(base.__name__, (AdaptedModel, base), names)

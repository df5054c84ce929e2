"""Listens to what each repeated layer asks of torch while a model is exported, and has it replayed or traced."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from ...graph.blocks import repeated_modules
from ...graph.description import operand_key
from ...ops.modes import modes
from ...torch_private.tensors import DisableTorchFunction
from ...torch_private.tracing import detect_fake_mode, get_proxy_mode, known_equal, maybe_enable_thunkify
from ..outside_use import unwatched
from .hidden_parameters import HiddenParameters
from .record import Record, Step, rename_sizes
from .recorder import Recorder
from .replayer import Replayer


class RepeatedLayers:
    """The repeated layers of the module at `part` of a mirror, which is about to be exported."""

    def __init__(self, root: nn.Module, part: str):
        self.root, self.start, self.running = root, Step(), False
        self.known_equal: Any = {}  # symbols that torch had found to be equal when questions were last named by them
        self.modes: Hashable = None
        self.numbers = itertools.count()  # one for each new kind of layer
        self.kept: list[Any] = []  # objects that questions name by id: kept alive, so that no other object gets the id
        paths = {module: path for path, module in root.named_modules()}
        layers = repeated_modules(root.get_submodule(part))
        self.hidden = HiddenParameters(root, layers)
        for layer in layers:
            layer.__dict__["forward"] = functools.wraps(layer.forward)(
                functools.partial(self._call, layer, paths[layer], layer.forward)
            )

    def shown(self) -> HiddenParameters:
        """The context in which the model is called, which finds its parameters in it."""
        self.modes = modes()
        return self.hidden

    def _call(self, layer: nn.Module, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mode = get_proxy_mode()
        if mode is None or self.running or modes() != self.modes:  # regions of other modes are graphs of their own
            return forward(*args, **kwargs)
        self.running = True
        fake_mode = detect_fake_mode()
        if fake_mode and fake_mode.shape_env and known_equal(fake_mode) != self.known_equal:
            self.known_equal = dict(known_equal(fake_mode))
            rename_sizes(self.start, fake_mode.shape_env.replace)
        try:
            listener = _Listener(self, layer, path, mode.tracer, fake_mode)
            with listener, maybe_enable_thunkify():
                output = forward(*args, **kwargs)
            listener.finish()
            return output
        finally:
            self.running = False

    @functools.cached_property
    def places(self) -> Counter[int]:
        """At how many places of the model each of its tensors is, by id: stand-ins, once the model is called."""
        named = self.root.named_parameters(remove_duplicate=False), self.root.named_buffers(remove_duplicate=False)
        return Counter(id(tensor) for _, tensor in itertools.chain(*named))


class _Listener(TorchFunctionMode):
    """Stands between one layer and torch. Layers are replayed for as long as they are like one before."""

    def __init__(self, layers: RepeatedLayers, layer: nn.Module, path: str, tracer: Any, fake_mode: Any):
        super().__init__()
        self.layers, self.parameters, self.tracer = layers, list(layer.parameters()), tracer
        first = not layers.start.then
        if first:
            layers.hidden.trace(self.parameters, tracer)
        self.record = Record(layer, path, layers.start, layers.places, tracer)
        self.recorder = Recorder(self.record, layers.root)
        self.replayer = None if first else Replayer(self.record, fake_mode)

    @unwatched
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.record.repeatable:
            return func(*args, **kwargs)
        with DisableTorchFunction():
            question = operand_key((func, args, kwargs), self.record.name, self.layers.kept)
            if self.replayer:
                self.replayer.require_nothing_traced()
                if self.replayer.knows(question):
                    return self.replayer.answer(question, func, args, kwargs)
        self._leave_replayer()
        return self.recorder.ask(question, func, args, kwargs)

    def finish(self) -> None:
        """The layer has returned."""
        if self.replayer and self.replayer.finish():
            return
        self._leave_replayer()
        self.recorder.finish(self.layers.numbers)

    def _leave_replayer(self) -> None:
        """From here on the layer is traced."""
        if self.replayer:
            replayer, self.replayer = self.replayer, None
            self.layers.hidden.trace(self.parameters, self.tracer)
            replayer.trace()

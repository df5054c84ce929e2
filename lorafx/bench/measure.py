"""Measure one contestant in one case: a step to repeat, its time, its memory, its outputs and gradients."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .cases import Case
from .contestants import Apart, Setup, adapter_tensors
from .models import Batch, outputs


@dataclass(frozen=True)
class Outcome:
    """What the first step gives: outputs (a loss, or tensors) and the adapter's gradients by name."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]


class Training:
    """A training step: forward, backward, fused AdamW. Without adapters only the input's gradient is computed."""

    def __init__(self, case: Case, setup: Setup, batch: Batch):
        self.case, self.setup, self.model, self.batch = case, setup, setup.model, batch
        self.adapters = adapter_tensors(setup.model)
        self.optimizer = torch.optim.AdamW(self.adapters.values(), lr=1e-6, fused=True) if self.adapters else None

    def forward(self) -> tuple[Tensor, ...]:
        arguments = self.batch.arguments
        if not self.adapters and "input_ids" in arguments:  # token ids have no gradient, their embeddings do
            ids = arguments["input_ids"]
            embedded = self.model.get_input_embeddings()(ids).requires_grad_()  # type: ignore[operator]
            arguments = {"inputs_embeds": embedded, "labels": arguments["labels"]}
        return outputs(self.model(**arguments, **self.setup.arguments))

    def clear(self) -> None:
        for tensor in (*self.adapters.values(), *self.batch.arguments.values()):
            tensor.grad = None

    def step(self) -> None:
        with self.setup.each():
            torch.autograd.backward(self.forward(), self.batch.gradients)
        if self.optimizer:
            self.optimizer.step()
        self.clear()

    def outcome(self) -> Outcome:
        """Outputs and gradients, without dropout, for which each library draws other random numbers."""
        self.model.train(not self.case.dropout)
        with self.setup.each():
            found = self.forward()
            torch.autograd.backward(found, self.batch.gradients)
        gradients = {name: tensor.grad for name, tensor in self.adapters.items() if tensor.grad is not None}
        self.clear()
        self.model.train()
        return Outcome(tuple(each.detach() for each in found), gradients)

    def held(self) -> int:
        state = self.optimizer.state.values() if self.optimizer else ()
        tensors = [value for each in state for value in each.values() if isinstance(value, Tensor)]
        return _bytes([*self.model.parameters(), *self.model.buffers(), *tensors])


class Forward(Training):
    """A forward pass in evaluation, without gradients."""

    @torch.no_grad()
    def outcome(self) -> Outcome:
        self.model.eval()
        return Outcome(self.forward(), {})

    def step(self) -> None:
        self.outcome()


class OneByOne(Training):
    """Training steps of models that each have their share of the batch, one after the other."""

    def __init__(self, case: Case, setup: Setup, batch: Batch):
        super().__init__(case, setup, batch)
        models = list(setup.model.models)  # type: ignore[arg-type]
        shares = zip(*(value.chunk(len(models)) for value in batch.arguments.values()))
        each = (Batch(dict(zip(batch.arguments, share)), batch.gradients) for share in shares)
        self.parts = [Training(case, Setup(model), share) for model, share in zip(models, each)]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def held(self) -> int:
        return super().held() + sum(part.held() - _bytes([*part.model.parameters()]) for part in self.parts)


class Decoding:
    """Decode tokens one by one after a prefix. Which tokens is fixed, not sampled, so that all run the same."""

    def __init__(self, case: Case, setup: Setup, batch: Batch):
        self.case, self.model, self.batch = case, setup.model.eval(), batch
        self.cache = self._cache()
        for layer, (keys, values) in enumerate(batch.past):
            self.cache.update(keys.clone(), values.clone(), layer)

    def _cache(self) -> Any:
        if not self.case.static_cache:
            return transformers.DynamicCache()
        length = self.case.sequence + self.case.decode
        return transformers.StaticCache(config=self.model.config, max_cache_len=length)  # type: ignore[arg-type]

    def _token(self, at: int) -> Tensor:
        ids = self.batch.arguments["input_ids"][:, at : at + 1].contiguous()
        positions = torch.arange(at, at + 1, device=ids.device)[None]
        found = self.model(input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True)
        return found.logits.clone()  # a CUDA graph writes the next token's to the same place

    @torch.no_grad()
    def step(self) -> Tensor:
        start = self.case.sequence
        found = [self._token(at) for at in range(start, start + self.case.decode)]
        self._forget()
        return torch.cat(found, 1)

    def _forget(self) -> None:
        """Shorten the cache to the prefix. A static one cannot be cropped: its counters go back, to overwrite."""
        if not self.case.static_cache:
            self.cache.crop(-self.case.decode)
        for layer in self.cache.layers if self.case.static_cache else ():
            layer.cumulative_length.sub_(self.case.decode)

    def outcome(self) -> Outcome:
        return Outcome((self.step(),), {})

    def clear(self) -> None:
        pass

    def held(self) -> int:
        return _bytes([*self.model.parameters(), *self.model.buffers()])


Runner = Training | Decoding


def runner(case: Case, setup: Setup, batch: Batch) -> Runner:
    if isinstance(setup.model, Apart) and not case.forward:
        return OneByOne(case, setup, batch)
    return (Decoding if case.decode else Forward if case.forward else Training)(case, setup, batch)


def _bytes(tensors: list[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def seconds(step: Callable[[], object], cuda: bool) -> float:
    """How long one step takes, on CUDA by the device's clock."""
    if not cuda:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the rest of this process, as torch's allocator on CUDA does.

    Left alone, it may give the end of its heap back to the system and take it again within one step, or not, depending
    on what happens to lie there. The page faults took up to a seventh of a step, of one contestant or another.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # where the C library has no such function
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, -1)
        libc.mallopt(_MMAP_MAX, 0)


def peak(step: Callable[[], object], cuda: bool) -> int:
    """The most bytes that torch's allocator holds during one step, above what it held before; it is repeatable."""
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def pools(cuda: bool) -> int:
    """The bytes that CUDA graphs keep to themselves: no peak counts them, for graphs allocate nothing as they run."""
    segments = torch.cuda.memory_snapshot() if cuda else []
    return sum(each["total_size"] for each in segments if tuple(each.get("segment_pool_id", (0, 0))) != (0, 0))


def difference(found: Tensor, expected: Tensor) -> float:
    """The relative difference |found - expected| / |expected|, in the 2-norm over the whole tensor."""
    found, expected = found.double(), expected.double().to(found.device)
    return float((found - expected).norm() / expected.norm())


def differences(found: Outcome, expected: Outcome) -> tuple[float, float | None]:
    """The largest relative difference among the outputs, and among the gradients of the adapter's tensors."""
    if set(found.gradients) != set(expected.gradients):
        raise AssertionError(f"gradients differ in names: {sorted(set(found.gradients) ^ set(expected.gradients))[:3]}")
    off = [difference(found.gradients[name], expected.gradients[name]) for name in expected.gradients]
    return max(map(difference, found.outputs, expected.outputs)), max(off, default=None)

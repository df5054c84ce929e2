"""The recorder fills a layer's record while the layer is traced, and decides whether others can be like it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Node

from ...graph import writes
from ...graph.effects import source_of, written
from ...graph.regions import is_size
from ...torch_private.tensors import DisableTorchFunction
from ...torch_private.tracing import FakeTensor, meta_like, node_of, set_slot
from .answers import Known, New, depends_on_data, mapped
from .marks import layer_like
from .record import Kind, Record, Step, last_node


class Recorder:
    """Traces what a layer asks, and remembers question and answer behind those that the record has."""

    def __init__(self, record: Record, root: nn.Module):
        self.record, self.tracer, self.root = record, record.tracer, root
        # Where this layer's questions part from all others': joined to the tree if others can be like this layer.
        self.branch: tuple[Step, Hashable, Step] | None = None

    def ask(self, question: Hashable, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """torch's answer."""
        answer = func(*args, **kwargs)
        if self.record.repeatable:
            with DisableTorchFunction():
                self._remember(question, answer)
        return answer

    def _remember(self, question: Hashable, answer: Any) -> None:
        record = self.record
        step = Step(mapped(self._without_memory, Tensor, answer), last_node(self.tracer).stack_trace or "")
        record.repeatable &= not depends_on_data(answer)
        if self.branch is None:
            self.branch = record.at, question, step
        else:
            record.at.then[question] = step
        record.at = step

    def _without_memory(self, tensor: Tensor) -> Known | New:
        """What stands for a tensor in an answer that is remembered."""
        record, node = self.record, node_of(tensor, self.tracer)
        if record.known_name(tensor) is not None or record.is_own(tensor):
            name = record.name(tensor)
            record.set_node(name, node)
            return Known(name)
        record.repeatable &= node is not None and type(tensor) is FakeTensor
        record.add_made(tensor, node)
        return New(meta_like(tensor), tensor.device, tensor.requires_grad)

    def finish(self, numbers: Iterator[int]) -> None:
        """The layer is done: if others can be like it, it is the first of a kind and gets a mark in the graph."""
        record, nodes = self.record, tuple(self._traced())
        if not record.repeatable or record.at.kind is not None or not self._stands_alone(nodes):
            return
        if self.branch is not None:
            step, question, following = self.branch
            step.then[question] = following
        kind = record.at.kind = Kind(next(numbers), record.nodes)  # type: ignore[arg-type]
        inputs = tuple([slot.proxy for slot in record.inputs])
        outputs, inside = (tuple(map(self.tracer.proxy, every)) for every in (record.nodes, nodes))
        arguments = record.path, kind.number, inputs, outputs, inside
        self.tracer.create_proxy("call_function", layer_like, arguments, {})
        for tensor, slot in record.given:  # a cast that changes nothing gave the same tensor another node
            set_slot(tensor, self.tracer, slot)

    def _traced(self) -> Iterator[Node]:
        """The nodes of the layer, without those that only compute sizes of what was there before."""
        node, inside = self.record.before.next, set[Node]()
        while node.op != "root":
            if not is_size(node) or not inside.isdisjoint(node.all_input_nodes):
                inside.add(node)
                yield node
            node = node.next

    def _stands_alone(self, nodes: tuple[Node, ...]) -> bool:
        """Whether the layer's nodes depend on its tensors, its inputs and sizes alone, and may write where they do."""
        inside, record = set(nodes), self.record
        given = {slot.proxy.node: tensor for tensor, slot in record.given if slot is not None}
        return (
            len(nodes) > 2
            and len(given) == len(record.given)
            and inside.issuperset(record.nodes)  # type: ignore[arg-type]
            and all(map(_may_be_in_block, nodes))
            and all(self._may_write(node, inside, given) for node in nodes if writes(node, self.root))
            and all(n in inside or n in given or is_size(n) for node in nodes for n in node.all_input_nodes)
        )

    def _may_write(self, node: Node, inside: set[Node], given: Mapping[Node, Tensor]) -> bool:
        """Whether a node writes to what the layer has made, or puts numbers into its inputs, as into a static cache.

        An input must come out as it went in, but for the numbers: so it may have no history of gradients, and it keeps
        its sizes.
        """
        sources = [source_of(value, given) for value in written(node, self.root)]
        outside = [source for source in sources if source in given or source not in inside]
        tensors = [given.get(source) for source in outside]
        filled = all(t is not None and not self.record.is_own(t) and not t.requires_grad for t in tensors)
        return bool(sources) and filled and not (outside and torch.Tag.inplace_view in getattr(node.target, "tags", ()))


def _may_be_in_block(node: Node) -> bool:
    return (
        node.op == "get_attr" or isinstance(node.target, OpOverload) or is_size(node) or node.target is operator.getitem
    )

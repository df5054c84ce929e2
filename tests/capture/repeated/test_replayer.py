"""replayer: a layer like an earlier one is one node; one that departs is traced as if it had never been answered."""

import pytest
import torch
from traced import traced

from lorafx.capture.repeated.marks import Mark, layer_like
from lorafx.capture.repeated.record import Interrupted, last_node
from lorafx.torch_private.tracing import FakeTensor, node_of

FUNCTIONS = torch.relu, torch.neg, torch.exp


def test_a_layer_that_asks_the_same_gives_what_is_still_held_by_one_node():
    def check(context, x):
        x = context.run_first(x, *FUNCTIONS).output
        replayer, before = context.replayer(), last_node(context.tracer)
        output = context.replay(replayer, x, *FUNCTIONS)
        assert type(output) is FakeTensor and output.shape == x.shape and output is not x
        assert last_node(context.tracer) is before and node_of(output, context.tracer) is None
        assert replayer.finish() and node_of(output, context.tracer) is not None
        held.append(output)

    held = []
    gm = traced(check)
    first, second = (Mark(node) for node in gm.graph.nodes if node.target is layer_like)
    assert (second.path, second.kind, second.results) == ("second", 0, (2,)) and second.inputs == (first.nodes[2],)
    assert [str(node.meta["val"].shape) for node in second.node.users] == ["torch.Size([2, 3])"]


def test_a_layer_that_departs_is_traced_in_order_and_its_tensors_are_the_traced_ones():
    def check(context, x):
        context.run_first(x, *FUNCTIONS)
        replayer, before = context.replayer(), last_node(context.tracer)
        output = context.replay(replayer, x, torch.relu, torch.neg)
        assert not replayer.knows((torch.cos, replayer.record.name(output)))
        replayer.trace()
        assert [node.target for node in nodes_after(before)] == [
            torch.ops.aten.relu.default,
            torch.ops.aten.neg.default,
        ]
        assert node_of(output, context.tracer) is last_node(context.tracer) is replayer.record.nodes[1]

    traced(check)


def nodes_after(node):
    while (node := node.next).op != "root":
        yield node


def test_a_layer_that_ends_early_is_not_like_the_longer_one():
    def check(context, x):
        context.run_first(x, *FUNCTIONS)
        replayer = context.replayer()
        context.replay(replayer, x, torch.relu)
        assert not replayer.finish()

    assert len([n for n in traced(check).graph.nodes if n.target is layer_like]) == 1


def test_nodes_that_somebody_else_writes_meanwhile_interrupt_it():
    def check(context, x):
        context.run_first(x, *FUNCTIONS)
        replayer = context.replayer()
        x * 2
        with pytest.raises(Interrupted):
            replayer.require_nothing_traced()
        with pytest.raises(Interrupted):
            replayer.finish()

    traced(check)


def test_a_tensor_that_nobody_holds_any_more_interrupts_it():
    def check(context, x):
        first = context.recorder()
        first.record.name(x)
        kept = first.ask("make", torch.relu, (x,), {})
        first.ask("other", torch.exp, (x,), {})
        first.ask("again", torch.Tensor.neg_, (kept,), {})
        first.finish(context.numbers)
        replayer = context.replayer()
        replayer.answer("make", torch.relu, (x,), {})
        replayer.calls.clear()  # nobody else has what was made
        replayer.answer("other", torch.exp, (x,), {})
        with pytest.raises(Interrupted):
            replayer.answer("again", torch.Tensor.neg_, (x,), {})

    traced(check)


def test_gradients_reach_what_is_traced_after_a_departure():
    def check(context, x):
        x = x * 1
        context.run_first(x, *FUNCTIONS)
        replayer = context.replayer()
        output = context.replay(replayer, x, torch.relu)
        assert output.requires_grad and output.is_leaf
        replayer.trace()
        assert output.requires_grad and not output.is_leaf
        output.neg_()  # what a leaf would not allow

    traced(check, torch.ones(2, 3, requires_grad=True))

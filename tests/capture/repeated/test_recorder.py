"""recorder: what a layer asks is traced and remembered, and a layer that stands alone is the first of a kind."""

import pytest
import torch
from traced import traced

from lorafx.capture.repeated.answers import Known, New
from lorafx.capture.repeated.marks import Mark, layer_like


def marks(gm):
    return [Mark(node) for node in gm.graph.nodes if node.target is layer_like]


def test_questions_and_answers_are_joined_to_the_tree_and_the_layer_is_marked():
    def check(context, x):
        context.run_first(x, torch.relu, torch.neg, torch.exp)
        (first,) = context.start.then.values()
        (second,) = first.then.values()
        assert type(first.answer) is New and first.answer.like.shape == (2, 3) and first.answer.like.is_meta
        assert first.kind is second.kind is None
        (third,) = second.then.values()
        assert third.kind.number == 0 and [node.target for node in third.kind.nodes] == expected

    expected = [getattr(torch.ops.aten, name).default for name in ("relu", "neg", "exp")]
    (mark,) = marks(traced(check))
    assert (mark.path, mark.kind) == ("first", 0) and [node.op for node in mark.inputs] == ["placeholder"]
    assert [node.target for node in mark.nodes] == expected and mark.results == mark.nodes


def test_what_is_written_to_in_place_is_known_by_its_name_and_has_its_last_node():
    def check(context, x):
        layer = context.run_first(x, torch.relu, torch.Tensor.neg_, torch.exp)
        answers, step = [], context.start
        while step.then:
            (step,) = step.then.values()
            answers.append(step.answer)
        assert answers[1] == Known(("made", 0)) and type(answers[2]) is New
        assert layer.recorder.record.nodes[0].target is torch.ops.aten.neg_.default

    traced(check)


def test_a_layer_may_put_numbers_into_its_input():
    def check(context, x):
        layer = context.run_first(x * 1, torch.Tensor.neg_, torch.relu, torch.exp)
        assert layer.recorder.record.at.kind is not None

    (mark,) = marks(traced(check))
    assert [node.target for node in mark.inputs] == [torch.ops.aten.mul.Tensor]


@pytest.mark.parametrize("write", [torch.Tensor.t_, torch.Tensor.detach_])
def test_a_layer_that_makes_something_else_of_its_input_is_no_kind(write):
    def check(context, x):
        layer = context.run_first(x * 1, write, torch.relu, torch.exp)
        assert context.start.then == {} and layer.recorder.record.at.kind is None

    assert marks(traced(check)) == []


def test_a_layer_that_writes_to_what_has_gradients_is_no_kind():
    def check(context, x):
        layer = context.run_first(x * 1, torch.Tensor.neg_, torch.relu, torch.exp)
        assert layer.recorder.record.at.kind is None

    assert marks(traced(check, torch.ones(2, 3, requires_grad=True))) == []


def test_a_layer_that_uses_a_node_of_others_is_no_kind():
    def check(context, x):
        other = x * 2
        layer = context.run_first(x, torch.relu, lambda y: y + other, torch.exp)
        assert layer.recorder.record.at.kind is None

    assert marks(traced(check)) == []


def test_a_layer_whose_sizes_data_decides_is_no_kind():
    def check(context, x):
        recorder = context.recorder()
        recorder.ask("question", torch.nonzero, (x,), {})
        assert not recorder.record.repeatable
        recorder.finish(context.numbers)

    assert marks(traced(check)) == []

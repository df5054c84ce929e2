"""record: tensors are named by the part they play in a layer, and their nodes and slots are kept."""

import gc
from collections import Counter

import sympy
import torch
from torch import nn
from traced import traced

from lorafx.capture.repeated.answers import Known
from lorafx.capture.repeated.record import Record, Step, rename_sizes


def test_inputs_are_numbered_and_named_once():
    def check(context, x):
        record, y = context.record(), x * 2
        names = [record.name(tensor) for tensor in (x, y, x)]
        assert [name[:2] for name in names] == [("input", 1), ("input", 2), ("input", 1)] and names[0] is names[2]
        assert [tensor for tensor, _ in record.given] == [x, y] and None not in record.inputs and record.repeatable
        assert record.known_name(x) == names[0] and record.known_name(x + 1) is None

    traced(check)


def test_equal_names_are_of_equal_shapes_and_dtypes():
    def check(context, x):
        def name(tensor):
            return context.record().name(tensor)

        assert name(x) == name(x * 2) != name(x[:1])
        assert name(x) != name(x.double()) and name(x) != name(x.t().contiguous().t())

    traced(check)


def test_a_layers_own_tensors_are_named_by_their_path_unless_others_have_them_too():
    def check(context, x):
        layer = nn.Module()
        layer.register_buffer("table", x)
        names = [Record(layer, "layer", Step(), Counter({id(x): n}), context.tracer).name(x)[:2] for n in (1, 2)]
        assert names == [("own", "table"), ("input", 1)]

    traced(check)


def test_what_has_no_node_or_is_a_parameter_cannot_be_another_layers_input():
    def check(context, x):
        record = context.record()
        record.name(nn.Parameter(torch.ones(2)))
        assert not record.repeatable

    traced(check)


def test_what_was_made_is_found_as_long_as_somebody_holds_it():
    def check(context, x):
        record, made = context.record(), x * 2
        record.add_made(made, None)
        assert record.name(made) == ("made", 0) and record.find(("made", 0)) is made and record.given == []
        record.set_node(("made", 0), "node")
        record.set_node(("input", 0, None), "other")
        assert record.nodes == ["node"]
        del made
        gc.collect()
        assert record.find(("made", 0)) is None

    traced(check)


def test_sizes_are_renamed_in_questions_and_answers_at_any_depth():
    old, new = sympy.symbols("old new")
    names = [("input", 1, (size, 4)) for size in (old, new)]
    last = Step()
    start = Step(then={("ask", names[0]): Step(Known(names[0]), then={("again", (names[0],)): last})})
    rename_sizes(start, lambda size: size.xreplace({old: new}))
    ((question, step),) = start.then.items()
    assert question == ("ask", names[1]) and step.answer == Known(names[1])
    assert step.then == {("again", (names[1],)): last}


def test_questions_that_turn_out_to_be_one_go_by_the_first():
    old, new = sympy.symbols("old new")
    first, second = Step(line="first"), Step(line="second")
    start = Step(then={("ask", old): first, ("ask", new): second})
    rename_sizes(start, lambda size: size.xreplace({old: new}))
    assert start.then == {("ask", new): first}

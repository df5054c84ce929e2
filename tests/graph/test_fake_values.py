"""Values of nodes on fake tensors: each question is asked once, unless its answer may be another the next time."""

import pytest
import torch
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import custom_op

from lorafx.graph import fake_value
from lorafx.graph.values import each_asked_once
from lorafx.torch_private.tracing import FakeTensorMode

aten = torch.ops.aten


@custom_op("lorafx_tests::asked", mutates_args=())
def asked(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x.new_zeros(rows, x.shape[1])


@pytest.fixture
def calls():
    """What the operator's shapes were asked for, in order."""
    made = []

    @asked.register_fake
    def _(x, rows):
        made.append((tuple(x.shape), x.dtype, rows))
        return x.new_empty(rows, x.shape[1])

    return made


@pytest.fixture
def mode():
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def graph_of(mode, *inputs):
    graph = Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    for node, value in zip(nodes, inputs):
        node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    graph.output(tuple(nodes))
    return GraphModule(torch.nn.Module(), graph), nodes


def values(mode, gm, target, *calls):
    with each_asked_once():
        return [fake_value(gm.graph.call_function(target, args), gm, mode) for args in calls]


def test_what_torch_does_not_tell_apart_is_asked_once(mode, calls):
    gm, (x, same, wider, double) = graph_of(
        mode, torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3, dtype=torch.float64)
    )
    operator = torch.ops.lorafx_tests.asked.default
    found = values(mode, gm, operator, (x, 5), (same, 5), (x, 6), (wider, 5), (double, 5), (x, 5))
    assert [tuple(value.shape) for value in found] == [(5, 3), (5, 3), (6, 3), (5, 4), (5, 3), (5, 3)]
    assert [value.dtype for value in found] == [torch.float32] * 4 + [torch.float64, torch.float32]
    assert len(calls) == 4 and len(set(calls)) == 4


def test_each_mode_and_each_run_is_asked(calls):
    graphs = [(mode, *graph_of(mode, torch.ones(2, 3))) for mode in (FakeTensorMode(), FakeTensorMode())]
    for _ in range(2):
        with each_asked_once():
            for mode, gm, (x,) in graphs:
                fake_value(gm.graph.call_function(torch.ops.lorafx_tests.asked.default, (x, 5)), gm, mode)
    assert len(calls) == 4


def test_sizes_that_only_data_say_are_new_each_time(mode):
    gm, (x, same) = graph_of(mode, torch.ones(2, 3), torch.ones(2, 3))
    first, second = values(mode, gm, aten.nonzero.default, (x,), (same,))
    assert first.shape[0].node.expr != second.shape[0].node.expr


def test_what_is_written_to_is_what_comes_back(mode):
    gm, (x, same) = graph_of(mode, torch.ones(2, 3), torch.ones(2, 3))
    first, second = values(mode, gm, aten.mul_.Tensor, (x, 2.0), (same, 2.0))
    assert first is x.meta["val"] and second is same.meta["val"]

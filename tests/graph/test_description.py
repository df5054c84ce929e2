"""Descriptions: for each of them, which values are told apart and which are not."""

import functools
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lorafx.graph.description import (
    argument_key,
    attribute_key,
    held_key,
    interface_key,
    node_value_key,
    operand_key,
    parameter_key,
    traced_tensor_key,
)
from lorafx.tree.holdings import LARGE


class Thing:
    """An object without equality of its own."""


@pytest.fixture
def fake():
    """Makes fake tensors of symbolic sizes."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def make(*shape, **options):
        dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(shape))
        return mode.from_tensor(torch.empty(shape, **options), symbolic_context=dynamic)

    return make


# --- attributes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, other",
    [
        (1, True),
        (1, 1.0),
        ([1], (1,)),
        ([1, [2, [3, [4]]]], [1, [2, [3, [5]]]]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": 1}, OrderedDict(a=1)),
        ({1}, {2}),
        (0.0, -0.0),
        (functools.partial(sum, [1]), functools.partial(sum, [2])),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (Thing(), Thing()),
        ([0] * (LARGE + 1), [0] * (LARGE + 1)),
    ],
)
def test_attributes_that_a_graph_would_see_are_told_apart(value, other):
    kept = []
    assert attribute_key(value, kept) == attribute_key(value, kept) != attribute_key(other, kept)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [1, {"a": (2.5, "b")}],
        lambda: {1, 2},
        lambda: torch.randn(2),
        set,
        dict,
        lambda: functools.partial(sum, [1], start=2),
        lambda: [nn.Linear(1, 1).register_forward_hook(print)],
    ],
)
def test_equal_attributes_are_described_equally(make):
    assert attribute_key(make(), []) == attribute_key(make(), [])
    hash(attribute_key(make(), []))


def test_weak_references_among_attributes_are_all_alike():
    things = Thing(), Thing()
    assert attribute_key(weakref.ref(things[0]), []) == attribute_key(weakref.ref(things[1]), [])


def test_a_tensor_that_is_held_counts_by_identity_and_is_kept():
    tensor, kept = torch.zeros(2), []
    assert attribute_key(tensor, kept) == attribute_key(torch.zeros(2), kept) and not kept
    assert held_key(tensor, kept) == held_key(tensor, kept) != held_key(torch.zeros(2), kept)
    assert attribute_key([tensor], kept) == attribute_key([tensor], kept) != attribute_key([torch.zeros(2)], kept)
    assert any(value is tensor for value in kept)


def test_circles_and_depth_are_no_matter_to_a_key():
    def rings(number):
        thing = Thing()
        thing.again, thing.inside = thing, [number]
        for _ in range(3000):
            thing.inside = [thing.inside]
        return [thing.inside]

    assert attribute_key(rings(1), []) == attribute_key(rings(1), []) != attribute_key(rings(2), [])


def test_what_is_described_apart_is_not_looked_into():
    thing = Thing()
    before = held_key([thing], [], apart={id(thing)})
    thing.more = 1
    assert held_key([thing], [], apart={id(thing)}) == before != held_key([thing], [])


# --- arguments and parameters ----------------------------------------------------------------------------------------


def test_sizes_of_arguments_are_told_apart_where_they_are_0_or_1():
    of = {size: argument_key(torch.zeros(size, 3)) for size in (0, 1, 2, 7)}
    assert of[2] == of[7] and len({of[0], of[1], of[2]}) == 3
    image = [argument_key(torch.zeros(2, 3, width, width), (width, width)) for width in (8, 8, 9)]
    assert image[0] == image[1] != image[2]


def test_arguments_are_told_apart_by_what_a_graph_is_specialised_on():
    tensor = torch.zeros(2, 3)
    others = [tensor.double(), tensor.to("meta"), torch.zeros(2, 3, requires_grad=True), nn.Parameter(tensor), 1, None]
    keys = [argument_key(value) for value in (tensor, *others)]
    assert len(set(keys)) == len(keys)
    assert argument_key(1) != argument_key(True) and argument_key(1) == (int, 1)
    assert argument_key(bytearray(b"a")) == argument_key(bytearray(b"a")) != argument_key(bytearray(b"b"))


def test_parameters_count_by_dtype_and_device():
    tensor = torch.zeros(2)
    assert parameter_key(tensor) == parameter_key(torch.ones(5, 3)) != parameter_key(tensor.double())
    assert parameter_key(tensor) != parameter_key(tensor.to("meta"))


# --- in a capture ----------------------------------------------------------------------------------------------------


def operand(value, keep=None):
    return operand_key(value, id, [] if keep is None else keep)


def test_operands_are_told_apart_as_torch_does(fake):
    size, other = fake(4, 6).shape
    tensor = torch.zeros(1)
    same = [1, 2.5, None, ..., "sum", torch.float16, (1, [2, {"dim": 3}]), slice(0, size), torch.relu, size + 1, tensor]
    for value in same:
        assert operand(value) == operand(value)
    apart = [(1, True), (1, 1.0), (0.0, -0.0), ((1,), [1]), (size, other), (size, 4), (torch.relu, torch.tanh)]
    for value, another in apart:
        assert operand(value) != operand(another)
    assert operand(float("nan")) == operand(float("nan")), "not by its equality, which it has not"
    assert operand(tensor) != operand(tensor.clone())


def test_what_may_change_is_never_the_same_operand():
    thing = Thing()
    assert operand(thing) != operand(thing) and operand({1}) != operand({1})


def test_what_is_described_by_identity_is_kept():
    keep = []
    operand((torch.relu, [1, torch.Tensor]), keep)
    assert keep == [torch.relu, torch.Tensor]


def test_traced_tensors_are_told_apart_by_sizes_strides_and_modes(fake):
    tensor = fake(4, 6)
    others = [tensor.t(), fake(4, 6), fake(4), tensor.double(), tensor.to("meta"), tensor[:, :5]]
    keys = [traced_tensor_key(value) for value in (tensor, *others)]
    assert len(set(keys)) == len(keys)
    assert traced_tensor_key(tensor) == traced_tensor_key(tensor + 1)
    assert traced_tensor_key(tensor) != traced_tensor_key((tensor + 1).requires_grad_())


def test_a_tensor_that_was_not_traced_is_equal_to_nothing():
    tensor = torch.zeros(2)
    assert traced_tensor_key(tensor) != traced_tensor_key(tensor)
    assert traced_tensor_key(nn.Parameter(tensor)) == traced_tensor_key(nn.Parameter(tensor))


# --- nodes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [node_value_key, interface_key])
def test_values_of_nodes_are_told_apart_by_shape_dtype_and_device(key, fake):
    tensor = fake(4, 6)
    assert key(tensor) == key(tensor + 1) and key([tensor, 1]) == key((tensor + 1, 1))
    others = [tensor.t(), tensor.double(), tensor.to("meta"), (tensor,), None]
    assert len({key(value) for value in (tensor, *others)}) == 1 + len(others)


def test_numbers_of_nodes_count_where_blocks_are_compared_and_not_where_they_are_verified(fake):
    size, other = fake(4, 6).shape
    assert node_value_key(size) != node_value_key(other) and node_value_key(1) != node_value_key(2)
    assert interface_key(size) == interface_key(other) == interface_key(1) == "int" != interface_key(1.5)

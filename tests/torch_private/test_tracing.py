"""tracing: fake tensors that stand in for others, and the nodes that compute them."""

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRangeError, ValueRanges

import lorafx
from lorafx.torch_private import tracing


def test_a_fake_tensor_is_like_another():
    like = torch.empty(3, 2, dtype=torch.bfloat16).t()
    with tracing.FakeTensorMode() as mode:
        made = tracing.fake_tensor(mode, tracing.meta_like(like), like.device, requires_grad=True)
    assert type(made) is tracing.FakeTensor and made.fake_mode is mode and made.requires_grad and made.is_leaf
    assert (made.shape, made.stride(), made.dtype, made.device) == (like.shape, like.stride(), like.dtype, like.device)
    assert not isinstance(made, nn.Parameter)
    tracing.pass_for_parameter(made)
    assert isinstance(made, nn.Parameter)


def test_a_fake_tensor_has_what_torch_gives_one():
    like = tracing.meta_like(torch.ones(3, 2))
    with functorch_config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):  # as torch.export has it
        strict = tracing.FakeTensorMode()
    for mode in (tracing.FakeTensorMode(), strict):
        for _ in range(2):
            made, theirs = (
                tracing.fake_tensor(mode, like, torch.device("cpu"), False),
                tracing.FakeTensor(mode, like, torch.device("cpu")),
            )
            assert vars(made) == vars(theirs) and made.fake_mode is mode
            assert torch._C._dispatch_keys(made) == torch._C._dispatch_keys(theirs)
            made.nonzero_memo = 3  # it is its own
    with pytest.raises(RuntimeError):
        made.data_ptr()


def test_a_node_can_be_said_to_compute_a_tensor():
    outside = torch.ones(1)

    def run(x):
        tracer = get_proxy_mode().tracer
        y, z = x * 2, x * 3
        slot = tracing.slot_of(y, tracer)
        assert tracing.node_of(y, tracer) is slot.proxy.node and tracing.node_of(outside, tracer) is None
        tracing.set_node(y, tracer, tracing.slot_of(z, tracer).proxy)
        assert tracing.node_of(y, tracer) is tracing.node_of(z, tracer)
        tracing.set_slot(y, tracer, slot)
        assert tracing.node_of(y, tracer) is slot.proxy.node
        tracing.replace_by(y, z, tracer)
        return y

    gm = make_fx(run, tracing_mode="fake")(torch.ones(2))
    assert torch.equal(gm(torch.ones(2)), torch.full((2,), 3.0))


def test_what_a_tracer_notes_of_nodes_is_set_and_put_back():
    class Tracer:
        module_stack, record_stack_traces = {"": "model"}, True

    tracer = Tracer()
    with tracing.within_modules(tracer, {"0": "layer"}), tracing.without_stack_traces(tracer):
        assert tracing.module_stack_of(tracer) == {"0": "layer"} and not tracer.record_stack_traces
    assert tracing.module_stack_of(tracer) == {"": "model"} and tracer.record_stack_traces


def test_nothing_is_noted_of_what_operators_give_in_a_capture():
    assert tracing.FakeTensorMode().cache_enabled
    gm = lorafx.trace(nn.Linear(2, 3), torch.ones(5, 2))
    mode = tracing.detect_fake_mode([node.meta["val"] for node in gm.graph.nodes if "val" in node.meta])
    assert not mode.cache_enabled and tracing.FakeTensorMode().cache_enabled


def test_values_of_symbols_are_what_sizes_were():
    found = {}

    def run(x):
        size = x.shape[0]
        found[str(size)] = tracing.values_of_symbols(size.node.shape_env)[size.node.expr]
        return x

    make_fx(run, tracing_mode="symbolic")(torch.ones(5, 7))
    assert list(map(int, found.values())) == [5]


def test_numbers_of_one_part_are_one_symbol():
    class Both(nn.Module):
        def forward(self, x, y):
            return x * 1, y * 1

    parts = {(f"L['{name}']", "size", 0): "rows" for name in "xy"}
    shapes = {name: dict.fromkeys(range(2), torch.export.Dim.AUTO) for name in "xy"}
    for given, rows in ((parts, 1), ({}, 2)):
        with tracing.sharing_symbols(given):
            gm = torch.export.export(Both(), (torch.ones(5, 3), torch.ones(5, 3)), dynamic_shapes=shapes).module()
        values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        assert len({value.shape[0].node.expr for value in values}) == rows
        assert len({value.shape[1].node.expr for value in values}) == 2
        gm(torch.ones(4, 3), torch.ones(4, 7))
    with tracing.sharing_symbols(parts):
        gm = torch.export.export(Both(), (torch.ones(5, 3), torch.ones(5, 3)), dynamic_shapes=shapes).module()
    with pytest.raises(AssertionError):
        gm(torch.ones(4, 3), torch.ones(6, 3))


class Each(nn.Module):
    def forward(self, tensors):
        return [tensor * 1 for tensor in tensors]


def captured_of_one_part(monkeypatch, *tensors):
    """The fake inputs of a capture in which all rows play one part, and how many of them torch has made."""
    made, theirs = [], tracing.FakeTensorMode.from_tensor
    monkeypatch.setattr(
        tracing.FakeTensorMode, "from_tensor", lambda self, tensor, **how: made.append(1) or theirs(self, tensor, **how)
    )
    rows = {(f"L['tensors'][{n}]", "size", 0): "rows" for n in range(len(tensors))}
    shapes = {"tensors": [{0: torch.export.Dim.AUTO} for _ in tensors]}
    with tracing.sharing_symbols(rows):
        exported = torch.export.export(Each(), (list(tensors),), dynamic_shapes=shapes)
    inputs = exported.graph.find_nodes(op="placeholder")
    return exported.module(), [node.meta["val"] for node in inputs], len(made)


def test_inputs_of_equal_sizes_are_made_like_the_first(monkeypatch):
    tensors = [torch.randn(5, 3) for _ in range(3)]
    gm, fakes, made = captured_of_one_part(monkeypatch, *tensors)
    assert made == 1 and len({fake.untyped_storage()._cdata for fake in fakes}) == 3
    for fake in fakes:
        assert fake.shape[0].node.expr == fakes[0].shape[0].node.expr and fake.shape[1] == 3
        assert (fake.stride(), fake.dtype, fake.device) == ((3, 1), torch.float32, tensors[0].device)
    longer = [torch.randn(7, 3) for _ in range(3)]
    assert all(map(torch.equal, gm(longer), longer))
    for wrong in (torch.randn(6, 3), torch.randn(7, 4)):
        with pytest.raises((AssertionError, RuntimeError)):
            gm([*longer[:2], wrong])


def test_inputs_that_differ_are_made_by_torch(monkeypatch):
    others = [
        torch.randn(5, 4),
        torch.randn(5, 3, dtype=torch.float64),
        torch.randn(3, 5).t(),
        torch.randn(5, 3, requires_grad=True),
        torch.randn(6, 3)[1:],
        nn.Parameter(torch.randn(5, 3)),
    ]
    _, fakes, made = captured_of_one_part(monkeypatch, torch.randn(5, 3), *others, torch.randn(5, 3))
    assert made == 1 + len(others)
    for fake, tensor in zip(fakes[1:], others):
        assert (fake.stride(), fake.dtype) == (tensor.stride(), tensor.dtype)
        assert (fake.requires_grad, fake.storage_offset()) == (tensor.requires_grad, tensor.storage_offset())


def test_what_ranges_have_in_common_is_worked_out_once(monkeypatch):
    asked, theirs = [], ValueRanges.__and__
    monkeypatch.setattr(ValueRanges, "__and__", lambda a, b: asked.append((a, b)) or theirs(a, b))
    counting, sizes, numbers = ValueRanges.__and__, ValueRanges(2, int_oo), ValueRanges(0, 7)
    with tracing.ranges_remembered():
        assert {sizes & numbers for _ in range(3)} == {ValueRanges(2, 7)} and numbers & sizes == ValueRanges(2, 7)
        with pytest.raises(ValueRangeError):
            ValueRanges(0, 1) & sizes
    assert len(asked) == 3 and ValueRanges.__and__ is counting

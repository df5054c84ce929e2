"""emit: new nodes say what they compute, where they are in the model and who made them; what they replace is gone."""

import pytest
import torch
from torch import nn

import lorafx
from lorafx.graph import ADAPTED_BY, SITE, Attribute, Provenance, fake_value, made_by, marks_of, match, resolve
from lorafx.graph.emit import emit
from lorafx.graph.values import fake_mode_of

aten = torch.ops.aten


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("shift", torch.arange(6.0))

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def relu(x):
    return aten.relu.default(x)


def shifted(x, shift):
    return aten.add.Tensor(aten.tanh.default(x), shift, alpha=1)


MAKER = Provenance("test", "a site", "an adapter")


def emitted(replacement, fresh):
    model = Scaled()
    gm = lorafx.trace(model, torch.randn(5, 4))
    (anchor,) = gm.graph.find_nodes(op="call_function", target=aten.relu.default)
    stack = anchor.meta["stack_trace"]
    result, new = emit(gm, match(relu, anchor), replacement, fresh, MAKER, fake_mode_of(gm))
    gm.graph.lint()
    gm.recompile()
    return model, gm, result, new, stack


def test_a_replacement_stands_where_the_match_was():
    model, gm, result, new, _ = emitted(shifted, {"shift": Attribute("shift")})
    assert [node.target for node in new] == ["shift", aten.tanh.default, aten.add.Tensor] and result is new[-1]
    assert not gm.graph.find_nodes(op="call_function", target=aten.relu.default)
    (last,) = [n for n in gm.graph.nodes if n.target is aten.linear.default and n.args[0] is result]
    assert all(node < last for node in new)
    x = torch.randn(7, 4)
    assert torch.equal(gm(x), model.second(torch.tanh(model.first(x)) + model.shift))


def test_defaults_are_left_out_as_capture_does():
    _, _, result, (_, tanh, _), _ = emitted(shifted, {"shift": Attribute("shift")})
    assert result.name.startswith("add") and len(result.args) == 2 and tanh.name == "tanh"

    def twice(x):
        return aten.add.Tensor(x, x, alpha=2)

    assert emitted(twice, {})[2].kwargs == {"alpha": 2}


def test_each_new_node_says_what_it_is():
    _, _, _, new, stack = emitted(shifted, {"shift": Attribute("shift", torch.float64)})
    assert [str(node.target) for node in new] == ["shift", "aten.to.dtype", "aten.tanh.default", "aten.add.Tensor"]
    for node in new:
        assert made_by(node) == MAKER and node.meta["stack_trace"] == stack
    dtypes = [node.meta["val"].dtype for node in new]
    assert dtypes == [torch.float32, torch.float64, torch.float32, torch.float64]
    assert all(isinstance(node.meta["val"], torch._subclasses.FakeTensor) for node in new)
    assert new[-1].meta["val"].shape[1] == 6


def test_a_number_is_written_as_it_is():
    def scaled(x, factor):
        return aten.mul.Tensor(x, factor)

    model, gm, result, _, _ = emitted(scaled, {"factor": 2.5})
    assert result.args[1] == 2.5
    x = torch.randn(2, 4)
    assert torch.equal(gm(x), model.second(model.first(x) * 2.5))


def test_reads_that_nobody_needs_any_more_go():
    model = Scaled()
    gm = lorafx.trace(model, torch.randn(5, 4))
    second = gm.graph.find_nodes(op="call_function", target=aten.linear.default)[1]

    def linear(x, w, b):
        return aten.linear.default(x, w, b)

    def other(x):
        return aten.linear.default(x, x)

    emit(gm, match(linear, second), other, {}, MAKER, fake_mode_of(gm))
    reads = {node.target for node in gm.graph.find_nodes(op="get_attr")}
    assert "first.weight" in reads and not reads & {"second.weight", "second.bias"}


def test_marks_are_the_site_and_its_adapters():
    gm = lorafx.trace(Scaled(), torch.randn(5, 4))
    node = gm.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    assert marks_of(node) == {} and made_by(node) is None
    node.meta |= {SITE: "here", ADAPTED_BY: ("a",), "other": 1}
    assert marks_of(node) == {SITE: "here", ADAPTED_BY: ("a",)}


def test_values_are_computed_without_arithmetic():
    gm = lorafx.trace(Scaled(), torch.randn(5, 4))
    mode = fake_mode_of(gm)
    assert mode is next(n for n in gm.graph.nodes if n.op == "placeholder").meta["val"].fake_mode
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_function"):
            value, claimed = fake_value(node, gm, mode), node.meta["val"]
            assert (str(value.shape), value.dtype) == (str(claimed.shape), claimed.dtype), node
    assert resolve(gm, "second.bias") is gm.second.bias
    with pytest.raises(AttributeError):
        resolve(gm, "second.nothing")

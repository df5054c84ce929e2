"""foreign tensors: a base tensor is read as the tree's, whoever was asked for it; what nobody can watch is refused."""

import pytest
import torch
from modules import Layer
from torch import nn
from torch.nn import functional as F

from lorafx.capture.export import trace
from lorafx.errors import CaptureError
from lorafx.graph import resolve

TABLE = torch.ones(6)
SCALE = [torch.ones(())]


def reads(gm):
    """The paths that a graph reads tensors at."""
    return {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}


class Reading(nn.Module):
    """Applies a function to a layer's input that may read anything."""

    def __init__(self, function):
        super().__init__()
        self.up, self.function = nn.Linear(4, 6), function

    def forward(self, x):
        return self.function(self, x)


def held_by_one_who_cannot_be_copied(module):
    class Single:
        def __init__(self):
            self.module = module

        def __copy__(self):
            raise TypeError("there is one of me")

    return Single()


def test_an_originals_tensors_are_the_trees():
    model = Reading(lambda self, x: self.single.module(x, SCALE[0]))
    model.other, SCALE[0] = Layer(), nn.Buffer(torch.tensor(2.0))
    model.register_buffer("scale", SCALE[0])
    model.single = held_by_one_who_cannot_be_copied(model.other)
    x = torch.randn(3, 4)
    gm = trace(model, x)
    assert reads(gm) == {"other.up.weight", "other.up.bias", "other.down.weight", "scale"}
    with torch.no_grad():
        model.other.up.weight.add_(1.0)
    torch.testing.assert_close(gm(x), model(x))


def test_parameters_in_a_list_are_the_trees():
    model = Reading(lambda self, x: F.linear(x, *self.held))
    model.held = [model.up.weight, model.up.bias]
    assert reads(trace(model, torch.randn(3, 4))) == {"up.weight", "up.bias"}


def test_statistics_of_an_original_are_updated_where_the_tree_has_them():
    model = Reading(lambda self, x: self.single.module(x))
    norm = model.norm = nn.BatchNorm1d(4)
    model.single = held_by_one_who_cannot_be_copied(norm)
    gm, x = trace(model, torch.randn(3, 4)), torch.randn(5, 4)
    gm(x)
    assert int(norm.num_batches_tracked) == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(0))


UNSEEN = {
    "wants a gradient": lambda self, x: self.up(x) * self.held[0],
    "is a part of one of the model's own": lambda self, x: F.linear(x, self.up.weight) + self.part[0],
    "that no module holds": lambda self, x: self.up(x) + torch.from_numpy(self.array),
}


@pytest.mark.parametrize("reason", UNSEEN)
def test_a_tensor_that_nobody_could_follow_is_refused(reason):
    model = Reading(UNSEEN[reason])
    model.held, model.part = [nn.Parameter(torch.ones(6))], [model.up.bias.detach()[:6]]
    model.array = torch.ones(6).numpy()
    with pytest.raises(CaptureError, match=rf"reads a tensor .*{reason}.*test_foreign_tensors\.py"):
        trace(model, torch.randn(3, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: self.up(x) + TABLE,
        lambda self, x: self.up(x) + self.tables["a"][0],
        lambda self, x: self.up(x) + self.plain,
        lambda self, x: self.up(x) + torch.tensor([1.0] * 6),
        lambda self, x: self.up(x) + torch.arange(6.0).clone(),
    ],
    ids=["a global", "in containers", "an attribute", "made in the call", "computed in the call"],
)
def test_a_tensor_that_is_watched_or_made_in_the_call_is_a_constant(function):
    model = Reading(function)
    model.tables, model.plain = {"a": [torch.ones(6)]}, torch.ones(6)
    x = torch.randn(3, 4)
    gm = trace(model, x)
    torch.testing.assert_close(gm(x), model(x))
    assert resolve(gm, "up.weight") is model.up.weight


@pytest.mark.slow
@pytest.mark.parametrize("how", ["own", "foreign"])
def test_operators_that_take_functions_are_captured_without_it(how):
    def choose(self, x):
        other = self.single.module if how == "foreign" else self.other
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (self.up(other(x)),))

    model, x = Reading(choose), torch.randn(3, 4)
    model.other = nn.Linear(4, 4)
    model.single = held_by_one_who_cannot_be_copied(model.other)
    if how == "foreign":
        with pytest.raises(CaptureError, match="own tensors by another way"):
            trace(model, x)
    else:
        torch.testing.assert_close(trace(model, x)(x), model(x))


def in_place(self):
    self.mean.mul_(0.5).add_(1.0)


def by_index(self):
    self.mean[:] = 2.0


def by_data(self):
    self.mean.data = self.mean.data + 1.0


def another(self):
    self.mean = self.mean * 0.5


@pytest.mark.parametrize("change", [in_place, by_index, by_data, another])
def test_a_tensor_that_is_no_buffer_is_not_changed_by_a_graph(change):
    model = Reading(lambda self, x: (change(self), self.up(x) + self.mean)[1])
    model.mean = mean = torch.ones(6)
    with pytest.raises(CaptureError, match="it changes"):
        trace(model, torch.randn(3, 4))
    assert model.mean is mean and mean.tolist() == [1.0] * 6

"""Tensors by their paths."""

from torch import nn

from lorafx.tree.lookup import find_tensor, find_tensors


class Held:
    """An object with a tensor that is no module."""

    def __init__(self, tensor):
        self.weight = tensor


def test_many_paths_are_looked_up_as_each_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)))
    model.held = Held(model[0].weight)
    paths = ["1.0.weight", "0.weight", "0.weight", "1.0.bias", "1.1.running_mean", "held.weight", "held.none.weight"]
    paths += ["nowhere.weight", "1.1.eps", "0"]
    assert all(one is other for one, other in zip(find_tensors(model, paths), (find_tensor(model, p) for p in paths)))
    assert [tensor is None for tensor in find_tensors(model, paths)] == [False] * 3 + [True, False, False] + [True] * 4
    model[0].weight = nn.Parameter(model[0].weight * 2)
    assert find_tensors(model, paths)[1] is model[0].weight, "as it is now"

"""originals: a base's module that runs in the place of its mirror must be in the same mode."""

import copy

import pytest
import torch
from modules import Stack
from torch import nn

from lorafx.tree.mirror import mirrored
from lorafx.tree.originals import Originals, other_mode


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.twin = nn.Parameter(torch.ones(2)), None

    def forward(self):
        return other_mode(self.weight, self.twin)


@pytest.mark.parametrize("training", [True, False])
def test_another_mode_is_told_while_the_module_runs(training):
    model = Reading().train(training)
    model.twin = mirrored(Reading()).train(training)
    assert model() == ""
    model.twin.train(not training)
    wanted = "eval" if training else "train"
    assert f"call `{wanted}()` of the base" in model() and "Reading runs here" in model()
    assert other_mode(model.weight, model.twin) == "", "it does not run now"
    assert other_mode(torch.ones(2), model.twin) == ""


def test_a_module_that_is_replaced_in_the_base_is_told_once_by_its_path():
    base, other = Stack(depth=3), nn.ReLU()
    originals = Originals(base)
    assert originals.replaced() == []
    base.layers[1].up = other
    base.layers._modules["0"] = base.layers[2]
    base.layers.append(other)
    assert sorted(originals.replaced()) == ["layers.0", "layers.1.up", "layers.3"] and originals.replaced() == []
    del base.layers[3]
    again, copied = copy.deepcopy((base, originals))
    assert originals.replaced() == copied.replaced() == ["layers.3"]
    again.layers[2].down = other
    assert originals.replaced() == [] and copied.replaced() == ["layers.2.down"]

"""originals: a base's module that runs in the place of its mirror must be in the same mode."""

import pytest
import torch
from torch import nn

from lorafx.tree.mirror import mirrored
from lorafx.tree.originals import other_mode


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

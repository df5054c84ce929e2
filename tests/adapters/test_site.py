"""Selections: sequences of sites that know them by name, and how often PEFT would wrap their modules."""

import pytest
import torch
from graphs import adapted
from torch import nn

from lorafx.adapters.site import Selection


class Experts(nn.Module):
    """Two weights that stack three experts each."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 6, 4))


@pytest.fixture
def sites() -> Selection:
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 5), "experts": Experts()})
    return adapted(model, target_modules=["a", "b"], target_parameters=["experts.up", "experts.down"]).sites


def test_a_selection_is_a_sequence_of_sites_by_name(sites):
    assert [site.name for site in sites] == ["a", "b", "experts.up", "experts.down"]
    assert isinstance(sites[1:], Selection) and sites[0] in sites and "b" in sites and "experts" not in sites
    assert list(sites[:3] | sites[1:]) == list(sites)
    assert str(sites).startswith("4 sites") and "experts.down" in str(sites)


def test_peft_wraps_a_module_once_for_each_parameter_that_is_named(sites):
    assert sites.wrappers == {"a": 1, "b": 1, "experts": 2}
    assert {module: [site.parameter for site in of] for module, of in sites.parameters.items()} == {
        "experts": ["up", "down"]
    }

"""Errors name what is near, and warnings the user's own line."""

import pytest
import torch
from torch import nn

import lorafx
from lorafx.errors import nearest


def test_a_warning_points_at_the_users_own_line_however_deep_it_is_given():
    lora = lorafx.compile(nn.Sequential(nn.Linear(3, 4)), {"target_modules": ["0"]})
    with pytest.warns(UserWarning, match="nothing to unmerge") as noted:
        lora.unmerge_adapter()
    lora.train().merge_adapter()
    with pytest.warns(UserWarning, match="nothing to train") as said:
        nn.Sequential(nn.Identity(), lora)(torch.ones(2, 3))
    assert {each.filename for each in (*noted, *said)} == {__file__}


def test_what_is_nearest_ends_in_the_name_or_is_spelt_like_it():
    known = ["layers.0.q_proj", "layers.1.q_proj", "head"]
    assert nearest("1.q_proj", known, "none") == "nearest: layers.1.q_proj"
    assert nearest("q_prj", known, "none") == "nearest: layers.0.q_proj, layers.1.q_proj"
    assert nearest("zzz", known, "none") == "none"

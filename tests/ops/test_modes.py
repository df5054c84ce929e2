"""Modes that a call runs in."""

from __future__ import annotations

import torch

from lorafx.ops.modes import without_autocast


def test_autocast_is_switched_off_where_it_is_on_and_left_alone_elsewhere():
    x = torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x.t()).dtype == torch.bfloat16
        with without_autocast("cpu"):
            assert (x @ x.t()).dtype == torch.float32
        assert (x @ x.t()).dtype == torch.bfloat16
    for device in ("cpu", "meta"):
        assert not isinstance(without_autocast(device), torch.autocast)

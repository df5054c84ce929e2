"""What lorafx takes for granted about tensors and modules."""

import torch
from torch import nn

from lorafx.torch_private.tensors import buffers_of_no_state_dict


def test_buffers_of_no_state_dict_are_those_that_it_lacks():
    module = nn.BatchNorm1d(3)
    module.register_buffer("scale", torch.ones(()), persistent=False)
    module.register_buffer("none", None, persistent=False)
    found = buffers_of_no_state_dict(module)
    assert found == {"scale": module.scale, "none": None}
    assert found.keys().isdisjoint(module.state_dict())

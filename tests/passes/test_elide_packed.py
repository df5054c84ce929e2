"""elide_packed: packed weights are read for nothing once their sites are known."""

import torch
from torch import nn

import lorafx
from lorafx.passes import ElidePacked


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.register_buffer("codes", torch.randint(-8, 8, (4, 6), dtype=torch.int8))

    def forward(self, x):
        return x @ (self.codes.to(x.dtype) / 8).T


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.plain, self.head = Packed(), Packed(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.up(x) + self.plain(x))


def reads(lora, x):
    return [str(node.target) for node in lora.graph(x).graph.find_nodes(op="get_attr")]


def test_no_packed_weight_is_read():
    config, x = {"r": 2, "target_modules": ["up", "plain", "head"], "init_lora_weights": False}, torch.randn(5, 6)
    without = lorafx.passes.default.without(ElidePacked.name)
    kept, freed = (lorafx.compile(Net(), config, pipeline=p) for p in (without, lorafx.passes.default))
    assert {"up.codes", "plain.codes"} <= set(reads(kept, x))
    assert not any("codes" in target for target in reads(freed, x))
    freed.load_state_dict(kept.state_dict())
    torch.testing.assert_close(freed(x), kept(x), rtol=0, atol=0)

"""What kinds say the inverse of their merge is, of which a residual keeps the rest: a wrong one would cost memory."""

import pytest
import torch
from torch import nn
from uses import randomize

import lorafx
from lorafx.merging.source import Source

HERE = {"target_modules": ["0"]}
CONFIGS = [
    lorafx.LoraConfig(**HERE, r=2),
    lorafx.IA3Config(**HERE, feedforward_modules=[]),
    lorafx.IA3Config(**HERE, feedforward_modules=["0"]),
    lorafx.LoHaConfig(**HERE, r=2),
    lorafx.LoKrConfig(**HERE, r=2),
    lorafx.OFTConfig(**HERE, oft_block_size=4),
    lorafx.OFTConfig(**HERE, oft_block_size=4, use_cayley_neumann=False),
    lorafx.BOFTConfig(**HERE, boft_n_butterfly_factor=2),
    lorafx.HRAConfig(**HERE, r=4),
    lorafx.HRAConfig(**HERE, r=4, apply_GS=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.peft_type)
def test_the_inverse_of_a_merge_is_one(config):
    model = nn.Sequential(nn.Linear(16, 10)).double()
    lora = lorafx.compile(model, config)
    randomize(lora)
    adapter = lora._lorafx.adapters["default"]
    (site,) = adapter.selection
    source, weight = Source.of(lora, adapter, site), model[0].weight.detach()
    merged = source.merged("weight", weight)
    assert (merged - weight).abs().max() > 1e-3
    torch.testing.assert_close(source.unmerged("weight", merged), weight, rtol=1e-10, atol=1e-10)

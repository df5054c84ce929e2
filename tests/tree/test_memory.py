"""Weights that lie in the memory of others: what would be written into both is refused."""

import pytest
import torch
from graphs import adapted
from merged_weights import bits
from torch import nn

import lorafx
from lorafx.errors import AdapterError, MergeError


@pytest.mark.parametrize("weight", ["the same", "transposed", "a part"])
def test_a_weight_in_the_memory_of_another_is_not_merged_into(weight):
    """ΔW would be in both, though the adapter acts in one: two parameters of one storage are no tied weight."""
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    shared = torch.randn(6, 5)
    of_other = {"the same": shared[:5], "transposed": shared[:5].T, "a part": shared[1:]}[weight]
    net[0].weight, net[2].weight = nn.Parameter(shared[:5]), nn.Parameter(of_other)
    lora, before = adapted(net, target_modules=["2"]), bits(net)
    with pytest.raises(MergeError, match=r"2\.weight shares its memory with 0\.weight.*clone"):
        lora.merge_adapter()
    assert bits(net) == before and not lora.get_model_status().merged_adapters
    with pytest.raises(AdapterError, match=r"take start values out of 2\.weight shares"):
        lora.add_adapter("pissa", lorafx.LoraConfig(r=2, target_modules=["2"], init_lora_weights="pissa"))
    assert bits(net) == before and list(lora.peft_config) == ["default"]


def test_weights_side_by_side_in_one_buffer_are_merged_into_and_expanded_ones_are_not():
    """Rows and columns of a fused weight: what lies between the numbers of one may be those of another."""
    net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
    buffer = torch.randn(7, 8)
    net[0].weight, net[2].weight = nn.Parameter(buffer[:, ::2]), nn.Parameter(buffer[:, 1::2].T[:3])
    lora, before, x = adapted(net), bits(net), torch.randn(5, 4)
    expected = lora(x)
    lora.merge_adapter()
    torch.testing.assert_close(lora(x), expected)
    lora.unmerge_adapter()
    assert bits(net) == before and net[2].weight.stride() == (2, 8)
    net[0].weight = nn.Parameter(torch.randn(7, 1).expand(7, 4))
    with pytest.raises(MergeError, match=r"0\.weight is expanded.*Nothing was changed"):
        lora.merge_adapter()
    assert bits(net)["2.weight"] == before["2.weight"]

"""linear: a weight that is cast before it is read is read as a linear layer's is, whatever the kind."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorafx

READS = {
    "to a dtype": lambda m, x: F.linear(x, m.weight.to(x.dtype), m.bias.to(x.dtype)),
    "type_as": lambda m, x: F.linear(x, m.weight.type_as(x), m.bias.type_as(x)),
    "to a tensor": lambda m, x: F.linear(x, m.weight.to(x), m.bias.to(x)),
    "to device and dtype": lambda m, x: F.linear(x, m.weight.to(x.device, x.dtype), m.bias.double()),
    "turned": lambda m, x: x @ m.weight.to(x.dtype).T + m.bias,
}
KINDS = {
    "LoRA": lorafx.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False),
    "DoRA": lorafx.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False, use_dora=True),
    "LoHa": lorafx.LoHaConfig(r=2, target_modules=["0"], init_weights=False),
    "IA3": lorafx.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False),
    "OFT": lorafx.OFTConfig(r=0, oft_block_size=3, target_modules=["0"], init_weights=False),
}


class Casted(nn.Linear):
    """A linear layer in float32 whose inputs are float64."""

    def __init__(self, read):
        super().__init__(6, 5)
        self.read = read

    def forward(self, x):
        return self.read(self, x)


def compiled(read, config, capture):
    torch.manual_seed(0)
    return lorafx.compile(nn.Sequential(Casted(read), nn.Tanh()), config, random_state=0, capture=capture)


def holds(lora, x):
    """Outputs are those of the merged weight, which is rounded to float32 once."""
    y = lora(x)
    assert y.dtype == torch.float64
    lora.merge_adapter()
    merged = lora(x)
    lora.unmerge_adapter()
    bound = 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(y, merged, rtol=bound, atol=bound * float(merged.abs().max()))
    with lora.disable_adapter():
        assert not torch.allclose(lora(x), y, atol=1e-3)


@pytest.mark.parametrize("capture", ["graph", "sites"])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_however_it_is_cast(read, capture):
    holds(compiled(read, KINDS["LoRA"], capture), torch.randn(3, 6, dtype=torch.float64))


@pytest.mark.parametrize("capture", ["graph", "sites"])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_kind(kind, capture):
    holds(compiled(READS["to a dtype"], KINDS[kind], capture), torch.randn(3, 6, dtype=torch.float64))


def test_a_cast_that_changes_nothing_leaves_a_fused_operator():
    lora = compiled(READS["to a dtype"], KINDS["LoRA"], "graph")
    targets = {str(node.target) for node in lora.graph(torch.randn(3, 6)).graph.nodes}
    assert "lorafx.lora_linear.default" in targets and "aten.to.dtype" not in targets

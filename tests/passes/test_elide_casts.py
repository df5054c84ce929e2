"""elide_casts: only casts that change a dtype are left."""

import torch
from graphs import INSERT, Chain, adapted, in_float32, run, text
from torch import nn

import lorafx
from lorafx.passes import Canonicalize, ElideCasts
from lorafx.pipeline import Pipeline

CASTED = (*INSERT, ElideCasts())


def casts(gm) -> list[str]:
    return [line for line in text(gm) if " = to." in line]


def test_a_cast_to_the_same_dtype_goes():
    lora, x = adapted(Chain(), target_modules=["second"]), torch.randn(5, 4)
    assert casts(run(lora, INSERT, x)) == [
        "to = to.dtype(relu, torch.float32)",
        "to_1 = to.dtype(add, torch.float32)",
    ]
    gm = run(lora, CASTED, x)
    assert casts(gm) == []
    assert torch.equal(gm(x), run(lora, INSERT, x)(x))


def test_casts_between_a_half_precision_base_and_float32_adapters_stay():
    x = torch.randn(5, 4, dtype=torch.bfloat16)
    lora = adapted(Chain().bfloat16(), target_modules=["second"])
    assert casts(run(lora, CASTED, x)) == [
        "to = to.dtype(second_lora_a_default_weight, torch.bfloat16)",
        "to_1 = to.dtype(second_lora_b_default_weight, torch.bfloat16)",
    ]
    assert casts(run(lora, in_float32(CASTED), x)) == [
        "to = to.dtype(relu, torch.float32)",
        "to_1 = to.dtype(add, torch.bfloat16)",
    ]


class Copies(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x.to(torch.float32, copy=True)), self.linear(x).to(torch.float32)


def test_a_cast_within_a_vmap_stays():
    """What uses it could not be computed anew."""

    class Mapped(nn.Module):
        def forward(self, x):
            return torch.vmap(lambda row: row.to(torch.float32) * row)(x)

    gm, x = lorafx.trace(Mapped(), torch.randn(5, 4)), torch.randn(6, 4)
    Pipeline(Canonicalize(), ElideCasts()).run(gm)
    assert len(casts(gm)) == 1 and torch.equal(gm(x), x * x)


def test_a_cast_that_asks_for_a_copy_stays():
    lora = adapted(Copies(), target_modules=["linear"])
    left = [line for line in casts(run(lora, CASTED, torch.randn(5, 4))) if "copy" in line or "True" in line]
    assert len(left) == 1

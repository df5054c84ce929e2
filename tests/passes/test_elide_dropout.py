"""elide_dropout: dropout that drops nothing is gone; dropout that drops stays, drawing what it drew."""

import torch
from graphs import INSERT, Chain, adapted, run, text
from torch import nn

from lorafx.passes import ElideDropout

ELIDED = (*INSERT, ElideDropout())


def dropouts(gm) -> list[str]:
    return [line for line in text(gm) if " = dropout(" in line]


def test_p_0_goes_in_training():
    lora, x = adapted(Chain(), target_modules=["second"], lora_dropout=0.0), torch.randn(5, 4)
    assert dropouts(run(lora, INSERT, x)) == ["dropout = dropout(to, 0.0, True)"]
    gm = run(lora, ELIDED, x)
    assert dropouts(gm) == []
    assert torch.equal(gm(x), run(lora, INSERT, x)(x))


def test_all_go_in_eval():
    lora = adapted(nn.Sequential(Chain(), nn.Dropout(0.5), nn.Linear(3, 2)), lora_dropout=0.3).eval()
    assert dropouts(run(lora, INSERT, torch.randn(5, 4)))
    assert dropouts(run(lora, ELIDED, torch.randn(5, 4))) == []


def test_what_drops_stays_and_draws_the_same():
    lora, x = adapted(Chain(), target_modules=["second"], lora_dropout=0.5), torch.randn(50, 4)
    gm = run(lora, ELIDED, x)
    assert dropouts(gm) == ["dropout = dropout(to, 0.5, True)"]
    torch.manual_seed(1)
    first = gm(x)
    torch.manual_seed(1)
    assert torch.equal(first, run(lora, INSERT, x)(x))
    assert not torch.equal(first, gm(x))


def test_the_mode_is_the_sites_own():
    lora = adapted(Chain(), lora_dropout=0.5)
    lora.second.eval()
    assert dropouts(run(lora, ELIDED, torch.randn(5, 4))) == ["dropout = dropout(to, 0.5, True)"]

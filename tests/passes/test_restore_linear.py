"""restore_linear: x Wᵀ, however it is written, is a site."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorafx
from lorafx.passes import Canonicalize, RestoreLinear
from lorafx.pipeline import Pipeline

aten = torch.ops.aten


class Handwritten(nn.Module):
    """A linear layer whose forward spells the product out."""

    def __init__(self, product):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.product = product

    def forward(self, x):
        return self.product(x, self.layer.weight, self.layer.bias)


SPELLINGS = {
    "T": lambda x, w, b: x @ w.T + b,
    "t": lambda x, w, b: torch.matmul(x, w.t()) + b,
    "mT": lambda x, w, b: x @ w.mT + b,
    "transpose": lambda x, w, b: x @ w.transpose(1, 0) + b,
    "transpose from the end": lambda x, w, b: x @ w.transpose(-2, -1) + b,
    "mm": lambda x, w, b: x.mm(w.T) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
    "addmm and T": lambda x, w, b: torch.addmm(b, x, w.T),
}


def targets(gm):
    return {node.target for node in gm.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_becomes_linear(spelling):
    model, x = Handwritten(SPELLINGS[spelling]), torch.randn(4, 5)
    gm = lorafx.trace(model, x)
    Pipeline(Canonicalize(), RestoreLinear()).run(gm)
    assert next(n.target for n in gm.graph.nodes if n.op == "call_function") is aten.linear.default
    assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("spelling", ["mT", "addmm"])
def test_what_was_spelt_out_is_adapted(spelling):
    model, x = Handwritten(SPELLINGS[spelling]), torch.randn(4, 5)
    lora = lorafx.compile(copy.deepcopy(model), {"target_modules": ["layer"], "init_lora_weights": False})
    before = lora(x)
    assert not torch.allclose(before, model(x))
    lora.merge_adapter()
    torch.testing.assert_close(lora(x), before)


def test_a_conv1d_is_linear_and_fused():
    model, x = nn.Sequential(Conv1D(3, 5)), torch.randn(2, 4, 5)
    gm = lorafx.trace(model, x)
    Pipeline(Canonicalize(), RestoreLinear()).run(gm)
    assert targets(gm) == {aten.t.default, aten.linear.default}
    assert torch.equal(gm(x), model(x))
    lora = lorafx.compile(model, {"target_modules": ["0"], "init_lora_weights": False})
    assert targets(lora.graph(x)) == {aten.t.default, torch.ops.lorafx.lora_linear.default}


class OtherRows(nn.Module):
    """As a Conv1D, but that rows of x are put together, or those of the result are."""

    def __init__(self, features, out):
        super().__init__()
        self.conv, self.features, self.out = Conv1D(6, features), features, out

    def forward(self, x):
        return torch.addmm(self.conv.bias, x.view(-1, self.features), self.conv.weight).view(self.out(x))


OTHER_ROWS = {
    "pairs": (10, lambda x: (*x.shape[:2], 3)),
    "traded": (5, lambda x: (x.shape[1], x.shape[0], 6)),
}


@pytest.mark.parametrize(("features", "out"), OTHER_ROWS.values(), ids=OTHER_ROWS)
def test_rows_that_are_others_afterwards_stay_as_they_are(features, out):
    model, x = OtherRows(features, out), torch.randn(2, 4, 5)
    gm = lorafx.trace(model, x)
    Pipeline(Canonicalize(), RestoreLinear()).run(gm)
    assert aten.addmm.default in targets(gm)
    assert torch.equal(gm(x), model(x))


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(5, 5))
        self.b = nn.Parameter(torch.randn(2, 5, 3))
        self.c = nn.Parameter(torch.randn(2, 3, 5))


class WrongAxes(Other):
    def forward(self, x):
        return (x @ self.a.transpose(0, 0)) @ self.b.transpose(0, 2)[0] @ (x.t() @ x)[:2]


class SeveralMatrices(Other):
    def forward(self, x):
        return x @ self.c.transpose(1, 2) + x @ self.c.mT


class NoBias(Other):
    def forward(self, x):
        return torch.addmm(x, x, self.a.t())


@pytest.mark.parametrize("form", [WrongAxes, SeveralMatrices, NoBias])
def test_what_is_no_transposed_matrix_stays(form):
    model, x = form(), torch.randn(4, 5)
    gm = lorafx.trace(model, x)
    before = [n.target for n in gm.graph.nodes]
    assert RestoreLinear().rewrite(gm, None) == 0 and [n.target for n in gm.graph.nodes] == before

"""fuse_loss: a head and its loss are one operator without logits; those that the graph gives wait until asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from graphs import adapted, text
from losses import EPS, Own, assert_equal, both, outcome, shifted
from modules import cases
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lorafx
from lorafx.graph.printing import graph_lines
from lorafx.ops.cpu import products


class Largest(TorchDispatchMode):
    """The most elements that a tensor had which an operator gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


FUSED = {
    "flat": lambda logits, labels: (F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1)), logits),
    "shifted": shifted,
    "shifted in float64": lambda logits, labels: shifted(logits.double(), labels),
    "every second": lambda logits, labels: F.cross_entropy(
        logits[1:, ::2].contiguous().flatten(0, 1).view(-1, 13), labels[1:, ::2].reshape(-1), reduction="sum"
    ),
    "classes second": lambda logits, labels: F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=3),
    "capped": lambda logits, labels: shifted(torch.tanh(logits / 2.0) * 2.0, labels),
    "scaled, capped": lambda logits, labels: shifted(torch.tanh(logits * 3.0 / 2.0) * 2.0, labels),
    "smoothed": lambda logits, labels: F.cross_entropy(logits.view(-1, 13), labels.view(-1), label_smoothing=0.1),
}
LEFT = {
    "not reduced": lambda logits, labels: F.cross_entropy(logits.view(-1, 13), labels.view(-1), reduction="none"),
    "class weights": lambda logits, labels: F.cross_entropy(logits.view(-1, 13), labels.view(-1), torch.ones(13)),
    "no class numbers": lambda logits, labels: F.cross_entropy(
        logits.view(-1, 13), F.one_hot(labels.view(-1), 13).float()
    ),
    "also used by": lambda logits, labels: shifted(logits, labels)[0] + logits.square().mean(),
    "another shape": lambda logits, labels: (F.cross_entropy(flat := logits.view(-1, 13), labels.view(-1)), flat),
    "come from aten.select": lambda logits, labels: F.cross_entropy(logits[0], labels[0]),
    "come from aten.relu": lambda logits, labels: F.cross_entropy(logits.relu().view(-1, 13), labels.view(-1)),
    "come from aten.to": lambda logits, labels: shifted(logits.bfloat16().float(), labels),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(FUSED, quick=["shifted"]))
def test_losses_that_are_fused(name):
    assert_fused(name, ["inner", "head"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flat", "every second", "scaled, capped"])
def test_losses_on_a_frozen_head_are_fused(name):
    """As different ways from the logits to the loss as there are; on an adapted head all are tried."""
    assert_fused(name, ["inner"])


def assert_fused(name, targets):
    """float32; sums over at most 24 rows."""
    ids, labels = torch.randint(0, 13, (3, 8)), torch.randint(0, 13, (3, 8))
    ours, theirs = both(Own(FUSED[name]), targets)
    assert "linear_cross_entropy" in str(ours.graph(ids, labels))
    assert "linear_cross_entropy" not in str(theirs.graph(ids, labels))
    assert_equal(outcome(ours, ids, labels), outcome(theirs, ids, labels), EPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(LEFT, quick=["also used by"]))
def test_losses_that_stay(name):
    ids, labels = torch.randint(0, 13, (3, 8)), torch.randint(0, 13, (3, 8))
    ours, theirs = both(Own(LEFT[name]), ["inner", "head"])
    graph, before = (graph_lines(lora.graph(ids, labels)) for lora in (ours, theirs))
    assert graph == before
    (call,) = ours.explain().calls
    assert call.loss.startswith("not fused: ") and name in call.loss


def test_before_and_after(monkeypatch):
    monkeypatch.setattr(products, "mkl_leaves_avx512", lambda: False)  # or linear layers are lorafx's
    lora = adapted(Own(shifted), target_modules=["head"])
    ids = torch.randint(0, 13, (3, 8))
    lines = text(lora.graph(ids, ids.clone()))
    assert lines[lines.index("head_weight = head.weight") :] == [
        "head_weight = head.weight",
        "head_bias = head.bias",
        "head_lora_a_default_weight = head.lora_A.default.weight",
        "head_lora_b_default_weight = head.lora_B.default.weight",
        "slice_4 = slice.Tensor(labels, 1, 1, 9223372036854775807)",
        "reshape_1 = reshape(slice_4, [-1])",
        "slice_tensor = slice.Tensor(tanh, 1, 0, -1)",
        "linear_default = linear(slice_tensor, head_lora_a_default_weight)",
        "linear_cross_entropy = lorafx.linear_cross_entropy(slice_tensor, head_weight, head_bias, linear_default, "
        "head_lora_b_default_weight, 3.0, reshape_1)",
        "captured_head_0 = captured.head_0",
        "defer = defer(captured_head_0, torch.float32, tanh, head_weight, head_bias, head_lora_a_default_weight, "
        "head_lora_b_default_weight)",
        "captured.head_0, when asked for:",
        "    lora_linear = lorafx.lora_linear(tanh, head_weight, head_bias, None, head_lora_a_default_weight, "
        "head_lora_b_default_weight, 3.0)",
    ]


@pytest.mark.slow
def test_no_tensor_is_as_large_as_the_logits(small_chunks):
    """Forward, backward and what waits: nothing of rows x classes elements is ever made."""
    lora, plain = both(Own(shifted), ["inner", "head"])
    ids = torch.randint(0, 13, (8, 9))  # 64 rows count
    for model, large in ((lora, False), (plain, True)):
        model(ids, ids)
        with Largest() as seen:
            model(ids, ids)[0].backward()
        assert (seen.elements >= 64 * 13) == large, seen.elements


@pytest.mark.slow
def test_a_hidden_state_that_is_written_to_is_not_one_to_wait_with():
    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 13)

        def forward(self, x, labels):
            hidden = self.body(x)
            logits = self.head(hidden)
            loss = F.cross_entropy(logits, labels)
            hidden.zero_()
            return loss, logits

    model, x, labels = Reusing(), torch.randn(5, 4), torch.arange(5)
    lora = lorafx.compile(copy.deepcopy(model), {"target_modules": ["body"]})
    with torch.no_grad():
        for found, expected in zip(lora(x, labels), model(x, labels)):
            torch.testing.assert_close(torch.as_tensor(found), expected)
    assert "written in place" in str(lora.explain())

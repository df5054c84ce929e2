"""The same adapter file gives the same numbers here and in PEFT, run in one process.

A case is a model and a `peft.LoraConfig` (tests/peft/cases.py). PEFT makes the adapter and saves it, both load it, and
both make one training step from the same random seed; what came of that is computed once a case and compared by
several small tests.
"""

from __future__ import annotations

import math
from typing import Any

import models
import pytest
import torch
from cases import EVALUATED, Ran, assert_within, largest
from torch import Tensor, nn

pytestmark = pytest.mark.slow  # real PEFT beside lorafx, many captures: left out of `make test-fast`

LAMBDA = 5  # deviations allowed, as in lorafx.testing

# Cases whose numbers are compared; of the others, which differ only in what they select or combine what these have,
# only files are. A case costs a capture.
NUMERIC = [
    "llama all-linear",
    "llama patterns rslora",
    "llama embeddings",
    "llama saved norms",
    "llama tied, saved head",
    "llama tied, saved embeddings",
    "llama dropout",
    "llama bf16",
    "llama autocast",
    "llama attention bias",
    "gpt2 all-linear",
    "gpt2 bias all",
    "bert all-linear",
    "bert defaults",
    "t5 defaults",
    "vit saved classifier",
    "convnet",
    "convnet options",
    "llama bf16 embeddings",
    "gpt2 autocast",
    "bert model dropout",
]
numeric = pytest.mark.parametrize("ran", NUMERIC, indirect=True)


def path_length(model: nn.Module, inputs: Any) -> int:
    """Terms summed one after another on the way from input to loss and back: the longest chain's reduction lengths.

    A matrix is passed forwards (its input width) and backwards (its output width), and the gradient of a weight sums
    over tokens; every matrix is counted as though all were passed in turn, which the residual stream only bounds.
    """
    leaves = inputs.values() if isinstance(inputs, dict) else inputs
    tokens = max(leaf.numel() for leaf in leaves)
    return tokens + sum(p[0].numel() + p.shape[0] for p in model.parameters() if p.ndim > 1)


def limit_of_logits(ran: Ran, expected: Tensor, exact: Tensor | None) -> float:
    """Twice the distance of PEFT from the exact result, and in float32 at least eight eps, 1e-6 of the largest.

    Two computations that are as good as each other, and not related, are no further apart than that.
    """
    return max(1e-6 * largest(expected), 2 * ran.rounding) if exact is None else 2 * largest(expected.double() - exact)


def limit_of_loss(ran: Ran, expected: Tensor, exact: Tensor | None) -> float:
    """As of logits, and at least two deviations of PEFT's: its loss, one number, may be near the exact one by chance.

    A token's loss is a difference of logits, which are off by their root mean square; a loss is the mean of n of them.
    """
    limit = limit_of_logits(ran, expected, exact)
    if exact is None:
        return limit
    off = ran.theirs.logits.double() - ran.exact.logits
    tokens = off.numel() / off.shape[-1]
    return max(limit, 2 * float(off.square().mean().sqrt()) * math.sqrt(2 / tokens))


def limit_of_gradient(ran: Ran, expected: Tensor, exact: Tensor | None) -> float:
    """The limit for a gradient that is as large as `expected`.

    λ · u · √n of the largest: n roundings of u = eps / 2 each, independent, λ = 5 deviations; bfloat16 as above, and at
    least λ deviations: two results that are off by a root mean square σ each, independently, differ by √2 · σ. The
    largest of what PEFT is off by is one number, and as small as chance has it.

    n is `path_length`, the number of terms summed on the way (Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019).
    """
    if exact is not None:
        off = expected.double() - exact
        return max(2 * largest(off), LAMBDA * math.sqrt(2) * float(off.square().mean().sqrt()))
    length = path_length(ran.base, models.call(ran.case.model))
    return LAMBDA * ran.case.eps / 2 * math.sqrt(length) * largest(expected)


@numeric
def test_training_gives_the_same_logits_and_loss(ran: Ran) -> None:
    for what, limit in (("logits", limit_of_logits), ("loss", limit_of_loss)):
        ours, theirs, exact = (getattr(o, what, None) for o in (ran.ours, ran.theirs, ran.exact))
        if theirs is not None:
            assert_within(ours, theirs, limit(ran, theirs, exact), what)


@pytest.mark.parametrize("ran", sorted(EVALUATED), indirect=True)
def test_evaluation_gives_the_same_logits(ran: Ran) -> None:
    exact = ran.exact.evaluated if ran.exact else None
    assert_within(ran.ours.evaluated, ran.theirs.evaluated, limit_of_logits(ran, ran.theirs.evaluated, exact), "logits")


@numeric
def test_the_adapter_changes_the_logits_far_more_than_the_limit(ran: Ran) -> None:
    if ran.case.config.get("init_lora_weights"):
        pytest.skip("this adapter starts at B = 0")
    with torch.no_grad(), ran.case.context():
        plain = models.logits(models.run(ran.base.eval(), models.call(ran.case.model)))
    exact = ran.exact.evaluated if ran.exact else None
    change = largest(ran.theirs.evaluated.double() - plain.double())
    assert change > 5 * limit_of_logits(ran, ran.theirs.evaluated, exact)


@numeric
def test_training_gives_the_same_adapter_gradients(ran: Ran) -> None:
    ours, theirs = ran.ours.gradients, ran.theirs.gradients
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        if expected is None or not expected.any():
            assert ours[key] is None or not ours[key].any(), key
        else:
            exact = ran.exact.gradients[key] if ran.exact else None
            # Softmax does not see a key's bias, so that gradient is 0 but for rounding at the scale of the query's.
            measure = theirs[key.replace(".key.bias", ".query.bias")]
            assert_within(ours[key], expected, limit_of_gradient(ran, measure, exact), key)


@numeric
def test_some_gradient_is_not_zero(ran: Ran) -> None:
    assert any(gradient is not None and gradient.any() for gradient in ran.ours.gradients.values())

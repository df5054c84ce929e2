"""Calls: whichever forward a module has by now, and whatever somebody has put around it, runs with the adapters."""

from __future__ import annotations

import copy
import warnings
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from graphs import Chain
from torch import fx, nn

import lorafx
from lorafx.serving import early_calls

CONFIG = {"r": 2, "target_modules": ["lin"], "init_lora_weights": False}


class Ways(nn.Module):
    """(…, 4) -> (…, 5): lin(x) times 1, 2 or 3, by the forward that is chosen."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 5)

    def forward(self, x):
        return self.lin(x)

    def twice(self, x):
        return self.lin(x) * 2

    def thrice(self, x):
        return self.lin(x) * 3


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def negated(forward):
    return lambda x: -forward(x)


@pytest.fixture(params=["graph", "sites", "early"])
def capture(request, monkeypatch):
    """Each way to be served; "early" is "auto" before there is a graph, after which it is as "graph"."""
    monkeypatch.setattr(early_calls, "REPEATS", 100 if request.param == "early" else 0)
    return request.param.replace("early", "auto")


def factors(model, lin, *sizes):
    """By what the model's result is a multiple of the adapted layer's, for inputs of some sizes: each its own graph."""
    found = []
    for size in sizes:
        x = torch.randn(*size, 4)
        with torch.no_grad():
            ratio = model(x) / lin(x)
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=1e-4)
        found.append(round(float(ratio.mean()), 3))
    return found


def test_a_root_that_takes_another_forward_and_is_wrapped(capture):
    lora = lorafx.compile(Ways(), CONFIG, capture=capture)
    assert factors(lora, lora.lin, (2,)) == [1]
    lora.forward = lora.twice
    assert factors(lora, lora.lin, (2,)) == [2]
    lora.forward = lora.thrice
    assert factors(lora, lora.lin, (2,)) == [3]
    lora.forward = negated(lora.forward)
    assert factors(lora, lora.lin, (2,), (1,), (3, 2)) == [-3, -3, -3]
    del lora.forward
    assert factors(lora, lora.lin, (2,), (1, 2)) == [1, 1]


def test_a_root_whose_forward_was_replaced_before_and_is_wrapped(capture):
    base = Ways()
    base.forward = base.thrice  # as libraries do that patch models
    lora = lorafx.compile(base, CONFIG, capture=capture)
    whole = lora.forward
    lora.forward = negated(whole)  # as accelerate does for mixed precision
    assert factors(lora, lora.lin, (2,), (1,)) == [-3, -3]
    assert factors(copy.deepcopy(lora), lora.lin, (2,)) == [-3]
    lora.forward = MethodType(whole, lora)  # as accelerate does to take that away
    assert factors(lora, lora.lin, (2,), (1, 2)) == [3, 3]


def test_a_part_whose_forward_was_replaced_before_and_is_wrapped(capture):
    base = Outer(Ways())
    base.inner.forward = base.inner.thrice
    lora = lorafx.compile(base, CONFIG, capture=capture)
    part = lora.inner.forward
    lora.inner.forward = negated(part)
    for model in (lora, lora.inner):
        assert factors(model, lora.inner.lin, (2,), (1,)) == [-3, -3]
    for forward, factor in ((part, 3), (lambda x: lora.inner.lin(x) * 7, 7), (part, 3)):  # put back after a while
        lora.inner.forward = forward
        for model in (lora, lora.inner):
            assert factors(model, lora.inner.lin, (2,), (1, 2)) == [factor, factor]


class Choosing(nn.Linear):
    """(…, 4) -> (…, 5): the linear layer times 1, 2 or 3, by a forward that it chooses itself, reading its weight."""

    def forward(self, x):
        self.forward = self.twice  # from the next call on
        return F.linear(x, self.weight, self.bias)

    def twice(self, x):
        return F.linear(x, self.weight, self.bias) * 2

    def train(self, mode=True):
        if not mode:
            self.__dict__.pop("forward", None)
        return super().train(mode)


def test_a_layer_that_is_given_another_forward_and_called_alone(capture):
    base = Ways()
    base.lin = Choosing(4, 5)
    lora = lorafx.compile(base, CONFIG, capture="auto" if capture == "graph" else capture)
    lin = nn.Linear(4, 5).requires_grad_(False)
    A, B = lora.lin.lora_A.default.weight, lora.lin.lora_B.default.weight
    lin.weight.copy_(lora.lin.weight + 4 * B @ A)
    lin.bias.copy_(lora.lin.bias)
    assert factors(lora.lin, lin, (2,), (2,), (2,)) == [1, 2, 2]
    lora.eval()  # which takes the forward away that it has chosen
    assert factors(lora.lin, lin, (2,), (2,)) == [1, 2]
    lora.lin.forward = lambda x: F.linear(x, lora.lin.weight, lora.lin.bias) * 3
    assert factors(lora.lin, lin, (2,), (1, 2)) == [3, 3] and factors(lora, lin, (2,)) == [3]
    lora.lin.forward = negated(lora.lin.forward)
    lora.add_adapter("other", CONFIG)
    assert factors(lora.lin, lin, (2,), (1, 2)) == [-3, -3] and factors(lora, lin, (2,)) == [-3]


def test_a_linear_layer_that_is_given_another_forward_when_it_has_run(capture):
    lora = lorafx.compile(Ways(), CONFIG, capture=capture)
    as_it_was, kept = copy.deepcopy(lora), lora.lin.forward
    for chosen in (2, 3, 1):
        lora(torch.randn(2, 4))
        lora.lin.forward = lambda x, by=chosen: F.linear(x, lora.lin.weight, lora.lin.bias) * by
        lora.lin.forward = kept if chosen == 1 else lora.lin.forward
        assert factors(lora.lin, as_it_was, (2,), (3, 1)) == factors(lora, as_it_was, (2,), (3, 1)) == [chosen] * 2


def test_a_root_whose_new_forward_reads_the_weight_itself(capture):
    lora = lorafx.compile(Ways(), CONFIG, capture=capture)
    lora.forward = lambda x: F.linear(x, lora.lin.weight, lora.lin.bias) * 2
    assert factors(lora, lora.lin, (2,), (1, 3)) == [2, 2]


def test_what_a_replaced_forward_closes_over_is_watched(capture):
    settings, base = {"factor": 2.0}, Outer(Ways())
    lin = base.inner.lin
    base.inner.forward = lambda x: lin(x) * settings["factor"]
    lora = lorafx.compile(base, CONFIG, capture=capture)
    assert factors(lora, lora.inner.lin, (2,)) == [2]
    settings["factor"] = 5.0
    assert factors(lora, lora.inner.lin, (2,)) == [5] and factors(lora.inner, lora.inner.lin, (2,)) == [5]


def test_a_base_that_is_called_in_its_own_way(capture):
    class Doubling(Ways):
        def __call__(self, x):
            return super().__call__(2 * x)

    base = Doubling()
    nn.init.zeros_(base.lin.bias)
    lora = lorafx.compile(base, CONFIG, capture=capture)
    assert factors(lora, lora.lin, (2,), (3, 1)) == [2, 2]


def test_a_base_that_is_a_graph_module(capture, tmp_path):
    base = fx.symbolic_trace(Ways())
    lora = lorafx.compile(base, CONFIG, capture=capture)
    x = torch.randn(3, 4)
    expected = lora(x).detach()
    assert not torch.allclose(expected, base(x))
    lora(x).sum().backward()
    assert lora.lin.lora_B.default.weight.grad.any()
    lora.save_pretrained(tmp_path)
    for other in (lorafx.load(copy.deepcopy(base), tmp_path, capture=capture), copy.deepcopy(lora)):
        torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(lora.merge_and_unload()(x), expected)


def test_weights_that_torch_func_puts_in_place(capture):
    lora = lorafx.compile(Ways(), CONFIG, capture=capture)
    x, weight = torch.randn(3, 4), lora.lin.weight.detach().clone()

    def called(weight):
        return torch.func.functional_call(lora, {"lin.weight": weight}, (x,))

    base = nn.functional.linear(x, weight, lora.lin.bias)
    update = (lora(x) - base).detach()
    many = torch.vmap(called)(torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(many[1], (2 * base - lora.lin.bias + update).detach())
    gradient = torch.func.grad(lambda weight: called(weight).sum())(weight)
    torch.testing.assert_close(gradient, x.sum(0).expand(5, 4))


@pytest.mark.usefixtures("early")
def test_adapters_that_torch_func_puts_in_place_however_often():
    """Several at once by vmap, as the very first call, and gradients for each row of a batch."""
    lora, x = lorafx.compile(Ways(), CONFIG), torch.randn(3, 4)
    given = {path: each.detach() for path, each in lora.named_parameters()}
    adapters = {path: torch.stack([each, 2 * each]) for path, each in given.items() if "lora_" in path}
    a, b = (given[f"lin.lora_{name}.default.weight"] for name in "AB")
    base, scale = nn.functional.linear(x, given["lin.weight"], given["lin.bias"]), 8 / 2
    for _ in range(5):
        many = torch.vmap(lambda each: torch.func.functional_call(lora, given | each, (x,)))(adapters)
        torch.testing.assert_close(many[1], base + 4 * scale * x @ a.T @ b.T)

        def total(each, row):
            return torch.func.functional_call(lora, given | each, (row[None],)).sum()

        alone = {path: each[0] for path, each in adapters.items()}
        rows = torch.vmap(torch.func.grad(total), (None, 0))(alone, x)
        torch.testing.assert_close(rows["lin.lora_B.default.weight"], scale * (x @ a.T)[:, None].expand(3, 5, -1))


def test_a_module_that_is_replaced_in_the_base_is_said_once():
    base, x = Chain(), torch.randn(5, 4)
    lora = lorafx.compile(base, {"r": 2, "target_modules": ["second"], "init_lora_weights": False})
    before = lora(x)
    base.first = nn.Linear(4, 6)
    with pytest.warns(UserWarning, match=r"^first of the base was replaced .* its own `resize_token_embeddings`"):
        assert torch.equal(lora(x), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora(x)
        lora.first = base.first
        assert not torch.equal(lora(x), before)

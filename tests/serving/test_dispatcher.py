"""The dispatcher: calls of one kind share a program, and an adapted model is called as a plain one is."""

import copy

import pytest
import torch
from graphs import Chain, adapted
from modules import cases
from serving_models import Options, random, served, twins
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

import lorafx
from lorafx.errors import AdapterError


def test_sizes_order_of_keywords_and_defaults_share_a_graph():
    lora = adapted(Options())
    lora(torch.randn(5, 4), scale=torch.ones(3), extra=None)
    lora(torch.randn(7, 4), extra=None, scale=torch.ones(3))
    lora(torch.randn(2, 4), scale=torch.ones(3))
    (call,) = lora.explain().calls
    assert call.hits == 2 and call.why == "the first call" and call.served_by == "graph"


@pytest.mark.parametrize("value", cases([True, "mean", 2.5, (1, 2)], quick=["mean"]))
def test_constants_are_told_apart(value):
    class Echo(Chain):
        def forward(self, x, option=None):
            return super().forward(x), option

    lora, x = adapted(Echo()), torch.randn(5, 4)
    assert lora(x, option=value)[1] == value and lora(x)[1] is None and lora(x, option=value)[1] == value
    assert len(lora.explain().calls) == 2


class Modes(Chain):
    def forward(self, x, **more):
        y = super().forward(x)
        for power, value in enumerate(more.values(), 1):
            y = y + value**power
        return y + 1 if torch.is_grad_enabled() else y - 1


@pytest.mark.slow
def test_gradient_modes_are_as_the_caller_set_them():
    lora, plain = twins(Modes())
    x = random(5, 4)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            torch.testing.assert_close(lora(x), plain(x))


@pytest.mark.slow
def test_further_keywords_keep_their_order():
    lora, plain = twins(Modes())
    x, a, b = random(5, 4), torch.tensor(2.0), torch.tensor(3.0)
    torch.testing.assert_close(lora(x, b=b, a=a), plain(x, b=b, a=a))
    torch.testing.assert_close(lora(x, a=a, b=b), plain(x, a=a, b=b))


def test_a_call_that_the_model_refuses_leaves_nothing_behind(recwarn):
    lora, x = adapted(Chain()), torch.randn(5, 4)
    with pytest.raises(TypeError, match="unexpected keyword"):
        lora(xx=x)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        lora(torch.randn(5, 7))
    lora(x)
    assert served(lora) == ["graph"] and not recwarn.list


@pytest.mark.slow
def test_the_first_call_may_be_checkpointed_or_transformed():
    x = random(5, 4)
    lora, plain = twins(Chain())
    expected = plain(x)
    checkpoint(adapted(Chain()), x.float().requires_grad_(), use_reentrant=False).sum().backward()
    torch.testing.assert_close(torch.func.vmap(lora)(x[:, None])[:, 0], expected)
    lora._lorafx.dispatcher.clear()
    jacobian = torch.func.jacrev(lambda t: lora(t).sum(0))(x)
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda t: plain(t).sum(0))(x))
    lora._lorafx.dispatcher.clear()
    zero = {name: torch.zeros_like(p) for name, p in lora.named_parameters() if "lora_" in name}
    torch.testing.assert_close(torch.func.functional_call(lora, zero, (x,)), lora._lorafx.base(x))


@pytest.mark.slow
def test_a_base_parameter_that_the_user_trains_stays_trained():
    lora = adapted(Chain())
    lora.second.bias.requires_grad_(True)
    for x in (torch.randn(5, 4), torch.randn(1, 4), torch.randn(2, 5, 4)):
        lora.zero_grad()
        lora(x).sum().backward()
        assert lora.second.bias.grad is not None and lora.second.weight.grad is None


@pytest.mark.slow
def test_a_site_that_was_taken_away_is_named():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    lora(x)
    lora.first = nn.Linear(4, 6)
    with pytest.raises(AdapterError, match="first: replaced or taken away"):
        lora(x)
    with lora.disable_adapter():
        lora(x)
    with pytest.raises(AdapterError, match="first: replaced or taken away"):
        lora(x)
    lora.delete_adapter("default")
    assert lora(x).shape == (5, lora.second.out_features)


@pytest.mark.slow
def test_a_slice_of_a_sequential_is_plain_and_adapted():
    lora = adapted(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), target_modules=["0", "2"])
    x = torch.randn(5, 4)
    part = lora[:2]
    assert not isinstance(part, lorafx.AdaptedModel)
    torch.testing.assert_close(lora[2](part(x)), lora(x))


@pytest.mark.slow
def test_a_copy_makes_programs_of_its_own():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    before = lora(x)
    other = copy.deepcopy(lora)
    assert served(other) == [] and torch.equal(other(x), before) and served(other) == served(lora) == ["graph"]


@pytest.mark.slow
def test_a_call_that_the_model_refuses_says_nothing_about_attributes():
    class Scaled(Chain):
        scale = 1.0

        def forward(self, x):
            return super().forward(x) * self.scale

    lora, x = adapted(Scaled()), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        lora(torch.randn(5, 7))
    before = lora(x)
    lora.scale = 2.0
    torch.testing.assert_close(lora(x), 2 * before)


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("change", [parametrizations.weight_norm, weight_norm], ids=["parametrized", "with a hook"])
def test_a_weight_that_is_computed_since_is_named(change, called):
    lora, x = adapted(Chain()), torch.randn(5, 4)
    if called:
        lora(x)
    change(lora.first)
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"first: the weight that the adapter 'default' adapts is no tensor"):
            lora(x)

"""Free counters: integers that change from call to call share a graph, if that computes the same."""

import pytest
import torch
from graphs import adapted
from serving_models import Options, whys

from lorafx.serving.call_key import FREE_COUNTER, CallKey
from lorafx.serving.free_counters import changed_counters, is_counter


def test_an_integer_that_changes_is_no_longer_a_constant():
    lora, x = adapted(Options()), torch.randn(5, 4)
    base = lora._lorafx.base
    with lora.disable_adapter():
        for shift in (7, 8, 9, 10, 11):
            assert torch.equal(lora(x, shift=shift)["y"], base(x, shift=shift)["y"])
    assert len(lora.explain().calls) == 2, "7 as a constant, then any number"
    assert "shift: 7 → any" in whys(lora)[1]


@pytest.mark.slow
@torch.no_grad()
def test_an_integer_that_means_something_else_as_a_symbol_stays_a_constant(llama):
    lora, plain = llama
    ids = torch.randint(3, 50, (2, 9))
    for keep in (2, 3, 4, 2, 5):
        torch.testing.assert_close(
            lora(input_ids=ids, logits_to_keep=keep).logits, plain(input_ids=ids, logits_to_keep=keep).logits
        )


def key(*leaves, grad=True):
    return CallKey("", "structure", leaves, grad, False, (), (), 0, (), frozenset(), None, ())


def test_counters_are_integers_above_1_in_which_alone_calls_differ():
    two, three, flag, text = (int, 2), (int, 3), (bool, True), (str, "a")
    assert changed_counters(key(two, text), key(three, text)) == {0}
    assert changed_counters(key(text, two, two), key(text, three, three)) == {1, 2}
    for other in (key((int, 1), text), key(flag, text), key(three, (str, "b")), key(three, text, grad=False)):
        assert changed_counters(key(two, text), other) == frozenset()
    assert not is_counter(FREE_COUNTER) and not is_counter((int, 0)) and is_counter(two)


class Branching(Options):
    """An integer that means something else as a symbol."""

    def forward(self, x, shift=0):
        return super().forward(x, shift=shift if isinstance(shift, int) else 100)


@pytest.mark.slow
def test_an_integer_whose_type_the_model_asks_for_stays_a_constant():
    lora, x = adapted(Branching()), torch.randn(5, 4)
    base = lora._lorafx.base
    with lora.disable_adapter():
        for shift in (7, 8, 9):
            assert torch.equal(lora(x, shift=shift)["y"], base(x, shift=shift)["y"])
    assert len(lora.explain().calls) == 3 and "any" not in "".join(whys(lora))

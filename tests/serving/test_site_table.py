"""The site table: where what the adapters act on lies in a tree."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from graphs import Chain, adapted
from torch import nn

import lorafx
from lorafx.serving.before import Before
from lorafx.serving.site_table import Place, SiteTable, SiteTables

RANDOM = {"target_modules": "all-linear", "init_lora_weights": False, "r": 2}


def table(lora):
    return SiteTable.of(lora, lora._lorafx.context)


def test_a_place_gives_the_tensor_that_is_there_now():
    lora = adapted(Chain())
    place = Place.of(lora, "second.weight")
    assert place.tensor is lora.second.weight
    lora.second.weight = nn.Parameter(torch.ones(3, 6))
    assert place.tensor is lora.second.weight


def test_weights_copies_and_the_adapters_at_each():
    lora = lorafx.compile(Chain(), RANDOM | {"bias": "all"})
    lora.add_adapter("other", RANDOM | {"target_modules": ["second"]})
    lora.set_adapter(["default", "other"])
    found = table(lora)
    assert [place.path for place in found.weights] == ["first.weight", "second.weight"]
    assert [place.path for place in found.replaced] == ["second.bias"]
    assert [adapter.name for adapter, _ in found.acting["second.weight"]] == ["default", "other"]
    assert found.copies["second.bias"].tensor is lora.second.trained_bias.default.bias
    weights, replaced = found.owned["second"]
    assert [place.path for place in (*weights, *replaced)] == ["second.weight", "second.bias"]


@pytest.mark.parametrize("capture", ["sites", "auto"])
def test_a_module_of_an_adapters_that_is_replaced_is_looked_up_anew(capture):
    lora, x = lorafx.compile(Chain(), RANDOM, capture=capture), torch.linspace(-1, 2, 20).view(5, 4)
    lora.add_adapter("other", RANDOM)
    for name in ("other", "default"):
        lora.set_adapter(name)
        lora(x)
    for owner, name in ((lora.second.lora_B, "default"), (lora.second, "lora_B"), (lora.first.lora_A, "default")):
        before = lora(x)
        new = copy.deepcopy(getattr(owner, name))
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.mul_(-3).sub_(1)
        setattr(owner, name, new)
        assert not torch.allclose(lora(x), before)
        torch.testing.assert_close(lora(x), copy.deepcopy(lora)(x))
    new = lora.first.lora_A.default.weight
    lora.set_adapter("other")
    assert not new.requires_grad
    lora.set_adapter("default")
    assert new.requires_grad


class ByHand(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


def test_layers_are_plain_whatever_their_forward_and_modules_that_read_several_weights_are_not():
    assert table(adapted(Chain())).is_plain
    model = nn.Sequential(nn.Linear(4, 6), ByHand(6, 3), nn.MultiheadAttention(4, 2))
    assert table(lorafx.compile(model, RANDOM | {"target_modules": ["0", "1"]})).is_plain
    other = nn.Sequential(nn.Linear(4, 6), nn.MultiheadAttention(4, 2))
    assert not table(lorafx.compile(other, RANDOM | {"target_modules": ["0", "1"]})).is_plain


def test_tables_are_kept_by_layout_and_adapters():
    lora, tables = lorafx.compile(Chain(), RANDOM), SiteTables()
    first = tables.of(lora, lora._lorafx.context, 0)
    assert tables.of(lora, lora._lorafx.context, 0) is first
    assert tables.of(lora, lora._lorafx.context, 1) is not first
    lora.add_adapter("other", RANDOM)
    lora.set_adapter("other")
    assert tables.of(lora, lora._lorafx.context, 0) is not first
    for layout in range(40):
        tables.of(lora, lora._lorafx.context, layout)
    assert len(tables._kept) < 40


def of_second(acting="other", **changes):
    """The table of a second adapter after the first has had a call, and what the first's has taught."""
    lora = lorafx.compile(Chain(), RANDOM | {"bias": "all"}, capture="sites")
    lora.add_adapter("other", RANDOM | {"bias": "all"} | changes)
    x = torch.randn(5, 4)
    lora(x)
    tables = lora._lorafx.dispatcher.by_sites.tables._kept
    (first,) = tables.values()
    lora.set_adapter(acting)
    lora(x)
    return lora, first, list(tables.values())[1]


def test_adapters_of_one_form_share_all_but_their_names():
    lora, first, second = of_second()
    assert (
        second.weights is first.weights
        and second.looked_at is first.looked_at
        and list(first.looked_at.values()) == [2]
    )
    assert second.own_reads is first.own_reads and second.reads.keys() == first.reads.keys()
    assert second.copies["second.bias"].tensor is lora.second.trained_bias.other.bias
    for read in (read for reads in second.reads.values() for read in reads):
        (evaluation,) = read.evaluations
        assert evaluation.equation.adapter.name == "other"
        assert all(".other" in place.path for _, place, _ in evaluation.places)


def test_no_call_of_a_second_adapter_of_a_form_takes_note_of_what_it_may_change(monkeypatch):
    """By then the model's Python is known to run the sites to the end, whatever the adapter is called."""
    lora, x, noted = lorafx.compile(Chain(), RANDOM, capture="sites"), torch.randn(5, 4), []
    monkeypatch.setattr(
        Before, "of", classmethod(lambda cls, *_, of=Before.of: noted.append(lora.active_adapters) or of(*_))
    )
    lora.add_adapter("other", RANDOM)
    for name in ("default", "default", "default", "other", "other"):
        lora.set_adapter(name)
        lora(x)
    assert noted == [["default"], ["default"]]


@pytest.mark.parametrize(
    "changes",
    [
        *({"r": 3}, {"lora_alpha": 5}, {"target_modules": ["first"]}, {"bias": "none"}),
        {"acting": ["default", "other"], "bias": "none"},
    ],
    ids=str,
)
def test_adapters_of_another_form_share_nothing(changes):
    _, first, second = of_second(**changes)
    assert second.weights is not first.weights and second.looked_at is not first.looked_at


def test_a_form_says_which_adapters_are_merged_and_whether_rows_choose():
    lora = adapted(Chain())
    context, found = lora._lorafx.context, table(lora)
    assert found.is_like(context)
    assert not found.is_like(replace(context, merged=frozenset({"default"})))
    assert not found.is_like(replace(context, numbers=(1,)))


def test_a_second_adapter_of_a_form_keeps_nothing_of_the_first():
    lora, _, _ = of_second()
    parameter = weakref.ref(lora.first.lora_A.default.weight)
    lora.delete_adapter("default")
    gc.collect()
    assert parameter() is None and torch.isfinite(lora(torch.randn(5, 4))).all()


def test_what_is_not_asked_of_its_class_is_looked_at_for_a_second_adapter_too():
    """Functions that hide a weight are known by the first adapter's call: the second's must not be the base's."""

    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.other = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x):
            with torch._C.DisableTorchFunctionSubclass():
                return self.other(x) + nn.functional.linear(x, self.linear.weight)

    lora, x = lorafx.compile(Hiding(), RANDOM, capture="sites"), torch.randn(5, 4)
    lora.add_adapter("other", RANDOM)
    found = []
    for name in ("default", "default", "other", "other"):
        lora.set_adapter(name)
        found.append(lora(x) - lora.linear(x) - lora.other(x) + lora.linear.bias)
    for difference in found:
        torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-6)

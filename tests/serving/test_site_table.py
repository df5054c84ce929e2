"""The site table: where what the adapters act on lies in a tree."""

import torch
from graphs import Chain, adapted
from torch import nn

import lorafx
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


class ByHand(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


def test_a_module_that_reads_its_weight_in_a_way_of_its_own_is_not_plain():
    assert table(adapted(Chain())).is_plain
    model = nn.Sequential(nn.Linear(4, 6), ByHand(6, 3))
    assert not table(lorafx.compile(model, RANDOM)).is_plain
    assert table(lorafx.compile(model, RANDOM | {"target_modules": ["0"]})).is_plain


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

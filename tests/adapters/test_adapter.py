"""An adapter: where its tensors hang, its parts, and two of a module's weights adapted side by side."""

import pytest
import torch
from graphs import Chain, adapted
from modules import Stack
from torch import nn

import lorafx
from lorafx.adapters import readings, storages
from lorafx.adapters.readings import LINEAR, Reading
from lorafx.adapters.storages import Dense
from lorafx.errors import AdapterError
from lorafx.tree.attached import attach

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class Pair(nn.Module):
    """(…, 5) -> (…, 4): two weights in one module, under names of its own."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(4, 7))

    def forward(self, x):
        return nn.functional.linear(torch.tanh(nn.functional.linear(x, self.up)), self.down)


class DensePair(Dense):
    """The two weights of a `Pair`."""

    def weights(self, module):
        if isinstance(module, Pair):
            yield from (("up", LINEAR), ("down", LINEAR))


@pytest.fixture
def pair():
    storage = storages.register(DensePair())
    yield nn.Sequential(Pair(), nn.Linear(4, 3)).double()
    storages.STORAGES.remove(storage)


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_two_weights_of_a_module_are_two_sites(pair, capture, tmp_path):
    x, layer = torch.randn(6, 5, dtype=torch.float64), pair[0]
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False}
    lora = lorafx.compile(pair, config, capture=capture)
    assert [site.name for site in lora.sites] == ["0.up", "0.down"]
    assert [tuple(p.shape) for n, p in lora.named_parameters() if "lora_A" in n] == [(2, 5), (2, 7)]
    up, down = (
        3
        * lora.get_parameter(f"0.{name}_lora_B.default.weight")
        @ lora.get_parameter(f"0.{name}_lora_A.default.weight")
        for name in ("up", "down")
    )
    expected = pair[1](torch.tanh(x @ (layer.up + up).T) @ (layer.down + down).T)
    torch.testing.assert_close(lora(x), expected, **CLOSE)
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    lora.merge_adapter()
    torch.testing.assert_close(pair(x), expected, **CLOSE)
    lora.unmerge_adapter()
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.state_dict().items())
    lora.save_pretrained(tmp_path)
    torch.testing.assert_close(lorafx.load(lora.unload(), tmp_path, capture=capture)(x), expected, **CLOSE)


def test_the_first_reading_and_the_first_storage_that_fit_count():
    class Own(nn.Linear):
        pass

    class Twin(Dense):
        pass

    reading, storage = readings.register(Reading("own", (Own,), LINEAR.operators)), storages.register(Twin())
    try:
        assert list(storages.weights_of(Own(4, 3))) == [("weight", reading, storage)]
        assert list(storages.weights_of(nn.Linear(4, 3))) == [("weight", LINEAR, storage)]
    finally:
        readings.READINGS.remove(reading)
        storages.STORAGES.remove(storage)


def test_the_part_below_a_layer_has_the_layers_names():
    lora = adapted(Stack(depth=2), target_modules=["up", "head"])
    lora.set_scale("default", 0.5)
    adapter = lora._lorafx.adapters["default"]
    inner = adapter.relative_to("layers.1")
    assert [site.name for site in inner.selection] == ["up"]
    expected = {"up.lora_A.default.weight", "up.lora_B.default.weight", "up.adapter_scaling.default"}
    assert set(inner.paths) == expected
    assert adapter.relative_to("head") is None, "the module itself is adapted: what hangs there is not below it"
    assert not adapter.relative_to("layers.1.down").selection
    one = adapter.restricted_to(["layers.0.up.weight"], [])
    assert [site.name for site in one.selection] == ["layers.0.up"] and list(one.scales) == ["layers.0.up"]


def test_there_is_no_part_below_a_layer_whose_copies_hang_above_it():
    lora = adapted(nn.ModuleDict({"stack": Stack(depth=2)}), target_modules=["head"], modules_to_save=["layers"])
    assert lora._lorafx.adapters["default"].relative_to("stack.layers.0") is None


def test_a_failure_half_way_hangs_nothing_in(monkeypatch):
    lora, calls = adapted(Chain()), []

    def failing(*args, **how):
        calls.append(args)
        return attach(*args, **how) if len(calls) < 3 else 1 / 0

    before = dict(lora.named_parameters()).keys()
    monkeypatch.setattr("lorafx.adapters.building.attach", failing)
    with pytest.raises(ZeroDivisionError):
        lora.add_adapter("other", {"target_modules": "all-linear"})
    assert dict(lora.named_parameters()).keys() == before and list(lora.peft_config) == ["default"]


def test_layers_are_of_one_form_if_their_equations_and_tensors_are():
    lora = adapted(Stack(depth=3), target_modules=["up"], rank_pattern={"layers.2.up": 1})
    adapter = lora._lorafx.adapters["default"]
    forms = [adapter.relative_to(f"layers.{i}").signature(lora.get_submodule(f"layers.{i}")) for i in range(3)]
    assert forms[0] == forms[1] != forms[2]
    lora.layers[1].up.eval()
    assert adapter.relative_to("layers.1").signature(lora.layers[1]) != forms[0], "dropout depends on the mode"


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["0"]}, {"target_modules": ["1"], "modules_to_save": ["0"]}],
    ids=["adapted", "saved"],
)
def test_an_adapter_of_what_was_replaced_or_resized_since_is_refused_by_name(config, tmp_path):
    for change, message in ((_resize, "0.weight: of another size"), (_replace, "0.*: replaced or taken away")):
        lora = lorafx.compile(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), config)
        lora(torch.tensor([4]))
        change(lora)
        with pytest.raises(AdapterError, match=message):
            lora(torch.tensor([6]))
        with pytest.raises(AdapterError, match=message):
            lora.merge_adapter()
        with pytest.raises(AdapterError, match=message):
            lora.save_pretrained(tmp_path)
        assert not any(tmp_path.iterdir())
        lora.delete_adapter("default")
        assert lora(torch.tensor([6])).shape == (1, 2)


def _resize(model):
    """What transformers does to embeddings."""
    model[0].weight = nn.Parameter(torch.zeros(7, 3))


def _replace(model):
    """What transformers does to heads."""
    model[0] = nn.Embedding(7, 3)

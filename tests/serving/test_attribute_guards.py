"""Attribute guards: what modules and configs hold is read as the model's own Python would read it."""

from types import SimpleNamespace

import pytest
import torch
from graphs import Chain, adapted
from modules import cases, ids, tiny_llama
from serving_models import random, served, twins
from torch import nn

import lorafx
from lorafx.serving.attribute_guards import AttributeGuards


class Node:
    """A config of somebody's own."""

    def __init__(self):
        self.offset = 0.0


class Attributes(Chain):
    """A model whose forward reads attributes of many sorts, its own and inner modules'."""

    def __init__(self):
        super().__init__()
        self.scale, self.shifts, self.options = 1.0, [0.5, 1.5], {"power": 1}
        self.cfg = SimpleNamespace(inner=SimpleNamespace(flag=False))
        self.node, self.used_in_training = Node(), ["a list"]
        self.drop = nn.Dropout(0.5)
        self.drop.tag = "a"
        self.register_buffer("mask", torch.ones(3))

    def forward(self, x):
        y = super().forward(x) * self.scale + sum(self.shifts)
        y = self.drop(y ** self.options["power"]) * self.mask.sum()
        return y + (1 if self.cfg.inner.flag else 0) + len(self.drop.tag) + self.node.offset


CHANGES = {
    "a float": lambda m: setattr(m, "scale", 100.0),
    "a list": lambda m: m.shifts.append(3.0),
    "a dict": lambda m: m.options.update(power=2),
    "a config of somebody's own": lambda m: setattr(m.node, "offset", 3.0),
    "a nested config": lambda m: setattr(m.cfg.inner, "flag", True),
    "a string of an inner module": lambda m: setattr(m.drop, "tag", "longer"),
    "a buffer's shape": lambda m: setattr(m, "mask", torch.ones(5)),
    "a forward": lambda m: setattr(m.drop, "forward", lambda y: y + 7),
    "a new attribute": lambda m: setattr(m.drop, "forward", torch.neg),
    "a module": lambda m: setattr(m, "drop", Tagged()),
}


class Tagged(nn.Tanh):
    tag = "class"


QUICK = ["a float", "a buffer's shape"]


@pytest.mark.parametrize("change", cases(CHANGES, quick=QUICK))
def test_a_change_of_what_modules_hold_is_seen(change):
    lora, plain = twins(Attributes())
    x = random(5, 4)
    for model in (lora, plain):
        model.eval()
        model(x)
        CHANGES[change](model)
    torch.testing.assert_close(lora(x), plain(x))
    assert served(lora) == ["graph", "graph"]


@pytest.mark.slow
def test_dropout_that_is_switched_off_drops_nothing():
    lora, x = adapted(Attributes()), torch.randn(64, 4)
    lora(x)
    lora.drop.p = 0.0
    assert torch.equal(lora(x), lora(x))


@pytest.mark.slow
def test_it_says_which_attribute_changed():
    lora, x = adapted(Attributes()), torch.randn(5, 4)
    lora(x)
    lora.scale = 2.0
    lora.cfg.inner.flag = True
    lora(x)
    assert set(lora.explain().calls[-1].why.split("; ")) == {"the attribute scale", "the attribute cfg.inner.flag"}


@pytest.mark.slow
def test_an_attribute_that_keeps_changing_is_left_to_the_models_python():
    lora, plain = twins(Attributes())
    x = random(5, 4)
    for step in range(9):
        for model in (lora.eval(), plain.eval()):
            model.scale = step / 2
        torch.testing.assert_close(lora(x), plain(x))
    assert served(lora).count("graph") == 5 and served(lora)[-1] == "sites"
    assert "the attribute scale keeps changing" in lora.explain().calls[-1].reason


class Listing(dict):
    """A dict whose values come as a list, as they were when asked for."""

    def values(self):
        return list(super().values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", cases([dict, Listing], quick=[dict]))
def test_a_setting_within_a_container_is_no_constant(kind):
    class Scaled(Chain):
        def forward(self, x):
            return super().forward(x) * self.settings["scale"]

    base = Scaled()
    base.settings = kind(scale=1.0)
    lora, x = adapted(base), torch.randn(5, 4)
    once = lora(x)
    lora.settings["scale"] = 3.0
    torch.testing.assert_close(lora(x), once * 3)


class Plain(Chain):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.factor = torch.ones(3)

    def forward(self, x):
        return super().forward(x) * self.factor.sum()


def test_a_plain_tensor_of_the_root_is_read_when_the_graph_runs():
    lora, x = adapted(Plain()), torch.randn(5, 4)
    before = lora(x)
    lora.factor = 2 * torch.ones(3)
    torch.testing.assert_close(lora(x), 2 * before)
    assert served(lora) == ["graph"]


class Counting(Chain):
    """A model that counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.slow
def test_states_that_were_long_ago_are_forgotten():
    lora, x = adapted(Counting()), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="it changes calls"):
        lora(x)
    for _ in range(300):
        lora(x)
    guards = lora._lorafx.dispatcher.keys.tree._attributes
    assert len(guards._states) <= 256 and lora.calls == 301 and served(lora) == ["sites", "sites"]


def test_equal_states_are_one_object_and_others_say_in_what_they_differ():
    model, guards = Attributes(), AttributeGuards()
    guards.watch(model, model.named_modules())
    before, training = guards.state()
    model.scale, model.cfg.inner.flag = 2.0, True
    after, _ = guards.state()
    assert sorted(after.differences(before)) == sorted(before.differences(after)) == ["cfg.inner.flag", "scale"]
    model.scale, model.cfg.inner.flag = 1.0, False
    assert guards.state()[0] is before and training == (True,) * len(list(model.modules()))
    model.drop.eval()
    assert guards.state()[0] is before and guards.state()[1].count(False) == 1, "a mode is no part of it"
    model.another = 1
    assert guards.state() is None


def test_a_variable_that_is_watched_since_makes_no_difference(monkeypatch):
    monkeypatch.setenv("LORAFX_TEST", "1")
    model, guards = Attributes(), AttributeGuards()
    guards.watch(model, model.named_modules())
    before, _ = guards.state()
    guards.watch(model, model.named_modules(), ["LORAFX_TEST"])
    watched, _ = guards.state()
    assert not [*watched.differences(before), *before.differences(watched)]
    monkeypatch.setenv("LORAFX_TEST", "2")
    assert [*guards.state()[0].differences(watched)] == ["os.environ['LORAFX_TEST']"]


SETTINGS = {"scale": 1.0, "shift": torch.zeros(3)}


def scaled(x):
    return x * SETTINGS["scale"] + SETTINGS["shift"]


class Remote(Chain):
    """A model that computes with values which others hold."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        bias = [0.0]
        self.bias, self.add = bias, lambda x: x + bias[0]

    def forward(self, x):
        return scaled(self.add(super().forward(x))) * type(self).factor


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda patch, models: patch.setitem(SETTINGS, "scale", 3.0),
        lambda patch, models: patch.setitem(SETTINGS, "shift", torch.ones(3)),
        lambda patch, models: patch.setattr(Remote, "factor", 3.0),
        lambda patch, models: [model.bias.__setitem__(0, 2.0) for model in models],
    ],
    ids=["a helper's global", "a global tensor", "a class's attribute", "a variable that a function closes over"],
)
def test_a_change_of_what_others_hold_is_seen(change, monkeypatch):
    lora, plain = twins(Remote())
    x = random(5, 4)
    for model in (lora, plain):
        model(x)
    change(monkeypatch, (lora, plain))
    torch.testing.assert_close(lora(x), plain(x))
    assert served(lora) == ["graph", "graph"]


@pytest.mark.slow
def test_a_librarys_layer_that_is_patched_after_a_graph_was_made_is_seen(monkeypatch):
    base = tiny_llama(num_hidden_layers=1).eval()
    lora, layer = lorafx.compile(base, {"r": 2, "target_modules": ["q_proj"]}), type(base.model.layers[0].mlp)
    plain, tokens = layer.forward, ids(2, 5)
    expected = lora(input_ids=tokens).logits
    monkeypatch.setattr(layer, "forward", lambda self, x: 2 * plain(self, x))
    patched = lora(input_ids=tokens).logits
    assert not torch.allclose(patched, expected)
    torch.testing.assert_close(patched, base(input_ids=tokens).logits)
    assert served(lora) == ["graph", "graph"]

"""The state of a tree: modules, modes, dtypes, devices and hooks that change are seen in the next call."""

import gc
import weakref

import pytest
import torch
from graphs import Chain, adapted
from modules import cases
from serving_models import random, served, twins
from torch import nn

from lorafx.serving.tree_state import TreeGuards


def test_what_changes_in_the_tree_is_seen():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    lora(x)
    lora.second.eval()
    lora(x)
    lora.double()
    assert lora(x.double()).dtype == torch.float64
    lora.second.weight.requires_grad_(False)
    number = len(lora.explain().calls)
    lora.train()
    lora.float()
    lora(x)
    assert number == 3 and len(lora.explain().calls) == 3 and lora.explain().calls[-1].hits == 1


def test_a_module_on_another_device_is_another_layout():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(9)))
    guards, seen = TreeGuards(), set()
    for moved in range(9):
        seen.add(guards.state(model).layout)
        model[moved].to("meta")
    assert len(seen) == 9


class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype)).float()
        return x


@pytest.mark.slow
def test_a_cast_of_a_module_in_the_middle_is_seen():
    lora, plain = twins(Casting(), target_modules=["0", "1", "2", "3"])
    x = random(5, 4)
    lora(x)
    lora.layers[1].double()
    plain.layers[1].double()
    torch.testing.assert_close(lora(x), plain(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", cases(["full backward", "full backward pre", "global"], quick=["full backward"]))
def test_every_hook_is_called(kind):
    lora, x, calls = adapted(Chain()), torch.randn(5, 4), []
    lora(x).sum().backward()

    def hook(module, *args):
        calls.append(module)

    register = {
        "full backward": lora.first.register_full_backward_hook,
        "full backward pre": lora.first.register_full_backward_pre_hook,
        "global": nn.modules.module.register_module_forward_hook,
    }[kind]
    handle = register(hook)
    lora(x).sum().backward()
    handle.remove()
    assert any(module is lora.first for module in calls)
    before = len(calls)
    lora(x).sum().backward()
    assert len(calls) == before and served(lora)[-1] == "graph", "the graph that was kept serves again"


@pytest.mark.slow
def test_a_librarys_hook_that_comes_and_goes_acts_meanwhile():
    def noise(module, args, output):
        return output + 10

    noise.__module__ = "transformers.integrations.neftune"
    lora, x = adapted(Chain()).eval(), torch.randn(5, 4)
    before = lora(x)
    handle = lora.second.register_forward_hook(noise)
    torch.testing.assert_close(lora(x), before + 10)
    handle.remove()
    assert torch.equal(lora(x), before)


@pytest.mark.slow
def test_a_hook_that_came_and_went_leaves_nothing_behind():
    lora = adapted(Chain())
    handle = lora.first.register_forward_hook(lambda *args: None)
    lora(torch.randn(5, 4))
    handle.remove()
    lora(torch.randn(2, 5, 4))
    assert served(lora) == ["sites", "graph"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["first", "first.lora_A.default", "everywhere"])
def test_hooks_registered_anew_in_each_step_cost_nothing_and_are_not_kept(where):
    lora, x, sizes, dead = adapted(Chain()), torch.randn(5, 4), [], []
    everywhere = nn.modules.module.register_module_forward_hook
    register = everywhere if where == "everywhere" else lora.get_submodule(where).register_forward_hook
    for _ in range(6):
        seen = Seen()
        handle = register(lambda module, args, output, seen=seen: seen.append(type(module)))
        try:
            lora(x).sum().backward()
        finally:
            handle.remove()
        assert seen == (
            [nn.Linear, nn.Linear, type(lora)] if where == "everywhere" else [type(lora.get_submodule(where))]
        )
        dead.append(weakref.ref(seen))
        explained, layouts = lora.explain(), lora._lorafx.dispatcher.keys.tree._layouts
        sizes.append((explained.operators, len(explained.calls), len(layouts)))
        del seen
    lora(x)
    gc.collect()
    assert sizes[1] == sizes[-1] and not any(ref() for ref in dead)


class Seen(list):
    """A list that a weak reference can point to."""


def test_layouts_are_numbered_anew_and_few_are_remembered():
    model, guards, numbers = Chain(), TreeGuards(), set()
    for _ in range(300):
        model.second = nn.Linear(6, 3)
        numbers.add(guards.state(model).layout)
    assert len(numbers) == 300 and len(guards._layouts) == 256


def test_a_snapshot_is_the_same_until_something_changes():
    model = Chain()
    guards = TreeGuards()
    before = guards.state(model)
    assert guards.state(model) is before and not (before.hooked or before.sharded)
    handle = model.first.register_forward_hook(lambda *_: None)
    assert guards.state(model).hooked and not before.hooked and guards.state(model).layout != before.layout
    handle.remove()
    assert guards.state(model) == before
    model.scale = 2.0
    after = guards.state(model)
    assert after.layout == before.layout and list(after.attributes.differences(before.attributes)) == ["scale"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.second.eval(),
        lambda m: m.second.half(),
        lambda m: m.second.to("meta"),
        lambda m: setattr(m.second, "bias", None),
        lambda m: setattr(m.second, "weight", nn.Parameter(torch.zeros(7, 7))),
        lambda m: setattr(m, "second", nn.Linear(6, 3)),
        lambda m: m.add_module("third", nn.Identity()),
    ],
    ids=["mode", "dtype", "device", "no tensor", "shape", "module", "another module"],
)
def test_what_operators_depend_on_is_part_of_the_layout(change):
    model, guards = Chain(), TreeGuards()
    before = guards.state(model).layout
    change(model)
    assert guards.state(model).layout != before

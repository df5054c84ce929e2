"""What trains: the active adapters, and what the user trains of the base besides; buffers never do."""

import copy

import pytest
import torch
from graphs import Chain
from modules import cases
from torch import nn

import lorafx

CONFIG = {"r": 2, "lora_alpha": 6, "target_modules": ["first", "second"], "init_lora_weights": False}


def within_disabled(lora):
    with lora.disable_adapter():
        assert lora.second.bias.requires_grad and not lora.get_parameter("first.lora_A.default.weight").requires_grad


@pytest.mark.parametrize(
    "change",
    [
        lambda lora: lora.add_adapter("other", CONFIG),
        lambda lora: (lora.add_adapter("other", CONFIG), lora.set_adapter("other"), lora.delete_adapter("other")),
        lambda lora: lora.set_adapter("default"),
        lambda lora: (lora.merge_adapter(), lora.unmerge_adapter()),
        within_disabled,
    ],
    ids=["add", "delete", "set", "merge", "disable"],
)
def test_what_the_user_trains_of_the_base_goes_on_training(change):
    lora = lorafx.compile(Chain(), CONFIG)
    assert not any(p.requires_grad for name, p in lora.named_parameters() if "lora" not in name)
    lora.second.bias.requires_grad_(True)
    change(lora)
    assert lora.second.bias.requires_grad and not lora.second.weight.requires_grad
    assert lora.get_parameter("first.lora_A.default.weight").requires_grad


def test_inactive_adapters_do_not_train():
    lora = lorafx.compile(Chain(), CONFIG)
    lora.add_adapter("other", CONFIG)
    for active, idle in (("default", "other"), ("other", "default")):
        lora.set_adapter(active)
        assert lora.get_parameter(f"first.lora_A.{active}.weight").requires_grad
        assert not lora.get_parameter(f"first.lora_A.{idle}.weight").requires_grad


class Counts(nn.Module):
    """A norm, a buffer that is added to and one that is read as a number."""

    def __init__(self, momentum):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, momentum=momentum)
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.norm(x) * self.weight


class Net(nn.Module):
    def __init__(self, momentum):
        super().__init__()
        self.body, self.tail = nn.Linear(6, 4), Counts(momentum)

    def forward(self, x):
        return self.tail(self.body(x))


@pytest.mark.slow
@pytest.mark.parametrize("capture", cases(["auto", "sites"], quick=["sites"]))
@pytest.mark.parametrize("momentum", cases([0.1, None], quick=[None]))
def test_buffers_of_saved_modules_are_buffers_that_change_as_in_the_plain_model(capture, momentum, tmp_path):
    base = Net(momentum)
    plain, before = copy.deepcopy(base).train(), copy.deepcopy(base.state_dict())
    config = {"r": 2, "target_modules": ["body"], "modules_to_save": ["tail"]}
    lora = lorafx.compile(base, config, capture=capture).train()
    for _ in range(3):
        x = torch.randn(8, 6) * 2 + 1
        found, expected = lora(x), plain(x)
        torch.testing.assert_close(found, expected)
        found.sum().backward()
    adapter = lora._lorafx.adapters["default"]
    buffers = dict(plain.named_buffers())
    copies = {base: lora.get_buffer(path) for base, path in adapter.replaced.items() if base in buffers}
    assert set(copies) == set(buffers) and not any(each.requires_grad for each in copies.values())
    for name, value in buffers.items():
        torch.testing.assert_close(copies[name], value)
        assert torch.equal(base.get_buffer(name), before[name]), "the base's own stay as they are"
    assert set(map(id, copies.values())) <= set(map(id, lora.state_dict(keep_vars=True).values()))
    lora.eval(), plain.eval()
    torch.testing.assert_close(lora(x), plain(x))
    lora.save_pretrained(tmp_path)
    fresh = Net(momentum)
    fresh.load_state_dict(before)
    torch.testing.assert_close(lorafx.load(fresh, tmp_path)(x), plain(x))


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_the_base_comes_back_in_the_mode_that_it_was_used_in(leave):
    base = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    lora = lorafx.compile(base, {"r": 2, "target_modules": ["0", "2"]}).eval()
    lora[2].train()
    assert getattr(lora, leave)() is base
    assert [module.training for module in (base, *base)] == [False, False, False, True]

"""AdaLoRA: its equation in every use, its penalty, its allocation in training, and what files leave out."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput
from uses import Layers, Pair, hold, of_layers, randomize

import lorafx
from lorafx.errors import AdapterError, ConfigError

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
SCHEDULE = {"init_r": 4, "target_r": 2, "total_step": 10}


class WithLoss(nn.Module):
    """A model whose result has a `loss`."""

    def __init__(self):
        super().__init__()
        self.net = Pair()

    def forward(self, x):
        out = self.net(x)
        return SequenceClassifierOutput(loss=out.square().mean(), logits=out)


def config(**fields):
    return lorafx.AdaLoraConfig(**SCHEDULE | {"lora_alpha": 3, "target_modules": ["up", "down"]} | fields)


def adapted(layer, x):
    a, e, b = layer.lora_A.default, layer.lora_E.default, layer.lora_B.default
    return x @ (layer.weight + 3 / (4 + 1e-5) * b @ (e * a)).T + layer.bias


def distance(model) -> torch.Tensor:
    found = []
    for layer in (model.net.up, model.net.down):
        a, b = layer.lora_A.default, layer.lora_B.default
        found += [(a @ a.T - torch.eye(4, dtype=a.dtype)).norm(), (b.T @ b - torch.eye(4, dtype=b.dtype)).norm()]
    return sum(found) / 4


@pytest.mark.slow
def test_its_equation_holds_in_every_use(tmp_path):
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    hold(lambda: Layers(Pair).double(), config(), x, of_layers(adapted), tmp_path)


def test_a_convolution_has_it_too():
    model = nn.Sequential(nn.Conv1d(6, 3, 2, stride=2, padding=1)).double()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    lora = lorafx.compile(model, config(target_modules=["0"]), capture="sites")
    torch.testing.assert_close(lora(x), model(x), **CLOSE)
    randomize(lora)
    delta = (lora[0].lora_B.default @ (lora[0].lora_A.default * lora[0].lora_E.default)) * 3 / (4 + 1e-5)
    expected = F.conv1d(x, model[0].weight + delta.view(3, 6, 2), model[0].bias, 2, 1)
    torch.testing.assert_close(lora(x), expected, **CLOSE)
    lora.merge_adapter()
    torch.testing.assert_close(model(x), expected, **CLOSE)


@pytest.mark.parametrize("capture", [pytest.param("graph", marks=pytest.mark.slow), "auto", "sites"])
def test_a_loss_has_the_penalty_while_the_adapter_acts_and_trains(capture: str):
    lora, x = lorafx.compile(WithLoss().double(), config(), capture=capture), torch.randn(3, 5, dtype=torch.float64)
    randomize(lora)
    found = lora(x)
    torch.testing.assert_close(found.loss, found.logits.square().mean() + 0.5 * distance(lora), **CLOSE)
    assert found["loss"] is found.loss  # as trainers read it
    given = torch.autograd.grad(found.logits.square().mean() + 0.5 * distance(lora), lora.net.up.lora_B.default)
    lora(x).loss.backward()
    torch.testing.assert_close(lora.net.up.lora_B.default.grad, given[0], **CLOSE)

    def has_none() -> bool:
        result = lora(x)
        return torch.equal(result.loss, result.logits.square().mean())

    with lora.disable_adapter():
        assert has_none()
    lora.merge_adapter()
    assert has_none()
    lora.unmerge_adapter()
    lora.set_adapter("default", inference_mode=True)
    assert has_none()


def test_rows_add_the_penalties_of_the_adapters_that_they_choose():
    lora, x = lorafx.compile(WithLoss().double(), config(), capture="sites"), torch.randn(3, 5, dtype=torch.float64)
    randomize(lora)
    lora.add_adapter("lora", lorafx.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    found = lora(x, adapter_names=["default", "lora", "__base__"])
    torch.testing.assert_close(found.loss, found.logits.square().mean() + 0.5 * distance(lora), **CLOSE)
    torch.testing.assert_close(found.logits[:1], lora(x[:1]).logits, **CLOSE)
    plain = lora(x, adapter_names=["lora", "lora", "__base__"])
    assert torch.equal(plain.loss, plain.logits.square().mean())


def steps(lora, count: int, after: Callable[[int], None] = lambda step: None) -> None:
    optimizer, x = torch.optim.SGD(lora.parameters(), 0.1), torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)
    for step in range(count):
        lora(x).loss.backward()
        optimizer.step()
        lora.update_and_allocate(step)
        after(step)
        optimizer.zero_grad()


def left(lora) -> int:
    return sum(int((layer.lora_E.default != 0).sum()) for layer in (lora.net.up, lora.net.down))


def test_training_leaves_as_many_directions_as_the_schedule_says_by_one_graph():
    lora, budgets = lorafx.compile(WithLoss().double(), config(tinit=2, tfinal=3), capture="graph"), []
    randomize(lora)
    steps(lora, 10, lambda step: budgets.append(left(lora)))
    by_schedule = [int(4 * (1 - (step - 2) / 5) ** 3 + 4) for step in range(3, 8)]
    assert budgets == [8, 8, 8, *by_schedule, 4, 4]
    assert sum(map(sum, lora.peft_config["default"].rank_pattern.values())) == 4
    assert len(lora.explain().calls) == 1


@pytest.mark.slow
def test_thirty_steps_are_pefts():
    """Losses to rounding in float64, and the same directions after each step. PEFT starts with the same values.

    Its penalty is in the loss of `base_model`; a `PeftModel` of no task type goes past that.
    """
    peft = pytest.importorskip("peft")
    fields = {"init_r": 6, "target_r": 2, "tinit": 4, "tfinal": 5, "deltaT": 2, "total_step": 28, "lora_alpha": 8}
    fields |= {"target_modules": ["up", "down"], "orth_reg_weight": 0.3}
    base = WithLoss().double()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.AdaLoraConfig(**fields))
    ours = lorafx.compile(base, peft.AdaLoraConfig(**fields), capture="graph")
    named = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    wanted = {name: theirs.get_parameter(f"base_model.model.{name}") for name in named}
    for name, parameter in named.items():
        parameter.data.copy_(wanted[name])
    optimizers = [torch.optim.Adam(p.values(), 0.02) for p in (named, wanted)]
    x = torch.randn(7, 5, dtype=torch.float64)
    for step in range(30):
        losses, patterns = [], []
        for model, optimizer in zip((ours, theirs), optimizers):
            losses.append(model.base_model(x).loss)
            losses[-1].backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            pattern = model.peft_config["default"].rank_pattern or {}
            patterns.append({name.removesuffix(".default"): mask for name, mask in pattern.items()})
        torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
        assert patterns[0] == patterns[1], step
    assert sum(map(sum, patterns[0].values())) == 4


def what_is_left(lora, pattern):
    """The rows of each A, and of each Bᵀ, that a file has."""
    for name in ("up", "down"):
        layer, kept = getattr(lora.net, name), torch.tensor(pattern[f"net.{name}.lora_E"])
        assert not layer.lora_A.default[~kept].any(), "room for what the file leaves out"
        yield from (layer.lora_A.default[kept], layer.lora_B.default.mT[kept])


def test_files_leave_out_what_is_zero_and_give_it_back(tmp_path):
    lora, x = lorafx.compile(WithLoss().double(), config(tfinal=2), capture="sites"), torch.randn(3, 5).double()
    randomize(lora)
    steps(lora, 9)
    lora.save_pretrained(tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert {*pattern} == {"net.up.lora_E", "net.down.lora_E"} and sum(map(sum, pattern.values())) == 4
    again = lorafx.load(lora._lorafx.base, tmp_path, is_trainable=True, capture="sites")
    torch.testing.assert_close(again(x).logits, lora(x).logits, rtol=0, atol=0)
    penalty = sum((p @ p.mT - torch.eye(len(p), dtype=p.dtype)).norm() for p in what_is_left(again, pattern)) / 4
    result = again(x)
    torch.testing.assert_close(result.loss, result.logits.square().mean() + 0.5 * penalty, **CLOSE)

    # A number that training has moved away from zero since is written, too.
    with torch.no_grad():
        lora.net.up.lora_E.default[:, 0] += 1
    lora.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]["net.up.lora_E"] == [True] * 4
    again.load_adapter(tmp_path, "default", is_trainable=True)  # as a trainer that resumes does
    torch.testing.assert_close(again(x).logits, lora(x).logits, rtol=0, atol=0)
    assert again.peft_config["default"].rank_pattern["net.up.lora_E"] == [True] * 4


def test_what_it_cannot_serve_is_refused():
    for fields, words in (
        ({"total_step": None}, "total_step"),
        ({"tinit": 8, "tfinal": 2}, "leave none of `total_step`=10"),
        ({"use_dora": True}, "AdaLoRA has no `use_dora`"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"rank_pattern": {"up": 3}}, "rank_pattern"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(**fields)
    with pytest.raises(ConfigError, match="0 is an embedding, for which there is no AdaLoRA"):
        lorafx.compile(nn.Sequential(nn.Embedding(5, 4)), config(target_modules=["0"]))
    with pytest.warns(UserWarning, match="'r', 'use_rslora': of no effect in AdaLoRA"):
        lorafx.compile(Pair(), config(r=3, use_rslora=True))
    lora = lorafx.compile(Pair(), lorafx.LoraConfig(r=2, target_modules=["up"]))
    with pytest.raises(AdapterError, match="no active adapter that trains has ranks to allocate"):
        lora.update_and_allocate(0)

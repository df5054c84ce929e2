"""EVA: the ranks are PEFT's, and A's rows are the principal components of what a layer is given."""

from __future__ import annotations

import warnings

import models
import peft
import pytest
import torch

import lorafx
from lorafx.errors import AdapterError, ConfigError
from lorafx.model import components
from lorafx.testing import adapter_tensors

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
ALL = {"prepare_model_inputs_fn": None, "show_progress_bar": False}
FIRST = "model.layers.0.self_attn.q_proj"


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Batches of 4 x 24 tokens, of which some are padding and some have no label."""
    rng, found = torch.Generator().manual_seed(1), []
    for _ in range(count):
        ids = torch.randint(0, 64, (4, 24), generator=rng)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[0, 20:], labels[1, :5] = 0, -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def adapted(base=None, **how) -> lorafx.AdaptedModel:
    given = {"eva_config": how} if how else {}
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": "eva"} | given
    return lorafx.compile(base or models.llama(), chosen, random_state=0)


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_ranks_are_pefts_and_directions_nearly(tmp_path, rho):
    data, lora = batches(), adapted(rho=rho)
    lorafx.initialize_lora_eva_weights(lora, data, show_progress_bar=False)
    asked = peft.EvaConfig(rho=rho)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": "eva", "eva_config": asked}
    theirs = peft.get_peft_model(models.llama(), peft.LoraConfig(**settings))
    peft.initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    ours, their = lora.peft_config["default"], theirs.peft_config["default"]
    assert (dict(ours.rank_pattern), dict(ours.alpha_pattern)) == (their.rank_pattern, their.alpha_pattern)
    assert bool(ours.rank_pattern) == (rho > 1)
    x = data[0]
    torch.testing.assert_close(lora(**x).logits, models.llama()(**x).logits)
    lora.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path)
    torch.testing.assert_close(again(**x).logits, lora(**x).logits)


class Two(torch.nn.Module):
    """(n, 8), (n, 8) -> (n, 5): two layers, each with an input of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)

    def forward(self, x, other):
        return self.a(x) + self.b(other)


def test_a_layer_that_is_always_given_the_same_loses_its_adapter():
    torch.manual_seed(0)
    data = [{"x": torch.randn(40, 8), "other": torch.ones(40, 8)} for _ in range(3)]
    lora = lorafx.compile(Two(), {"r": 2, "target_modules": ["a", "b"], "init_lora_weights": "eva"})
    lorafx.initialize_lora_eva_weights(lora, data * 20, **ALL)
    assert [site.name for site in lora.sites] == ["a"] and lora.a.lora_A.default.weight.shape == (4, 8)
    assert lora.peft_config["default"].target_modules == ("a",) and lora.active_adapters == ["default"]
    assert lora.a.lora_A.default.weight.requires_grad and lora.a.lora_B.default.weight.requires_grad
    torch.testing.assert_close(lora(**data[0]), lora.get_base_model()(**data[0]))


def test_a_base_can_be_looked_at_first_and_each_layer_by_a_function_of_its_own():
    lora, data = adapted(rho=1.0), batches()
    wanted = lorafx.get_eva_state_dict(lora, data, show_progress_bar=False)
    found = lorafx.get_eva_state_dict(models.llama(), data, lora.peft_config["default"], show_progress_bar=False)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
    chosen = {FIRST: lambda x, mask, name: x[mask][::2]}  # and all other layers by all rows
    found = lorafx.get_eva_state_dict(lora, data, prepare_layer_inputs_fn=chosen, show_progress_bar=False)
    other = FIRST.replace("q_proj", "k_proj")
    assert torch.equal(wanted[FIRST], wanted[other]) and not torch.allclose(found[FIRST], found[other])


class Nested(torch.nn.Module):
    """(n, 8) -> (n, 7): a layer, and one whose name ends in the name of the first."""

    def __init__(self):
        super().__init__()
        self.a, self.inner = torch.nn.Linear(8, 5), torch.nn.ModuleDict({"a": torch.nn.Linear(5, 7)})

    def forward(self, x):
        return self.inner["a"](self.a(x))


@pytest.mark.parametrize("ranks", [{"a": 3, "inner.a": 2}, {"a": 2, "inner.a": 4}, {"a": 4, "inner.a": 0}])
def test_ranks_are_of_the_layers_that_are_named_so(ranks):
    lora = lorafx.compile(Nested(), {"r": 2, "target_modules": ["a"], "init_lora_weights": "eva"})
    found = {name: torch.randn(r, lora.get_submodule(name).in_features) for name, r in ranks.items()}
    lorafx.initialize_lora_eva_weights(lora, eva_state_dict=found)
    now = {site.module: lora.get_submodule(site.module).lora_A.default.weight for site in lora.sites}
    assert now.keys() == {name for name, r in ranks.items() if r}
    for name, values in now.items():
        assert torch.equal(values, found[name])


def test_layers_that_are_called_by_another_name_and_adapters_without_values_keep_what_they_had():
    torch.manual_seed(0)
    base = Nested()
    base.attention, base.embedding = torch.nn.MultiheadAttention(8, 2), torch.nn.Embedding(6, 8)
    asked = {"r": 2, "target_modules": ["a", "attention", "embedding"], "init_lora_weights": "eva"}
    lora = lorafx.compile(base, asked, low_cpu_mem_usage=True)
    with pytest.warns(match=r"attention\.out_proj, embedding, inner\.a, which keep"):
        lorafx.initialize_lora_eva_weights(lora, eva_state_dict={"a": torch.ones(3, 8)})
    assert not any(tensor.is_meta for tensor in adapter_tensors(lora).values())
    assert [tuple(lora.attention.out_proj.lora_A.default.weight.shape)] == [(2, 8)]


def test_what_cannot_be_is_refused_and_changes_nothing(monkeypatch):
    lora = adapted()
    before = {name: tensor.clone() for name, tensor in adapter_tensors(lora).items()}
    with pytest.raises(ConfigError, match="dataloader"):
        lorafx.initialize_lora_eva_weights(lora)
    with pytest.raises(ConfigError, match="empty"):
        lorafx.initialize_lora_eva_weights(lora, [], show_progress_bar=False)
    with pytest.raises(AdapterError, match="is not at nowhere"):
        lorafx.initialize_lora_eva_weights(lora, eva_state_dict={"nowhere": torch.zeros(2, 3)})
    for wrong in (torch.zeros(2, 3), torch.full((2, 16), torch.inf)):
        with pytest.raises(AdapterError, match=f"{FIRST}: start values are"):
            lorafx.initialize_lora_eva_weights(lora, eva_state_dict={FIRST: wrong})
    how = {"forward_fn": lambda model, batch: model(batch["input_ids"]), "show_progress_bar": False}
    with pytest.raises(ConfigError, match="prepare_model_inputs_fn"):
        lorafx.initialize_lora_eva_weights(lora, [torch.ones(2, 3)], **how)
    with pytest.raises(AdapterError, match="prepare_layer_inputs_fn"):
        lorafx.initialize_lora_eva_weights(lora, batches(), prepare_model_inputs_fn=lambda *_: torch.ones(96), **how)
    lora.add_adapter("merged", {"target_modules": ["up_proj"]})
    lora.merge_adapter(["merged"])
    with pytest.raises(AdapterError, match="'merged' merged into the base"):
        lorafx.initialize_lora_eva_weights(lora, batches())
    lora.unmerge_adapter()
    lora.delete_adapter("merged")
    with pytest.raises(ConfigError, match="not of"):
        lorafx.initialize_lora_eva_weights(lorafx.compile(models.mlp(), {"target_modules": ["up"]}), batches())
    with pytest.raises(ConfigError, match="for a base"):
        lorafx.get_eva_state_dict(lora, batches(), lora.peft_config["default"])
    with pytest.raises(ConfigError, match="names nowhere"):
        lorafx.initialize_lora_eva_weights(lora, batches(), prepare_layer_inputs_fn={"nowhere": components.all_rows})
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="each process"):
        patched.setattr(torch.distributed, "is_initialized", lambda: True)
        patched.setattr(torch.distributed, "get_world_size", lambda: 2)
        lorafx.initialize_lora_eva_weights(lora, batches())
    scaled = lorafx.compile(models.mlp(), {"peft_type": "IA3", "target_modules": ["up"], "feedforward_modules": []})
    with pytest.raises(ConfigError, match="not of"):
        lorafx.get_eva_state_dict(scaled, batches())
    two = lorafx.compile(Two(), {"r": 2, "target_modules": ["a"], "init_lora_weights": "eva"})
    with pytest.raises(AdapterError, match="a: the data gives numbers that are not finite"):
        lorafx.get_eva_state_dict(two, [{"x": torch.full((9, 8), torch.nan), "other": torch.ones(9, 8)}], **ALL)
    with pytest.raises(ConfigError, match="rho"):
        adapted(rho=0.5)
    now = adapter_tensors(lora)
    assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)
    assert not any(module._forward_pre_hooks for module in lora.modules())


def test_training_without_data_says_so_once(tmp_path):
    class Loss(Two):
        def forward(self, x):
            return super().forward(x, x).square().mean()

    asked, x = {"r": 2, "target_modules": ["a", "b"], "init_lora_weights": "eva"}, torch.randn(5, 8)
    lora = lorafx.compile(Loss(), asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.eval()
        with torch.no_grad():
            lora(x)
    with pytest.warns(UserWarning, match="'default' trains from random start values.*initialize_lora_eva_weights"):
        lora.train()(x).backward()
    lora.save_pretrained(tmp_path)
    found = lorafx.compile(Loss(), asked)
    lorafx.initialize_lora_eva_weights(found, [{"x": torch.randn(40, 8)}] * 20, **ALL)
    loaded = lorafx.load(Loss(), tmp_path, is_trainable=True)
    restored = lorafx.compile(Loss(), asked)
    torch.nn.init.ones_(restored.a.lora_B.default.weight)
    torch.nn.init.ones_(restored.b.lora_B.default.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in (lora, found, loaded, restored):
            each.train()(x).backward()

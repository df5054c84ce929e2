"""Start values that are taken out of the base weight, which is left with the rest: the model computes what it did."""

from __future__ import annotations

import copy
import warnings

import models
import pytest
import torch
from torch import nn

import lorafx
from lorafx.errors import AdapterError, CaptureError, CheckpointError, ConfigError
from lorafx.testing import same_bits

INITS = ["pissa", "pissa_niter_4", "olora"]
CONFIG = {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"]}
pytestmark = pytest.mark.filterwarnings("ignore:.*takes other start values")


def adapted(base: nn.Module | None = None, **config):
    return lorafx.compile(base or models.mlp(), CONFIG | config, random_state=1)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: getattr(model, name).weight.detach().clone() for name in ("up", "down")}


@pytest.mark.parametrize("init", INITS)
def test_the_rest_and_the_adapter_are_the_weight(init):
    base = models.mlp()
    before, x = weights(base), models.call("mlp")
    expected = base(*x)
    lora = adapted(base, init_lora_weights=init)
    for name, weight in before.items():
        a, b = (getattr(getattr(lora, name), half).default.weight for half in ("lora_A", "lora_B"))
        torch.testing.assert_close(getattr(base, name).weight + 5 / 3 * b @ a, weight)
        assert not torch.allclose(getattr(base, name).weight, weight, atol=1e-3)
    torch.testing.assert_close(lora(*x), expected)
    with lora.disable_adapter():
        assert not torch.allclose(lora(*x), expected, atol=1e-3)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16"])
def test_pissa_takes_the_largest_singular_values(init):
    base = models.mlp()
    values = torch.linalg.svdvals(base.up.weight.detach())
    adapted(base, init_lora_weights=init)
    rest = torch.linalg.svdvals(base.up.weight.detach())
    torch.testing.assert_close(rest[: len(values) - 3], values[3:], rtol=1e-4, atol=1e-5)
    assert rest[len(values) - 3 :].max() < 1e-5


def test_a_weight_that_is_stored_transposed_is_taken_from_as_others_are():
    base = models.gpt2(n_layer=1)
    inputs = models.call("gpt2")
    expected = base(**inputs).logits
    config = {"r": 3, "target_modules": ["c_fc", "wte"], "init_lora_weights": "pissa"}
    with pytest.warns(UserWarning, match="embeddings start as ever"):
        lora = lorafx.compile(base, config, random_state=1)
    torch.testing.assert_close(lora(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert lora.transformer.wte.lora_embedding_A.default.abs().max() == 0
    assert lora.transformer.h[0].mlp.c_fc.lora_B.default.weight.shape == (80, 3)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_it_is_taken_out_again_where_the_adapter_is_loaded(tmp_path, init):
    lora = adapted(init_lora_weights=init)
    with torch.no_grad():
        lora.up.lora_A.default.weight.add_(0.1)
    lora.save_pretrained(tmp_path)
    x = models.call("mlp")
    again = lorafx.load(models.mlp(), tmp_path)
    assert torch.equal(again(*x), lora.eval()(*x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = lorafx.compile(models.mlp(), CONFIG | {"init_lora_weights": False})
        second.load_adapter(tmp_path, "taken")
    second.set_adapter("taken")
    assert torch.equal(second(*x), lora(*x))
    second.load_adapter(tmp_path, "taken")  # values alone: the base was changed already
    assert torch.equal(second(*x), lora(*x))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rslora", [False, True])
def test_it_is_saved_for_the_base_as_it_was(tmp_path, init, rslora):
    lora = adapted(init_lora_weights=init, use_rslora=rslora, modules_to_save=None)
    lora.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    lora.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    again = lorafx.load(models.mlp(), tmp_path / "end")
    config = again.peft_config["default"]
    assert (config.r, config.init_lora_weights) == (6, True)
    x = models.call("mlp")
    torch.testing.assert_close(again(*x), lora.eval()(*x))
    assert lora.peft_config["default"].init_lora_weights == init and lora.up.lora_A.default.weight.shape[0] == 3


def test_what_cannot_be_converted_writes_nothing(tmp_path):
    lora = adapted(init_lora_weights="pissa", use_rslora=True, alpha_pattern={"up": 4})
    lora.save_pretrained(tmp_path / "start")
    for start, error in ((tmp_path / "nowhere", CheckpointError), (tmp_path / "start", ConfigError)):
        with pytest.raises(error):
            lora.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=start)
    adapted(r=2).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="lora_A"):
        lora.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "other")
    assert not (tmp_path / "end").exists()


def test_what_is_left_can_be_quantised_and_adapted_with_a_plain_config(tmp_path):
    base = models.mlp()
    lora = adapted(base, init_lora_weights="pissa")
    lora.save_pretrained(tmp_path)
    x, config = models.call("mlp"), lora.peft_config["default"]
    left = copy.deepcopy(base)
    again = lorafx.load(left, tmp_path, config=config.replace(init_lora_weights=True))
    torch.testing.assert_close(again(*x), models.mlp()(*x))
    assert torch.equal(left.up.weight, base.up.weight)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "pissa", "r": 5}, "down: .* at most rank 4"),
        ({"init_lora_weights": "olora", "lora_alpha": 0}, "above 0"),
        ({"init_lora_weights": "loftq"}, "needs a `loftq_config`"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}}, "4 or 8"),
        ({"init_lora_weights": "loftq", "loftq_config": {"bits": 4}}, "loftq_config"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, "loftq_iter"),
        ({"loftq_config": {"loftq_bits": 4}}, "`loftq_config` needs"),
    ],
)
def test_what_cannot_be_taken_is_refused_and_the_base_stays(config, message):
    base = models.mlp()
    before = weights(base)
    with pytest.raises(ConfigError, match=message):
        adapted(base, **config)
    assert all(torch.equal(value, before[name]) for name, value in weights(base).items())


def test_convolutions_and_quantised_layers_are_refused():
    with pytest.raises(ConfigError, match=r"plane: .* is for linear layers"):
        lorafx.compile(models.convnet(), {"r": 2, "target_modules": ["plane"], "init_lora_weights": "pissa"})
    base = lorafx.to_float8(nn.Sequential(nn.Linear(32, 16)).requires_grad_(False), ["0"])
    with pytest.raises(ConfigError, match="not one stored as float8"):
        lorafx.compile(base, {"r": 2, "target_modules": ["0"], "init_lora_weights": "pissa"})


def test_olora_takes_from_a_quantised_weight_too():
    torch.manual_seed(0)
    base = lorafx.to_float8(nn.Sequential(nn.Linear(32, 16)).requires_grad_(False), ["0"])
    x = torch.randn(5, 32)
    expected = base(x)
    lora = lorafx.compile(base, {"r": 2, "target_modules": ["0"], "init_lora_weights": "olora"})
    assert not torch.allclose(base(x), expected, atol=0.1)
    # One rounding to float8 more, of 1/16 at most of numbers of at most |W| + |s B A|; they come to about a 50th.
    torch.testing.assert_close(lora(x), expected, rtol=0, atol=0.1 * expected.abs().max().item())


def test_a_failure_after_the_tensors_were_made_leaves_the_base():
    base = models.mlp()
    before = weights(base)
    with pytest.raises((CaptureError, TypeError)):
        lorafx.compile(base, CONFIG | {"init_lora_weights": "pissa"}, example_inputs=(3, 4), capture="graph")
    assert all(torch.equal(value, before[name]) for name, value in weights(base).items())


def test_nothing_is_taken_out_of_merged_weights():
    lora = adapted()
    lora.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        lora.add_adapter("second", CONFIG | {"init_lora_weights": "pissa"})
    lora.unmerge_adapter()
    lora.add_adapter("second", CONFIG | {"init_lora_weights": "pissa"})
    lora.merge_adapter(["second"])
    torch.testing.assert_close(lora.up.weight, models.mlp().up.weight)


def test_unload_and_delete_say_what_the_base_lacks():
    for leave in (lambda lora: lora.unload(), lambda lora: lora.delete_adapter("default")):
        lora = adapted(init_lora_weights="olora")
        with pytest.warns(UserWarning, match="stay without them"):
            leave(lora)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = adapted(init_lora_weights="olora").merge_and_unload()
    torch.testing.assert_close(merged.up.weight, models.mlp().up.weight)


def test_half_precision_bases_keep_their_dtype_and_random_states_repeat():
    first, second = (
        lorafx.compile(models.mlp().bfloat16(), CONFIG | {"init_lora_weights": "pissa_niter_2"}, random_state=4)
        for _ in range(2)
    )
    assert first.up.weight.dtype == torch.bfloat16 and first.up.lora_A.default.weight.dtype == torch.float32
    assert same_bits(first.up.weight, second.up.weight)
    assert same_bits(first.down.lora_B.default.weight, second.down.lora_B.default.weight)

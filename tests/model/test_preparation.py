"""A quantised base that was prepared, by lorafx or by PEFT, trains as PEFT's does."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import models
import peft
import pytest
import torch

pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")

import quantised

import lorafx
from lorafx.errors import AdapterError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
PREPARE = {"lorafx": lorafx.prepare_model_for_kbit_training, "peft": peft.prepare_model_for_kbit_training}


def state_of(model) -> dict[str, object]:
    """All that preparing a model may change, as values to compare."""
    checkpoints = {
        name: (module.gradient_checkpointing, module._gradient_checkpointing_func.keywords)
        for name, module in model.named_modules()
        if getattr(module, "gradient_checkpointing", None)
    }
    parameters = {
        name: (p.dtype, p.requires_grad, p.detach().view(torch.uint8).long().sum().item())
        for name, p in model.named_parameters()
    }
    hooks = [name for name, module in model.named_modules() if module._forward_hooks]
    return {"checkpoints": checkpoints, "hooks": hooks, "parameters": parameters}


@pytest.mark.parametrize("how", ["nf4", "int8", None])
@pytest.mark.parametrize("options", [{}, {"use_gradient_checkpointing": False}, {"kwargs": {"use_reentrant": False}}])
def test_it_changes_what_peft_changes(tmp_path, how, options):
    options = {"gradient_checkpointing_kwargs" if key == "kwargs" else key: value for key, value in options.items()}
    made = models.llama().bfloat16() if how is None else quantised.quantised(tmp_path, how, dtype=torch.bfloat16)
    ours, theirs = (ready(copy.deepcopy(made), **options) for ready in PREPARE.values())
    assert state_of(ours) == state_of(theirs)
    assert ours.model.norm.weight.dtype == torch.float32


def test_what_keeps_quantised_weights_in_16_bits_stays(tmp_path):
    base = quantised.quantised(tmp_path, "nf4", dtype=torch.bfloat16)
    before = base.model.layers[0].mlp.up_proj.weight.clone()
    lorafx.prepare_model_for_kbit_training(base)
    after = base.model.layers[0].mlp.up_proj.weight
    assert after.dtype == torch.bfloat16 and torch.equal(before.view(torch.uint8), after.view(torch.uint8))
    base = models.llama().bfloat16()
    base.quantization_method = "gptq"
    assert lorafx.prepare_model_for_kbit_training(base).model.norm.weight.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["graph", "sites"])
@pytest.mark.parametrize(
    ("how", "ready", "kwargs"),
    [
        ("nf4", "lorafx", None),
        ("fp4", "peft", {"use_reentrant": True}),
        ("int8", "lorafx", {"use_reentrant": False}),
    ],
    ids=str,
)
def test_a_prepared_base_trains_as_pefts(tmp_path, how, ready, kwargs, capture):
    both = [partial(PREPARE[each], gradient_checkpointing_kwargs=kwargs) for each in (ready, "peft")]
    ours, theirs = quantised.twins(tmp_path, how, tuple(both), base={"dtype": torch.bfloat16}, capture=capture)
    inputs = models.call("llama")
    (loss, mine), (other, expected) = (quantised.gradients(model, inputs) for model in (ours, theirs))
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=0)
    assert mine.keys() == expected.keys() and mine
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    if capture == "graph":
        assert "checkpoint_block" in ours.graph(**inputs).code


def test_what_cannot_be_prepared_is_refused_and_stays(tmp_path):
    base = quantised.quantised(tmp_path, "nf4", dtype=torch.bfloat16)
    before = state_of(base)
    with pytest.raises(ConfigError, match="must be a dict"):
        lorafx.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=True)
    base.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no gradient checkpointing"):
        lorafx.prepare_model_for_kbit_training(base)
    assert state_of(base) == before
    with pytest.raises(AdapterError, match="prepare its base"):
        lorafx.prepare_model_for_kbit_training(lorafx.compile(base, quantised.CONFIG))


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_parameters_are_counted_as_peft_does(tmp_path, how, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = quantised.twins(tmp_path, how)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    status = theirs.get_model_status()
    assert ours.get_model_status().total_params == status.total_params
    printed = []
    for model in (ours, theirs):
        model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]

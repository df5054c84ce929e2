"""MonteCLoRA's penalty beside PEFT's, and its noise; outputs and gradients are in `test_kinds.py`."""

from __future__ import annotations

import functools

import models
import peft
import pytest
import torch
from kind_cases import IN_FLOAT32, KindCase, trained
from peft.tuners.lora.monteclora import BufferedMontecloraSampler

import lorafx
from lorafx.adapters.kinds import monteclora


def test_monteclora_has_pefts_penalty_and_noise_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's is that of the call before, so both are given one diagonal and shares; it reports once that they are."""
    fields = {"r": 2, "target_modules": ["up", "down"], "init_lora_weights": False}
    fields["monteclora_config"] = {"num_samples": 3, "use_entropy": True, "kl_loss_weight": 0.3, "buffer_size": 1}
    case = KindCase("linear", "LoraConfig", fields)
    theirs, ours = peft.get_peft_model(case.base(), case.theirs()).train(), lorafx.compile(case.base(), fields)
    with torch.no_grad():
        for name, parameter in trained(ours).items():
            parameter.copy_(trained(theirs)[name])
    monkeypatch.setattr(BufferedMontecloraSampler, "get", same)
    monkeypatch.setattr(monteclora, "_normal", lambda like, shape: torch.full(shape, 0.7, dtype=like.dtype))
    theirs(case.x())
    expected, found = theirs.base_model._get_monteclora_loss(), ours.get_penalty()
    torch.testing.assert_close(found, expected, **IN_FLOAT32)
    for loss, model in ((expected, theirs), (found, ours)):
        loss.backward()
        gradients = {name: p.grad for name, p in trained(model).items() if "prior" in name}
    for name, parameter in trained(theirs).items():
        if "prior" in name:
            torch.testing.assert_close(gradients[name], parameter.grad, **IN_FLOAT32)
    monkeypatch.undo()
    x = case.x()
    assert not torch.equal(ours.train()(x), ours(x)) and torch.equal(ours.eval()(x), ours(x))


def same(sampler: BufferedMontecloraSampler) -> dict[str, torch.Tensor]:
    own = sampler.model
    normal = functools.partial(torch.full, fill_value=0.7, dtype=own.dtype)
    diagonal = normal((own.out_features, own.out_features)).square().sum(-1).diag()
    samples = normal((own.num_samples, own.in_features, own.out_features))
    return {"z_wishart": diagonal, "z_mvn": samples, "z_dirichlet": normal((own.num_samples,))}


@pytest.mark.slow
def test_a_graph_and_what_runs_again_in_backward_have_the_same_noise() -> None:
    fields = {"r": 3, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    fields["monteclora_config"] = {"num_samples": 2, "sample_scaler": 0.2}
    ways = [{"capture": "sites"}, {"capture": "graph"}, {"capture": "graph", "gradient_checkpointing": True}]
    found = []
    for options in ways:
        lora = lorafx.compile(models.llama(num_hidden_layers=2), fields, random_state=0, **options).train()
        torch.manual_seed(5)
        models.run(lora, models.call("llama")).loss.backward()
        found.append([parameter.grad for parameter in lora.parameters() if parameter.requires_grad])
    for gradients in found[1:]:
        for wanted, gradient in zip(found[0], gradients):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)

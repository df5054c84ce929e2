"""Layers that checkpoint re-entrantly train whatever the input, and the base keeps its own way."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from modules import ids, tiny_llama
from rows import with_adapters
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafx

REENTRANT = {"use_reentrant": True}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("order", "kwargs"), [("before", REENTRANT), ("after", REENTRANT), ("before", {})])
def test_inputs_without_gradients_train_with_reentrant_checkpoints(order, kwargs):
    base = tiny_llama(num_hidden_layers=1)
    if order == "before":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    lora = lorafx.compile(base, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}).train()
    embeds, labels = lora.get_input_embeddings()(ids(2, 7)).detach(), ids(2, 7)
    if order == "after":
        lora(inputs_embeds=embeds, labels=labels).loss.backward()
        expected = [p.grad for p in lora.parameters() if p.requires_grad]
        lora.zero_grad()
        lora.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    lora(inputs_embeds=embeds, labels=labels).loss.backward()
    gradients = [p.grad for p in lora.parameters() if p.requires_grad]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    if order == "after":
        torch.testing.assert_close(gradients, expected)
    else:
        function = base.model.layers[0]._gradient_checkpointing_func
        assert function.keywords == kwargs and base.model.layers[0].gradient_checkpointing
    assert lora.explain().calls[-1].served_by == "graph"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpoints_that_are_enabled_in_each_step_are_one_kind_of_call():
    """trl's DPOTrainer turns them off for the reference, and on again."""
    lora = lorafx.compile(tiny_llama(num_hidden_layers=1), {"r": 2, "target_modules": ["q_proj"]}).train()
    for _ in range(3):
        lora.gradient_checkpointing_enable()
        assert len(lora.get_input_embeddings()._forward_hooks) == 1
        lora(input_ids=ids(2, 7), labels=ids(2, 7)).loss.backward()
        lora.gradient_checkpointing_disable()
    assert [call.hits for call in lora.explain().calls] == [2]


class Reads(nn.Module):
    """(n, 6) -> (n, 4): what is checkpointed reads a weight outside of its module."""

    def __init__(self, checkpointed):
        super().__init__()
        self.first, self.second, self.checkpointed = nn.Linear(6, 10, bias=False), nn.Linear(10, 4), checkpointed

    def forward(self, x):
        return self.second(self.checkpointed(lambda x: torch.tanh(F.linear(x, self.first.weight)), x))


@pytest.mark.parametrize("names", [None, ["default", "other", "__base__"]])
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_runs_again_in_backward_is_served_as_in_forward(reentrant, names):
    x, found = torch.randn(3, 6, requires_grad=True), []
    for checkpointed in (lambda function, x: function(x), partial(checkpoint, use_reentrant=reentrant)):
        torch.manual_seed(0)
        configs = {name: {"r": 2, "target_modules": ["first", "second"]} for name in ("default", "other")}
        lora = with_adapters(Reads(checkpointed), configs, capture="sites")
        for _ in range(2):
            lora.zero_grad()
            lora(x, **({} if names is None else {"adapter_names": names})).square().sum().backward()
        found.append({name: p.grad for name, p in lora.named_parameters() if p.grad is not None})
    assert len(found[0]) == 8
    torch.testing.assert_close(*found)

"""freeze_base: only what an active adapter owns is trained."""

from dataclasses import replace

import torch
from graphs import INSERT, Chain, adapted, context, run
from modules import Stack

from lorafx.passes import FreezeBase


def trainable(module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_only_adapters_train():
    lora = adapted(Chain(), target_modules=["second"], bias="lora_only")
    expected = {
        "second.lora_A.default.weight",
        "second.lora_B.default.weight",
        "second.trained_bias.default.bias",
    }
    assert trainable(lora) == expected
    gm = run(lora, INSERT, torch.randn(5, 4))
    lora.first.weight.requires_grad_(True)
    assert FreezeBase().rewrite(gm, context(lora)) == 1
    assert trainable(lora) == trainable(gm) == expected


def test_a_frozen_base_does_not_change_again():
    lora = adapted(Chain())
    assert FreezeBase().rewrite(run(lora, INSERT, torch.randn(5, 4)), context(lora)) == 0


def test_what_the_user_trains_besides_trains_on():
    lora, x = adapted(Chain(), target_modules=["second"]), torch.randn(5, 4)
    lora.first.weight.requires_grad_(True)
    lora(x).sum().backward()
    assert lora.first.weight.requires_grad and lora.first.weight.grad.any()
    gm = run(lora, INSERT, x)
    assert FreezeBase().rewrite(gm, replace(context(lora), trained=frozenset({"first.weight"}))) == 0


def test_what_the_user_trains_in_a_layer_trains_on():
    lora, x = adapted(Stack(depth=2), target_modules=["up"]), torch.randn(5, 4)
    lora.layers[0].down.weight.requires_grad_(True)
    lora(x).sum().backward()
    assert lora.layers[0].down.weight.requires_grad and lora.layers[0].down.weight.grad.any()


def test_what_trains_is_the_same_after_adapters_were_disabled_for_a_while():
    lora = adapted(Chain(), target_modules=["second"])
    lora.first.weight.requires_grad_(True)
    before = trainable(lora)
    with lora.disable_adapter():
        assert not any("lora" in name for name in trainable(lora))
    assert trainable(lora) == before == {"first.weight", "second.lora_A.default.weight", "second.lora_B.default.weight"}


def test_an_inactive_adapter_does_not_train():
    lora = adapted(Chain(), target_modules=["second"])
    lora.add_adapter("other", {"target_modules": ["first"]})
    assert trainable(lora) == {"second.lora_A.default.weight", "second.lora_B.default.weight"}
    lora.set_adapter("other")
    assert trainable(lora) == {"first.lora_A.other.weight", "first.lora_B.other.weight"}


def test_a_tensor_that_was_frozen_by_hand_stays_frozen():
    lora = adapted(Chain())
    for name, parameter in lora.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    lora(torch.randn(5, 4)).sum().backward()
    assert trainable(lora) == {"first.lora_B.default.weight", "second.lora_B.default.weight"}


def test_an_adapter_in_inference_mode_does_not_train():
    assert trainable(adapted(Chain(), inference_mode=True)) == set()


def test_the_base_gets_its_flags_back():
    model = Chain()
    model.first.weight.requires_grad_(False)
    assert adapted(model).unload() is model
    assert trainable(model) == {"second.weight", "second.bias"}


def test_only_the_adapter_moves_in_training():
    model, x = Chain(), torch.randn(5, 4)
    lora = adapted(model)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = {name: p.detach().clone() for name, p in lora.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.1)
    first = lora(x).square().mean()
    for _ in range(5):
        optimizer.zero_grad()
        loss = lora(x).square().mean()
        loss.backward()
        optimizer.step()
    assert lora(x).square().mean() < first
    assert all(torch.equal(base[name], value) for name, value in model.state_dict().items())
    assert all(not torch.equal(value, lora.get_parameter(name)) for name, value in adapters.items())

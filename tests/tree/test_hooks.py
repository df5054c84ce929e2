"""hooks: those around modules read the base's weights, and cast them, while the model's own Python runs by sites."""

import copy
import pickle

import pytest
import torch
from graphs import Chain, adapted

from lorafx.tree.hooks import RUNNING, Hooks

x = torch.linspace(-1, 1, 12).view(3, 4)


def cast(dtype):
    def hook(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)

    return hook


def stored_in_half(model):
    for layer in (model.first, model.second):
        layer.register_forward_pre_hook(cast(torch.float32))
        layer.register_forward_hook(cast(torch.float16))
        cast(torch.float16)(layer)
    return model


def test_weights_may_be_cast_for_the_time_of_a_call():
    torch.manual_seed(0)
    base = stored_in_half(Chain())
    plain = Chain()
    plain.load_state_dict(base.state_dict())
    lora, expected = adapted(base), adapted(plain)(x)
    result = lora(x)
    assert torch.allclose(result, expected, atol=1e-6) and torch.allclose(lora(x), expected, atol=1e-6)
    assert lora.first.weight.dtype == torch.float16
    last = adapted(base, target_modules=["second"])  # backward through a weight that was cast back fails anywhere
    last(x).sum().backward()
    assert all(parameter.grad is not None for parameter in last.parameters() if parameter.requires_grad)


@pytest.mark.slow
def test_a_weight_that_is_cast_otherwise_has_another_graph():
    lora = adapted(stored_in_half(Chain()))
    lora(x)
    for name in ("first", "second"):
        getattr(lora, name)._forward_pre_hooks.clear()
        getattr(lora, name)._forward_hooks.clear()
        getattr(lora, name).register_forward_pre_hook(cast(torch.float64))
    assert lora(x.double()).dtype == torch.float64


def test_what_a_hook_computes_of_a_weight_is_of_the_base():
    lora, seen = adapted(Chain(), target_modules=["second"]), []
    lora.second.register_forward_hook(lambda module, args, output: seen.append(module.weight.norm()))
    lora(x)
    assert seen == [lora.second.weight.norm()]


def test_hooks_are_copied_and_pickled_as_they_are():
    hooks = Hooks.of({3: max, 5: min})
    for other in (hooks.copy(), copy.deepcopy(hooks), pickle.loads(pickle.dumps(hooks))):
        assert type(other) is Hooks and list(other.items()) == [(3, max), (5, min)]


def test_a_hook_that_fails_leaves_nothing_suspended():
    lora = adapted(Chain())
    handle = lora.first.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lora(x)
    handle.remove()
    assert RUNNING.mode is None and lora(x).shape == (3, 3)

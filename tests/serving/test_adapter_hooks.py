"""Hooks on the modules that hold an adapter's tensors run where PEFT's do, and do what they do there."""

import copy

import peft
import pytest
import torch
from graphs import Chain, adapted
from rows import with_adapters
from torch import nn

import lorafx
from lorafx.errors import AdapterError
from lorafx.pipeline import Pipeline
from lorafx.serving.adapter_hooks import unfused

CONFIG = {"r": 2, "lora_alpha": 6, "target_modules": ["conv", "first"], "init_lora_weights": False, "lora_dropout": 0.0}
NAMES = ("lora_A.default", "lora_B.other", "modules_to_save.default")


class Model(nn.Module):
    """(batch, 4, length) -> (batch, length, 3): a convolution and two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv1d(4, 6, 3), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(self.conv(x).transpose(1, 2))))


@pytest.fixture
def both():
    """An adapted model with two adapters, and PEFT's with the same values."""
    torch.manual_seed(0)
    base = Model()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**CONFIG, modules_to_save=["second"]))
    theirs.add_adapter("other", peft.LoraConfig(**CONFIG))
    ours = lorafx.compile(base, {**CONFIG, "modules_to_save": ["second"]})
    ours.add_adapter("other", CONFIG)
    names = ((_plain(name), tensor) for name, tensor in theirs.state_dict().items())
    ours.load_state_dict({name.replace(".original_module", ""): tensor for name, tensor in names})
    theirs.base_model.set_adapter(["default", "other"])
    ours.set_adapter(["default", "other"])
    return ours, theirs


def _plain(name):
    return name.replace("base_model.model.", "").replace(".base_layer", "")


def watch(model):
    """Hook adapters' modules in every way; what comes back is filled by what the hooks see."""
    seen = []
    for path, module in model.named_modules():
        name = _plain(path)
        if not name.endswith(NAMES):
            continue

        def after(module, args, kwargs, output, name=name):
            seen.append((name, args[0].shape, output.detach()))
            return output + 1 if "other" in name else None

        def backward(module, given, gradients, name=name):
            seen.append((f"{name} backward", gradients[0].shape, gradients[0]))

        module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        module.register_forward_hook(after, with_kwargs=True, always_call=True)
        module.register_full_backward_hook(backward)
    return seen


def test_hooks_see_and_change_what_pefts_do(both):
    ours, theirs = both
    x, seen, expected = torch.randn(2, 4, 7), watch(ours), watch(theirs)
    y, wanted = ours(x), theirs(x)
    torch.testing.assert_close(y, wanted)
    y.sum().backward()
    wanted.sum().backward()
    order = {name: place for place, (name, *_) in enumerate(expected)}
    seen.sort(key=lambda each: order[each[0]])
    assert len(order) == 2 * 5 and [each[:2] for each in seen] == [each[:2] for each in expected]
    torch.testing.assert_close([each[2] for each in seen], [each[2] for each in expected])
    gradients = {_plain(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert gradients and all(name in dict(ours.named_parameters()) for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient)


@pytest.mark.slow
def test_hooks_that_are_gone_leave_the_fused_graph():
    lora, x, seen = adapted(Chain()), torch.randn(5, 4), []
    before = lora(x)
    for _ in range(5):
        handle = lora.first.lora_A.default.register_forward_hook(lambda module, args, output: seen.append(output))
        torch.testing.assert_close(lora(x), before)
        handle.remove()
        assert torch.equal(lora(x), before)
    assert len(seen) == 5 and lora.explain().operators == 2 and len(lora.explain().calls) == 2
    assert "forward" not in vars(lora.first.lora_A.default)


def test_a_module_that_no_operator_stands_for_is_named():
    lora = adapted(nn.Sequential(nn.Embedding(5, 4)), target_modules=["0"])
    lora.get_submodule("0.lora_embedding_A").register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"hooks on 0\.lora_embedding_A do not run"):
        lora(torch.tensor([[1, 2]]))


def test_hooks_in_a_call_with_rows_are_named():
    lora = with_adapters(nn.Sequential(nn.Embedding(5, 4), Chain()), {"a": {"r": 2, "target_modules": ["0", "first"]}})
    lora.get_submodule("1.first.lora_A.a").register_forward_hook(lambda *_: None)
    with pytest.raises(AdapterError, match=r"hooks on 1\.first\.lora_A\.a cannot run in a call whose rows"):
        lora(torch.tensor([[1, 2], [3, 4]]), adapter_names=["a", "__base__"])


def test_a_pipeline_without_adapters_is_left_out_as_a_whole():
    assert unfused(Pipeline()) == Pipeline()
    assert unfused(lorafx.passes.default)[-1].name == "merge_adapters"

"""Adapted tensors: which tensors the adapters act on, as they are in the tree while a model's own Python runs."""

import gc

import pytest
import torch
from graphs import Chain, adapted
from serving_models import served
from torch import nn

import lorafx
from lorafx.errors import AdapterError, UncoveredOperatorError
from lorafx.serving.adapted_tensors import AdaptedTensors
from lorafx.serving.site_table import SiteTable
from lorafx.tree.hooks import RUNNING

RANDOM = {"target_modules": "all-linear", "init_lora_weights": False, "r": 2}


def tensors(lora):
    return AdaptedTensors(lora, SiteTable.of(lora, lora._lorafx.context), looks_at_memory=False)


def test_weights_and_tensors_with_a_copy_are_known_and_no_others():
    lora = lorafx.compile(Chain(), RANDOM | {"target_modules": ["second"], "bias": "all"})
    found, first, second = tensors(lora), lora.first, lora.second
    assert found.weights == {id(second.weight): "second.weight"} and found.replaced[id(second.bias)] == "second.bias"
    assert found.acts_on((torch.ones(2), [second.bias])) and not found.acts_on((first.weight, 3, None))
    assert found.copy_of(second.bias) is second.trained_bias.default.bias and found.copy_of(first) is first


def test_what_comes_with_a_module_is_known_until_that_has_run():
    lora = lorafx.compile(Chain(), RANDOM)
    found, before = tensors(lora), lora.second.weight
    assert found.come_with("second") == []
    lora.second.weight = other = nn.Parameter(before.detach().clone())
    assert not found.acts_on([other])
    new = found.come_with("second")
    assert found.acts_on([other]) and len(new) == 1
    found.forget(new)
    assert not found.acts_on([other]) and found.acts_on([before])


@pytest.mark.slow
def test_a_weight_that_is_there_while_its_module_runs_is_adapted():
    """As with FSDP, where a module has a shard of its weight at other times."""
    lora, x = adapted(Chain()), torch.randn(5, 4)
    expected, shard = lora(x), lora.second.weight
    whole = nn.Parameter(shard.detach().clone())
    lora.second.register_forward_pre_hook(lambda module, args: setattr(module, "weight", whole))
    lora.second.register_forward_hook(lambda module, args, output: setattr(module, "weight", shard))
    torch.testing.assert_close(lora(x), expected)
    assert served(lora)[-1] == "sites" and lora.second.weight is shard


@pytest.mark.parametrize("capture", ["sites", "auto"])
def test_another_tensor_with_the_id_of_a_weight_that_is_gone_is_not_taken_for_it(capture, early):
    """As with accelerate's offloading, where a module has a new weight in each call, and a new one without memory."""
    known = []

    class Looking(nn.Module):
        def forward(self, x):
            gc.collect()
            known.append((dict(RUNNING.mode.tensors.weights), list(RUNNING.mode.tensors.every)))
            return x

    def load(module, args):
        module.weight = nn.Parameter(values.clone(), False)

    def unload(module, args, output):
        module.weight = nn.Parameter(values.to("meta"), False)

    base = nn.Sequential(nn.Linear(4, 6), Looking(), nn.Linear(6, 3)).requires_grad_(False)
    lora, x = lorafx.compile(base, RANDOM | {"target_modules": ["0"]}, capture=capture), torch.randn(5, 4)
    expected, values = lora(x), lora.get_submodule("0").weight.detach().clone()
    module = lora.get_submodule("0")
    module.register_forward_pre_hook(load)
    module.register_forward_hook(unload)
    unload(module, None, None)
    torch.testing.assert_close(lora(x), expected)
    found, kept = known[-1]
    assert set(found) == {id(tensor) for tensor in kept}, "of others nobody knows whether they are alive"


class Single:
    """An object of which there is only one."""

    def __init__(self, module):
        self.module = module

    def __copy__(self):
        raise TypeError("there is one of me")


class Elsewhere(Chain):
    """Reaches its first layer by an object, or computes with something that was made of its weight."""

    def __init__(self, how):
        super().__init__()
        parts = {"detached": lambda w: w.detach(), "rows": lambda w: w[:4], "data": lambda w: w.data}
        parts |= {"by keyword": parts["data"], "in a list": parts["data"]}
        self.how = how
        self.drop = nn.Dropout(0.5)
        self.single = Single([self.first, self.drop])
        self.__dict__["part"] = parts[how](self.first.weight) if how in parts else None

    def apply_part(self, x):
        if self.how == "by keyword":
            return nn.functional.linear(x, weight=self.part)
        if self.how == "in a list":
            return x @ torch.cat([self.part, self.part]).T
        return nn.functional.linear(x, self.part)

    def forward(self, x):
        if self.part is None:
            first, drop = self.single.module
            return self.second(drop(first(x)))
        x = self.apply_part(x)
        return self.second(x.new_zeros(len(x), 6).add(x.sum(1, keepdim=True)))


@pytest.mark.parametrize("capture", ["auto", "sites"])
@pytest.mark.parametrize("how", ["detached", "rows", "data", "by keyword", "in a list"])
@pytest.mark.filterwarnings("ignore:.*could not be captured")
def test_a_weight_that_is_read_through_its_memory_is_an_error(how, capture):
    lora = lorafx.compile(Elsewhere(how), RANDOM, capture=capture)
    with pytest.raises(
        UncoveredOperatorError, match=r"first\.weight is read by a tensor that shares its memory.*test_adapted"
    ):
        lora(torch.randn(5, 4))


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["auto", "sites"])
@pytest.mark.filterwarnings("ignore:.*could not be captured")
def test_the_bases_own_layers_must_be_in_the_models_mode(capture):
    base = Elsewhere("module")
    lora = lorafx.compile(base, RANDOM, capture=capture)
    x = torch.randn(50, 4)
    assert not torch.equal(lora(x), lora(x)), "dropout acts"
    lora.eval()
    with pytest.raises(AdapterError, match=r"the base's own Linear runs here.*call `eval\(\)`"):
        lora(x)
    base.eval()
    assert torch.equal(lora(x), lora(x))

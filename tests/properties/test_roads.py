"""Random nested nets, adapted and compared with their own Python on the weights W + ΔW, in float64.

What a net does to a weight, by whatever road, its twin without adapters does to W + ΔW. The gradient that the twin has
for this weight is that of ΔW, and so gives those of the adapters.
"""

from __future__ import annotations

import tempfile
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nets import LAYERS, MIXES_ROWS, Plan, plans
from torch import Tensor, nn

import lorafx

R, ALPHA, INPUTS = 2, 6, 3
CONFIG = {"r": R, "lora_alpha": ALPHA, "target_modules": ["fc"], "init_lora_weights": False}
ALONE = {"default": 1.0}
BASES: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # what was adapted
# float64: sums of at most a hundred terms of about one, through at most four layers that may double them.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class Twin:
    """A net without adapters whose weights have some in them, each with its share."""

    def __init__(self, plan: Plan, lora: nn.Module, shares: dict[str, float]):
        self.lora, self.shares, self.net = lora, shares, plan.build(INPUTS)
        self.sites = {path: module for path, module in self.net.named_modules() if path.endswith("fc")}
        with torch.no_grad():
            for path, module in self.sites.items():
                module.weight += sum(self.update(path, adapter) for adapter in shares)

    def matrices(self, path: str, adapter: str) -> list[nn.Parameter]:
        """A (r, …) and B (…, r) of an adapter at a module."""
        site = self.lora.get_submodule(path)
        if isinstance(self.sites[path], nn.Embedding):
            return [site.lora_embedding_A[adapter], site.lora_embedding_B[adapter]]
        return [site.lora_A[adapter].weight, site.lora_B[adapter].weight]

    def update(self, path: str, adapter: str) -> Tensor:
        """ΔW = share · α / r · B A in the shape of the weight."""
        module, (a, b) = self.sites[path], self.matrices(path, adapter)
        product = b.flatten(1) @ a.flatten(1)
        delta = (product.T if isinstance(module, nn.Embedding) else product).reshape(module.weight.shape)
        return self.shares[adapter] * ALPHA / R * delta

    def step(self, x: Tensor, train: bool) -> None:
        """Call both nets forward and backward and compare all that comes of it."""
        BASES[self.lora].train(train)  # some roads lead to its own modules, which must be in the same mode
        self.lora.train(train).zero_grad()
        self.net.train(train).zero_grad()
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        actual, expected = self.lora(mine), self.net(theirs)
        torch.testing.assert_close(actual, expected, **CLOSE)
        actual.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)
        self.compare_gradients()
        torch.testing.assert_close(buffers(self.lora), buffers(self.net), **CLOSE)

    def compare_gradients(self) -> None:
        """Whether the adapters have the gradients that follow from those of the twin's weights."""
        for path, module in self.sites.items():
            for adapter in self.shares:
                matrices = self.matrices(path, adapter)
                due = torch.autograd.grad(self.update(path, adapter), matrices, module.weight.grad)
                torch.testing.assert_close([each.grad for each in matrices], list(due), **CLOSE)


def buffers(net: nn.Module) -> dict[str, Tensor]:
    return {path: each for path, each in net.named_buffers() if "adapter_scaling" not in path}


def base_weights(lora: nn.Module) -> dict[str, Tensor]:
    return {path: each.detach().clone() for path, each in lora.named_parameters() if "lora_" not in path}


def adapted(plan: Plan, capture: str, shares: dict[str, float]) -> nn.Module:
    """The net with adapters."""
    base = plan.build(INPUTS)
    lora = lorafx.compile(base, CONFIG, capture=capture, autocast_adapter_dtype=False)
    for name in shares.keys() - ALONE:
        lora.add_adapter(name, CONFIG)
    if shares != ALONE:
        lora.set_adapter(shares)
    BASES[lora] = base
    return lora


def inputs(seed: int, rows: int = 4) -> Tensor:
    return torch.randn(rows, 6, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(lora: nn.Module, net: nn.Module, seed: int) -> None:
    """Both give the same, in evaluation mode, if what they have counted is the same."""
    net.load_state_dict(buffers(lora), strict=False)
    BASES[lora].eval() if lora in BASES else None
    torch.testing.assert_close(lora.eval()(inputs(seed)), net.eval()(inputs(seed)), **CLOSE)


def check(plan: Plan, capture: str, shares: dict[str, float], folder: str) -> None:
    """Training steps that early calls serve, and then a graph; then one adapted net in all its states."""
    lora = adapted(plan, capture, shares)
    twin = Twin(plan, lora, shares)
    for seed in range(5):
        twin.step(inputs(seed), train=True)
    twin.step(inputs(5), train=False)
    with lora.disable_adapter():
        same(lora, plan.build(INPUTS), 6)
    before = base_weights(lora)
    lora.merge_adapter()
    same(lora, twin.net, 7)
    lora.unmerge_adapter()
    assert all(torch.equal(each, before[path]) for path, each in base_weights(lora).items())
    lora.save_pretrained(folder)
    base = plan.build(INPUTS).eval()
    base.load_state_dict(buffers(lora), strict=False)
    again = lorafx.load(base, folder, capture=capture, autocast_adapter_dtype=False)
    same(again, Twin(plan, lora, ALONE).net, 8)
    same(lora.merge_and_unload(), twin.net, 9)


SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def examples(count: int) -> Any:
    """So many, the same in each run. Run more by hand: `check` and `check_rows` are functions of what is drawn.

    What fails is not made smaller, which would take many minutes.
    """
    how = {"derandomize": True, "database": None, "phases": [Phase.generate], "suppress_health_check": SLOW}
    return settings(max_examples=count, deadline=None, **how)


@pytest.mark.slow
@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("capture", ["auto", "sites"])
@examples(6)
@given(plan=plans(sorted(LAYERS)), shares=st.sampled_from([ALONE, {"default": 0.75, "other": -0.25}]))
@pytest.mark.filterwarnings("ignore")
def test_adapters_act_by_whatever_road_a_layer_is_reached(capture, plan, shares, tmp_path):
    check(plan, capture, shares, tempfile.mkdtemp(dir=tmp_path))


def check_rows(plan: Plan, capture: str) -> None:
    """Each row is what the twin of its adapter makes of it, and trains that adapter alone."""
    lora = adapted(plan, capture, {"default": 1.0, "other": 1.0})
    names = ["default", "other", "__base__", "other", "other", "default", "default"]  # as many as nothing else
    twins = {name: Twin(plan, lora, {} if name == "__base__" else {name: 1.0}) for name in set(names)}
    for seed in range(5):
        x = inputs(seed, len(names)).requires_grad_()  # or re-entrant checkpoints would train nothing
        lora.zero_grad()
        actual = lora(x, adapter_names=names)
        actual.square().sum().backward()
        for name, twin in twins.items():
            rows = [row for row, each in enumerate(names) if each == name]
            twin.net.zero_grad()
            expected = twin.net(x)[rows]
            torch.testing.assert_close(actual[rows], expected, **CLOSE)
            expected.square().sum().backward()
            twin.compare_gradients()


@pytest.mark.slow
@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("capture", ["auto", "sites"])
@examples(8)
@given(plan=plans(sorted(LAYERS.keys() - MIXES_ROWS)))
@pytest.mark.filterwarnings("ignore")
def test_rows_have_their_adapters_by_whatever_road_a_layer_is_reached(capture, plan):
    check_rows(plan, capture)

"""split_reads: a part of a parameter is a slice of it, and so a site can be read in parts."""

from __future__ import annotations

import re

import pytest
import torch
from modules import cases
from torch import Tensor, nn
from torch.func import functional_call

import lorafx
from lorafx.errors import ConfigError, UncoveredOperatorError
from lorafx.graph.printing import graph_lines
from lorafx.passes import Canonicalize, SplitReads
from lorafx.pipeline import Pipeline

EPS = torch.finfo(torch.float32).eps


class Packed(nn.Module):
    """A linear layer of 7 rows that is read in two parts, each with an input of its own."""

    def __init__(self, cut):
        super().__init__()
        self.layer = nn.Linear(5, 7)
        self.cut = cut

    def forward(self, x, y):
        (a, b), (c, d) = self.cut(self.layer.weight), self.cut(self.layer.bias)
        return torch.cat([nn.functional.linear(x, a, c), nn.functional.linear(y, b, d)], -1)


CUTS = {
    "chunk": lambda t: t.chunk(2),
    "split": lambda t: t.split(4),
    "split in sizes": lambda t: t.split([3, 4]),
    "slices": lambda t: (t[:2], t[2:]),
}


@pytest.mark.parametrize("cut", cases(CUTS, quick=["split", "slices"]))
def test_each_way_to_cut_becomes_slices(cut):
    model, call = Packed(CUTS[cut]), (torch.randn(2, 3, 5), torch.randn(2, 3, 5))
    gm = lorafx.trace(model, *call)
    Pipeline(Canonicalize(), SplitReads()).run(gm)
    assert torch.equal(gm(*call), model(*call))
    lines = graph_lines(gm)
    assert sum("slice.Tensor(layer_weight, 0, " in line for line in lines) == 2, lines
    assert not any("chunk" in line or "split" in line or "getitem" in line for line in lines), lines


def test_before_and_after():
    gm = lorafx.trace(Packed(CUTS["split"]), torch.randn(2, 5), torch.randn(2, 5))
    Pipeline(Canonicalize(), SplitReads()).run(gm)
    shown = [re.sub(r"s\d+", "n", line) for line in graph_lines(gm) if "slice" in line]
    assert shown == [
        "slice_tensor = slice.Tensor(layer_weight, 0, 0, 4)  # (4, 5)",
        "slice_tensor_1 = slice.Tensor(layer_weight, 0, 4, 7)  # (3, 5)",
        "slice_tensor_2 = slice.Tensor(layer_bias, 0, 0, 4)  # (4)",
        "slice_tensor_3 = slice.Tensor(layer_bias, 0, 4, 7)  # (3)",
        "linear = linear(x, slice_tensor, slice_tensor_2)  # (n, 4)",
        "linear_1 = linear(y, slice_tensor_1, slice_tensor_3)  # (n, 3)",
    ]


@pytest.mark.slow
def test_what_is_cut_otherwise_is_left():
    class Columns(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            left, right = self.layer.weight.chunk(2, dim=1)
            first, second = x.chunk(2)  # no parameter
            return first[:, :3] @ left.T + second[:, 3:] @ right.T

    gm = lorafx.trace(Columns(), torch.randn(4, 6))
    before = graph_lines(gm)
    SplitReads().rewrite(gm, None)
    assert graph_lines(gm) == before
    lora = lorafx.compile(Columns(), {"target_modules": ["layer"]})
    with pytest.raises(UncoveredOperatorError, match="layer"):
        lora(torch.randn(4, 6))


@pytest.mark.parametrize("cut", ["chunk", pytest.param("split in sizes", marks=pytest.mark.slow)])
def test_a_weight_read_in_parts_is_adapted_in_parts(cut):
    torch.manual_seed(0)
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["layer"], "init_lora_weights": False}
    lora = lorafx.compile(Packed(CUTS[cut]), config)
    lora.add_adapter("other", config | {"r": 2})
    lora.set_adapter(["default", "other"])
    assert_equals_the_sum(lora, ["layer"], torch.randn(2, 3, 5), torch.randn(2, 3, 5))


def test_by_sites_a_cut_outside_any_part_is_refused():
    lora = lorafx.compile(Packed(CUTS["chunk"]), {"target_modules": ["layer"]}, capture="sites")
    with pytest.raises(UncoveredOperatorError, match="layer"):
        lora(torch.randn(2, 5), torch.randn(2, 5))


class Attention(nn.Module):
    """Attention of a width of its own; keys and values come from where queries do, from elsewhere, or each from its own
    place. That decides how torch reads the packed weight."""

    def __init__(self, sources: int, bias: bool = True):
        super().__init__()
        self.sources = sources
        self.inner = nn.MultiheadAttention(12, 3, batch_first=True, bias=bias)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        key, value = {1: (x, x), 2: (y, y), 3: (y, z)}[self.sources]
        return self.inner(x, key, value, need_weights=False)[0]


def inputs() -> list[Tensor]:
    return [torch.randn(2, length, 12) for length in (5, 7, 7)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sources", "bias", "capture"),
    [
        (1, True, "graph"),
        (2, False, "graph"),
        (3, True, "graph"),
        (1, False, "sites"),
        (2, True, "sites"),
        (3, True, "sites"),
    ],
)
def test_multihead_attention_is_adapted(sources, bias, capture):
    torch.manual_seed(0)
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["inner"], "init_lora_weights": False}
    lora = lorafx.compile(Attention(sources, bias), config, capture=capture)
    assert [site.name for site in lora.sites] == ["inner", "inner.out_proj"]
    assert_equals_the_sum(lora, ["inner", "inner.out_proj"], *inputs())


def assert_equals_the_sum(lora: lorafx.AdaptedModel, sites: list[str], *call: Tensor) -> None:
    """Outputs and gradients are those of the base with W + s·BA in W's place, in float64; merged outputs too."""
    base = lora._lorafx.base
    output = lora(*call)
    output.square().sum().backward()
    factors = {n: p.detach().double().requires_grad_() for n, p in lora.named_parameters() if ".lora_" in n}
    weights = {n: p.detach().double() for n, p in base.named_parameters()}
    for site in lora.sites:
        for name, config in lora.peft_config.items():
            a, b = (factors[f"{site.name}.lora_{f}.{name}.weight"] for f in "AB")
            weights[site.weight] = weights[site.weight] + config.lora_alpha / config.r * b @ a
    expected = functional_call(base, weights, tuple(x.double() for x in call))
    expected.square().sum().backward()
    scale = expected.abs().max()
    assert (output - expected).abs().max() <= 8 * EPS * scale
    for name, factor in factors.items():
        gradient = lora.get_parameter(name).grad
        assert gradient is not None and (gradient - factor.grad).abs().max() <= 64 * EPS * factor.grad.abs().max(), name
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    lora.merge_adapter()
    assert (lora(*call) - expected).abs().max() <= 8 * EPS * scale
    lora.unmerge_adapter()
    assert all(torch.equal(before[name], parameter) for name, parameter in base.named_parameters())


def test_patterns_mean_the_attention_as_a_whole():
    config = {"r": 4, "target_modules": ["inner"], "rank_pattern": {"inner": 2}}
    lora = lorafx.compile(Attention(1), config)
    assert {p.shape[0] for n, p in lora.named_parameters() if "lora_A" in n} == {2}


def test_attention_with_three_weights_or_a_bias_of_its_own_is_refused():
    apart = Attention(3)
    apart.inner = nn.MultiheadAttention(12, 3, kdim=8, vdim=8, batch_first=True)
    with pytest.raises(lorafx.errors.SelectionError, match="inner"):
        lorafx.compile(apart, {"target_modules": ["inner"]})
    with pytest.raises(ConfigError, match="lora_bias"):
        lorafx.compile(Attention(1), {"target_modules": ["inner"], "lora_bias": True})

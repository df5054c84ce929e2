"""Weights of torchao: adapted, trained, merged and restored, on the CPU."""

import pytest
import torch
from packed_layers import CONFIG, Layers, formula, hold
from torch import nn

import lorafx
from lorafx.errors import AdapterError, LorafxError, MergeError

quantization = pytest.importorskip("torchao.quantization")
CLOSE = {"rtol": 0, "atol": 128 * torch.finfo(torch.float32).eps}
pytestmark = pytest.mark.slow


def build(config):
    base = Layers(nn.Linear).requires_grad_(False)
    quantization.quantize_(base, config)
    return base


@pytest.mark.parametrize(
    ("kind", "within"),
    [("Int8WeightOnlyConfig", 0.02), ("Float8WeightOnlyConfig", 0.1), ("IntxWeightOnlyConfig", 0.02)],
)
def test_all_that_can_be_done_with_a_quantised_base(kind, within, tmp_path):
    """Steps are 1/127 of a row's largest number, and in float8 at most 1/16 of each number."""
    base, x = build(getattr(quantization, kind)()), torch.randn(2, 5, 64)
    lora = hold(base, x, tmp_path, CLOSE, pickles=False)  # torchao's tensors cannot be
    expected = lora(x)
    before = [parameter.data.qdata.clone() for parameter in base.parameters() if hasattr(parameter.data, "qdata")]
    with pytest.warns(UserWarning, match="loses what that cannot hold"):
        lora.merge_adapter()
    assert 0 < (lora(x) - expected).norm() / expected.norm() < within
    lora.unmerge_adapter()
    after = [parameter.data.qdata for parameter in base.parameters() if hasattr(parameter.data, "qdata")]
    assert len(before) == 6 and all(map(torch.equal, before, after))
    torch.testing.assert_close(lora(x), expected, rtol=0, atol=0)


def test_activations_may_be_rounded_too(tmp_path):
    """By integers in each call: where rounding is near a half, another order of summation may go to another integer."""
    base, x = build(quantization.Int8DynamicActivationInt8WeightConfig()), torch.randn(2, 5, 64)
    hold(base, x, tmp_path, {"rtol": 0, "atol": 0.1}, ways=["graph", "sites"], pickles=False)


def test_codes_of_4_bits_in_groups(tmp_path):
    """A scale for each 32 numbers; steps are 1/7 of the largest of them."""
    options = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)}
    base, x = build(quantization.IntxWeightOnlyConfig(**options)), torch.randn(2, 5, 64)
    lora = hold(base, x, tmp_path, CLOSE, ways=["sites"], pickles=False)
    expected = lora(x)
    lora.merge_adapter()
    assert 0 < (lora(x) - expected).norm() / expected.norm() < 0.3
    lora.unmerge_adapter()
    torch.testing.assert_close(lora(x), expected, rtol=0, atol=0)


def test_asymmetric_codes_are_not_merged_into():
    mapping = quantization.MappingType.ASYMMETRIC
    base = build(quantization.IntxWeightOnlyConfig(mapping_type=mapping))
    lora, x = lorafx.compile(base, CONFIG, capture="sites"), torch.randn(3, 64)
    expected = lora(x)
    with pytest.raises(MergeError, match=r"layers\.0\.up.*cannot be merged into.*original checkpoint"):
        lora.merge_adapter()
    torch.testing.assert_close(lora(x), expected, rtol=0, atol=0)


def test_int4_of_cpus_is_for_inference():
    """torchao 0.18 packs int4 weights for CPUs in one form, of which there is neither a derivative nor a dense weight.

    Its usual formats (`Int4WeightOnlyConfig`) are made on GPUs.
    """
    int4 = pytest.importorskip("torchao.prototype.quantization.int4")
    base, x = Layers(nn.Linear, depth=2).requires_grad_(False), torch.randn(3, 64)
    quantization.quantize_(base, int4.PrototypeInt4WeightOnlyConfig(group_size=32))
    for capture in ("graph", "sites"):
        lora = lorafx.compile(base, CONFIG, capture=capture)
        y = lora(x)
        torch.testing.assert_close(y, formula(base, lora, x), **CLOSE)
        with pytest.raises(AdapterError, match=r"Linear computes with an operator that has no derivative.*inference"):
            y.sum().backward()
        before = base.layers[0].up.weight.qdata.clone()
        with pytest.raises(MergeError, match=r"Int4OpaqueTensor of torchao cannot be made dense.*original checkpoint"):
            lora.merge_adapter()
        assert torch.equal(before, base.layers[0].up.weight.qdata)
    with pytest.raises(LorafxError, match="Int4OpaqueTensor"):
        lorafx.compile(base, CONFIG | {"use_dora": True})


def test_layers_are_called_by_name_and_in_inference_mode(early):
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 128), nn.Linear(128, 64)

        def forward(self, x):
            return self.b(self.a(input=x))

    base, x = ByName().requires_grad_(False), torch.randn(3, 64)
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    wanted = None
    for capture in ("graph", "sites", "auto"):
        lora = lorafx.compile(base, CONFIG | {"target_modules": ["a"]}, capture=capture, random_state=0)
        with torch.inference_mode():
            found = lora(x)
        wanted = found if wanted is None else wanted
        torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("capture", ["auto", "graph", "sites"])
def test_quantising_what_is_adapted_already_is_an_error_that_says_so(capture):
    base = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 96))  # the last is like the first
    lora = lorafx.compile(base, {"target_modules": ["0", "2"]}, capture=capture)
    x = torch.randn(2, 64)
    lora(x)
    quantization.quantize_(lora, quantization.Int8WeightOnlyConfig(), lambda module, path: path == "2")
    for use in (lambda: lora(x), lambda: lora[2](x), lora.merge_adapter):
        with pytest.raises(AdapterError, match="2: quantised since"):
            use()

"""Weights of bitsandbytes in 8 bits: adapted, trained, merged and restored, on the CPU."""

import pytest
import torch
from packed_layers import CONFIG, Layers, hold, hold_merged, hold_rows
from torch import nn

import lorafx
from lorafx.adapters.storages import weights_of
from lorafx.errors import SelectionError

bnb = pytest.importorskip("bitsandbytes")
CLOSE = {"rtol": 0, "atol": 128 * torch.finfo(torch.float32).eps}


def build(**options):
    return Layers(lambda i, o: bnb.nn.Linear8bitLt(i, o, **options)).to("cpu").train()


@pytest.mark.slow
@pytest.mark.parametrize("floats", [False, True], ids=["int8", "has_fp16_weights"])
def test_all_that_can_be_done_with_a_quantised_base(floats, tmp_path):
    base, x = build(has_fp16_weights=floats), torch.randn(2, 5, 64)
    lora = hold(base, x, tmp_path, CLOSE)
    hold_merged(base, lora, x, within=0.02)  # 8 bits: steps of 1/127 of a row's largest number


def test_a_dense_weight_is_what_bitsandbytes_computes_with():
    layer = bnb.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False).to("cpu").train()
    ((name, _, storage),) = weights_of(layer)
    dense = storage.dense(storage.of(layer).stored(layer, name))
    torch.testing.assert_close(layer(torch.eye(64)).T, dense, rtol=1e-6, atol=0)
    again = storage.stored(layer, name)  # its scale is elsewhere once a layer has run
    torch.testing.assert_close(storage.dense(again), dense, rtol=0, atol=0)


def test_evaluation_rounds_activations_as_the_layer_does(tmp_path):
    """There bitsandbytes multiplies integers; the adapter sees x unrounded."""
    base, x = build(has_fp16_weights=False).eval(), torch.randn(7, 64)
    layer = lorafx.compile(base, CONFIG, capture="graph").eval()
    up = layer.layers[0].up
    seen = []
    handle = base.layers[0].up.register_forward_hook(lambda module, args, output: seen.append(output))
    base(x)
    handle.remove()
    update = 2 * x @ up.lora_A.default.weight.T @ up.lora_B.default.weight.T
    torch.testing.assert_close(up(x), seen[0] + update, **CLOSE)


def test_what_a_layer_remembers_of_its_floats_is_forgotten_by_a_merge():
    base, x = build(has_fp16_weights=True).eval(), torch.randn(7, 64)
    lora = lorafx.compile(base, CONFIG, capture="sites").eval()
    with torch.no_grad():
        expected, plain = lora(x), base(x)
        lora.merge_adapter()
        assert (base(x) - expected).norm() < 0.02 * (expected - plain).norm() + 0.02 * expected.norm()
        lora.unmerge_adapter()
        torch.testing.assert_close(base(x), plain, rtol=0, atol=0)


def test_embeddings():
    hold_rows(bnb.nn.Embedding8bit(32, 64), CLOSE)


def test_what_is_not_quantised_yet_is_an_error():
    with pytest.raises(SelectionError, match=r"layers\.0\.up.*not been quantised to 8 bits"):
        lorafx.compile(Layers(lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False)), CONFIG)


def test_under_autocast_the_dtype_stays_that_of_the_input():
    """bitsandbytes' training forward follows autocast, its evaluation does not; a graph cannot ask which."""
    base, x = build(has_fp16_weights=False), torch.randn(7, 64)
    for capture in ("graph", "sites"):
        lora = lorafx.compile(base, CONFIG, capture=capture, random_state=0)
        expected = lora(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = lora(x)
        found.sum().backward()
        assert (found - expected).norm() < 2**-5 * expected.norm()  # six layers, each rounded to 8 bits


def test_a_model_that_asks_for_the_size_of_a_quantised_weight_gets_it():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.packed, self.head = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False), nn.Linear(128, 5)

        def forward(self, x):
            return self.head(self.packed(x)) / self.packed.weight.shape[0]

    base, x = Scaled().to("cpu"), torch.randn(3, 64)
    graph, sites = (
        lorafx.compile(base, CONFIG | {"target_modules": ["head"]}, capture=capture, random_state=0)
        for capture in ("graph", "sites")
    )
    torch.testing.assert_close(graph(x), sites(x), **CLOSE)


def test_adapters_have_the_dtype_that_pefts_have():
    """Whatever bitsandbytes quantised from: values are not rounded to float16 on the way."""
    lora = lorafx.compile(build(has_fp16_weights=False), CONFIG, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in lora.parameters() if parameter.requires_grad} == {torch.float32}

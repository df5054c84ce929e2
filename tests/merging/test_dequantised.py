"""Dense models of quantised ones: what their layers stand for, with adapters in it, rounded once."""

import pytest
import torch
import transformers
from packed_layers import CONFIG, SCALING, Layers, Packed
from torch import nn

import lorafx
from lorafx.adapters.storages import weights_of
from lorafx.errors import ConfigError, MergeError

bnb = pytest.importorskip("bitsandbytes")
MAKERS = {
    "4 bits": lambda i, o: bnb.nn.Linear4bit(i, o, quant_type="nf4"),
    "8 bits": lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False),
}


def dense(layer):
    """What a layer of bitsandbytes stands for, in float64."""
    ((name, _, storage),) = weights_of(layer)
    storage = storage.of(layer)
    return storage.dense(storage.stored(layer, name)).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_weights_are_rounded_once(kind, dtype):
    base = Layers(MAKERS[kind], depth=2).to("cpu")
    lora = lorafx.compile(base, CONFIG | {"bias": "all"}, capture="sites")
    with torch.no_grad():
        lora.layers[0].up.trained_bias.default.bias.add_(1)
    wanted = {}
    for path in ("layers.0.up", "layers.1.down"):
        layer = lora.get_submodule(path)
        a, b = (getattr(layer, f"lora_{x}").default.weight.detach().double() for x in "AB")
        wanted[path] = (dense(base.get_submodule(path)) + SCALING * b @ a).to(dtype)
    bias = lora.layers[0].up.trained_bias.default.bias.detach().to(dtype)
    model = lora.merge_and_unload(dtype=dtype)
    assert model is base and {type(m) for m in model.modules()} == {
        Layers,
        type(model.layers[0]),
        nn.Linear,
        nn.ModuleList,
    }
    for path, weight in wanted.items():
        torch.testing.assert_close(model.get_submodule(path).weight.data, weight, rtol=0, atol=0)
    torch.testing.assert_close(model.layers[0].up.bias.data, bias, rtol=0, atol=0)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_layers_that_nothing_adapts_become_dense_too_and_merged_ones_are_taken_apart_first():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.up = bnb.nn.EmbeddingNF4(32, 64), MAKERS["4 bits"](64, 128)
            self.down, self.head = MAKERS["4 bits"](128, 64), nn.Linear(64, 5)

        def forward(self, x):
            return self.head(self.down(torch.relu(self.up(self.rows(x)))))

    base, x = Net().to("cpu"), torch.randint(0, 32, (2, 7))
    lora = lorafx.compile(base, CONFIG | {"target_modules": ["rows", "up", "head"]}, capture="sites")
    expected = lora(x)
    with pytest.warns(UserWarning, match="loses what that cannot hold"):
        lora.merge_adapter()
    model = lora.merge_and_unload(dtype=torch.float32)
    assert [type(child) for child in model.children()] == [nn.Embedding, nn.Linear, nn.Linear, nn.Linear]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_transformers_models_are_saved_and_loaded_as_dense_ones(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    in_4_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=in_4_bits, dtype=torch.float32, device_map={"": "cpu"}
    )
    lora = lorafx.compile(base, {"r": 4, "target_modules": "all-linear", "init_lora_weights": False})
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        expected = lora(input_ids=ids).logits
        lora.merge_and_unload(dtype=torch.bfloat16).save_pretrained(tmp_path / "merged")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        found = loaded(input_ids=ids).logits
    assert not hasattr(loaded.config, "quantization_config")
    assert (found - expected).norm() / expected.norm() < 2**-6  # bfloat16 has 8 bits, through two layers


def test_what_nobody_can_read_is_an_error_and_nothing_changes():
    base, x = Layers(Packed, depth=1), torch.randn(3, 64)
    lora = lorafx.compile(base, CONFIG, capture="sites")
    expected = lora(x)
    with pytest.raises(MergeError, match=r"layers\.0\.up is stored as opaque"):
        lora.merge_and_unload(dtype=torch.bfloat16)
    torch.testing.assert_close(lora(x), expected, rtol=0, atol=0)


def test_a_dtype_that_is_none_is_an_error():
    lora = lorafx.compile(Layers(MAKERS["4 bits"], depth=1).to("cpu"), CONFIG)
    for wrong in ("bfloat16", torch.int8):
        with pytest.raises(ConfigError, match="dtype="):
            lora.merge_and_unload(dtype=wrong)


def test_what_merging_loses_is_told_of_each_weight_and_of_the_worst():
    base = Layers(MAKERS["4 bits"], depth=2).to("cpu")
    lora = lorafx.compile(base, CONFIG)
    wanted = {}
    for site in lora.sites:
        layer = lora.get_submodule(site.module)
        a, b = (getattr(layer, f"lora_{x}").default.weight.detach().double() for x in "AB")
        wanted[site.weight] = dense(base.get_submodule(site.module)) + SCALING * b @ a
    with pytest.warns(UserWarning) as told:
        lora.merge_adapter()
    lost = {}
    for path, full in wanted.items():
        lost[path] = float((dense(base.get_submodule(path.rpartition(".")[0])) - full).norm() / full.norm())
    assert lora.report().lost == pytest.approx(lost, rel=1e-5) and min(lost.values()) > 0.01
    (message,) = [str(each.message) for each in told]
    assert message.startswith(f"{max(lost, key=lost.get)} is stored as bitsandbytes 4-bit, as 3 other weights")
    assert f"{max(lost.values()):.1%} of this one" in message and f"{max(lost.values()):.2%}" in str(lora.report())
    lora.unmerge_adapter()
    assert lora.report().lost == {}

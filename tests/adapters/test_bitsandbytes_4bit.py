"""Weights of bitsandbytes in 4 bits: adapted, trained, merged and restored, on the CPU."""

import gc

import peft
import pytest
import torch
from packed_layers import CONFIG, Layers, hold, hold_merged, hold_rows, trained
from torch import nn

import lorafx
from lorafx.adapters.storages import weights_of
from lorafx.errors import AdapterError, LorafxError, SelectionError

bnb = pytest.importorskip("bitsandbytes")
# Products of 64 and 128 numbers in float32, six layers deep.
CLOSE = {"rtol": 0, "atol": 128 * torch.finfo(torch.float32).eps}


def build(dtype=torch.float32, **options):
    def linear(inputs, outputs):
        layer = bnb.nn.Linear4bit(inputs, outputs, compute_dtype=dtype, **options)
        return layer

    return Layers(linear).to(dtype).to("cpu").train()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "twice"), [("nf4", True), ("fp4", False)], ids=["nf4, absmax quantised", "fp4, absmax in float32"]
)
def test_all_that_can_be_done_with_a_quantised_base(kind, twice, tmp_path):
    base, x = build(quant_type=kind, compress_statistics=twice), torch.randn(2, 5, 64)
    lora = hold(base, x, tmp_path, CLOSE)
    hold_merged(base, lora, x, within=0.2)  # 4 bits: steps of about an eighth of a block's largest number


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_packed_bytes_may_be_kept_as_any_dtype(storage, tmp_path):
    base, x = build(quant_storage=storage), torch.randn(7, 64)
    lora = hold(base, x, tmp_path, CLOSE, ways=["sites"])
    hold_merged(base, lora, x, within=0.2)


def test_computing_in_another_dtype_rounds_the_base_alone(tmp_path):
    """As in PEFT, an update is computed in the dtype of x."""
    base = Layers(lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=torch.bfloat16)).to("cpu")
    hold(base, torch.randn(7, 64), tmp_path, CLOSE, ways=["graph"])


@pytest.mark.parametrize("computed", [None, torch.bfloat16])
def test_adapters_have_the_dtype_that_pefts_have(computed):
    """That in which a layer computes if that is said, whatever the bytes are kept as."""
    base = Layers(lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=computed, quant_storage=torch.float16), depth=1)
    lora = lorafx.compile(base.to("cpu"), CONFIG, autocast_adapter_dtype=False)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**CONFIG), autocast_adapter_dtype=False)
    expected, found = ({p.dtype for p in model.parameters() if p.requires_grad} for model in (theirs, lora))
    assert found == expected == {computed or torch.float32}


def test_a_dense_weight_is_what_bitsandbytes_computes_with():
    layer = bnb.nn.Linear4bit(64, 96, bias=False, quant_type="nf4").to("cpu").train()
    ((name, _, storage),) = weights_of(layer)
    storage = storage.of(layer)
    dense = storage.dense(storage.stored(layer, name))
    torch.testing.assert_close(layer(torch.eye(64)).T, dense, rtol=0, atol=0)
    assert storage.shape(layer, name) == (96, 64)


def test_what_was_packed_for_the_cpu_is_unpacked(tmp_path):
    """Where a processor has bfloat16 in AVX-512, a base that ran in evaluation is kept otherwise than before."""
    for twice, kept_as in ((True, torch.uint8), (False, torch.bfloat16)):
        base, x = build(compress_statistics=twice, quant_storage=kept_as), torch.randn(7, 64)
        before = base(x).detach()
        for layer in base.modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                pack = bnb.functional._convert_weight_packed_for_cpu
                layer.weight.data, layer.weight.quant_state = pack(layer.weight.data, layer.weight.quant_state)
        lora = lorafx.compile(base, {**CONFIG, "init_lora_weights": True}, capture="sites")
        y = lora(x)
        assert (y - before).norm() < 2**-8 * before.norm(), "absmax was rounded to bfloat16, and nothing else"
        y.sum().backward()
        lora.eval()
        torch.testing.assert_close(lora(x), y, rtol=0, atol=0)
        assert not any(
            getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
            for layer in lora.modules()
            if isinstance(layer, bnb.nn.Linear4bit)
        )
        for parameter in lora.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        hold_merged(base.train(), lora.train(), x, within=0.2)


def test_embeddings():
    hold_rows(bnb.nn.EmbeddingNF4(32, 64), CLOSE)


def test_biases_train_as_the_adapters_own_copies():
    base, x = build(), torch.randn(7, 64)
    lora = lorafx.compile(base, CONFIG | {"bias": "all"}, capture="sites")
    before = lora(x).detach()
    lora(x).sum().backward()
    grads = [p.grad for n, p in lora.named_parameters() if "bias" in n and p.requires_grad]
    assert len(grads) == 6 and all(grad is not None for grad in grads)
    with torch.no_grad():
        lora.layers[0].up.trained_bias.default.bias.add_(1)
    assert (lora(x) - before).abs().max() > 0.1
    with lora.disable_adapter():
        torch.testing.assert_close(lora(x), base(x), rtol=0, atol=0)


def test_what_is_not_quantised_yet_is_an_error():
    base = Layers(lambda i, o: bnb.nn.Linear4bit(i, o))
    before = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(SelectionError, match=r"layers\.0\.up.*not been quantised to 4 bits.*model\.to\(device\)"):
        lorafx.compile(base, CONFIG)
    assert before == {name: id(module) for name, module in base.named_modules()}


def test_an_adapter_of_the_packed_shape_is_an_error(tmp_path):
    lorafx.compile(Layers(nn.Linear), CONFIG).save_pretrained(tmp_path)
    base = Layers(lambda i, o: bnb.nn.Linear4bit(i, o + 64)).to("cpu")
    with pytest.raises(LorafxError, match=r"layers\.0\.up"):
        lorafx.load(base, tmp_path)


def test_the_bases_own_calls_leave_shared_weights_as_they_are():
    """In evaluation bitsandbytes would pack them for the CPU, and could not find the way back."""
    base, x = build(quant_type="nf4"), torch.randn(7, 64)
    lora = lorafx.compile(base, CONFIG, capture="sites")
    expected = lora(x)
    with torch.no_grad():
        base.eval()(x)
    torch.testing.assert_close(lora(x), expected, rtol=0, atol=0)
    lora.merge_adapter()
    with torch.no_grad():
        base(x)
    lora.unmerge_adapter()
    torch.testing.assert_close(lora(x), expected, rtol=0, atol=0)


def test_what_has_no_forward_mode_derivative_says_so():
    """bitsandbytes drops the tangent, and what comes out would be a number."""
    base, x = build(), torch.randn(3, 64)
    lora = lorafx.compile(base, CONFIG, capture="sites")
    with pytest.raises(AdapterError, match="no forward-mode derivative"):
        torch.func.jvp(lora, (x,), (x,))


def test_a_graph_of_a_quantised_base_needs_no_adapter():
    base, x = build(), torch.randn(7, 64, requires_grad=True)
    graph = lorafx.trace(base, x)
    gc.collect()
    assert str(graph.code).count("lorafx.own_forward") == 6
    torch.testing.assert_close(graph(x), base(x), rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(graph(x).sum(), x), torch.autograd.grad(base(x).sum(), x), rtol=0, atol=0
    )
    assert graph(torch.randn(3, 64)).shape == (3, 64)
    lora = lorafx.compile(base, CONFIG)
    torch.testing.assert_close(lorafx.trace(lora, x)(x), base(x), rtol=0, atol=0)


@pytest.mark.parametrize("full", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_go_through_the_weight_that_bitsandbytes_multiplies_by(full):
    """It rounds W to the dtype of the full weight for backward, and not for forward."""
    base, x = build(full, quant_type="nf4"), torch.randn(7, 64, requires_grad=True)
    for layer in base.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.compute_dtype = torch.float32
    found = []
    for passes in (lorafx.passes.default, lorafx.passes.default.without("fuse_own_layers")):
        lora = lorafx.compile(base, CONFIG, random_state=0, pipeline=passes, capture="graph")
        found.append(torch.autograd.grad(lora(x).square().sum(), [x, *trained(lora)]))
    for one, other in zip(*found):
        size = other.abs().max()
        torch.testing.assert_close(one / size, other / size, **CLOSE)

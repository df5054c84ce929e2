"""Layers whose weight nobody else can read: the adapter acts beside their own forward."""

import warnings
from types import MethodType

import pytest
import torch
from packed_layers import CONFIG, Elsewhere, Layers, Packed, formula, hold, trained
from torch import nn

import lorafx
from lorafx.adapters import kinds
from lorafx.adapters.planning import plan
from lorafx.adapters.readings import LINEAR
from lorafx.adapters.storages import weights_of
from lorafx.adapters.storages.opaque import Opaque
from lorafx.errors import AdapterError, ConfigError, MergeError

CLOSE = {"rtol": 0, "atol": 128 * torch.finfo(torch.float32).eps}


@pytest.mark.slow
@pytest.mark.parametrize("layer", [Packed, Elsewhere])
def test_all_that_can_be_done_with_a_layer_of_somebodys_own(layer, tmp_path):
    base, x = Layers(layer), torch.randn(2, 5, 64)
    lora = hold(base, x, tmp_path, CLOSE)
    expected = lora(x)
    with pytest.raises(MergeError, match=r"layers\.0\.up.*only the module itself"):
        lora.merge_adapter()
    torch.testing.assert_close(lora(x), expected, rtol=0, atol=0)
    assert lora.unload() is base and "forward" not in vars(base.layers[0].up)


def test_all_linear_layers_are_those_that_are_packed_too():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.packed, self.elsewhere, self.head = Packed(64, 32), Elsewhere(32, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.elsewhere(self.packed(x)))

    base, x = Head(), torch.randn(3, 64)
    lora = lorafx.compile(base, {"r": 2, "target_modules": "all-linear", "init_lora_weights": False})
    assert [site.name for site in lora.sites] == ["packed", "head"]
    lora(x).sum().backward()
    assert len(trained(lora)) == 4 and all(parameter.grad is not None for parameter in trained(lora))


def test_a_layer_beside_an_adapted_one_of_its_class_is_a_layer_too():
    """Its function has a backward of its own, as HQQ's has: no graph could look into it."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    class Own(Packed):
        def forward(self, x):
            return Doubled.apply(super().forward(x))

    base, x = nn.Sequential(Own(64, 32), Own(32, 16)), torch.randn(3, 64, requires_grad=True)
    lora = lorafx.compile(base, {"r": 2, "target_modules": ["1"]}, capture="graph")
    lora(x).sum().backward()
    grad, x.grad = x.grad, None
    base(x).sum().backward()
    torch.testing.assert_close(grad, x.grad, rtol=0, atol=0)


def test_a_layer_that_only_has_numbers_of_features_is_not_taken_for_one():
    """Its shape is another than the numbers say; nothing adapts it, and it runs as ever."""

    class Pool(nn.Module):
        in_features, out_features = 64, 8

        def forward(self, x):
            return x.unflatten(-1, (8, 8))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.pool = nn.Linear(16, 64), Pool()

        def forward(self, x):
            return self.pool(self.up(x))

    base, x = Net(), torch.randn(3, 16)
    lora = lorafx.compile(base, {"r": 2, "target_modules": ["up"]}, capture="graph")
    torch.testing.assert_close(lora(x), base(x), **CLOSE)


def test_a_kind_that_needs_the_weight_is_refused(monkeypatch):
    config = kinds.config_of(CONFIG)
    monkeypatch.setattr(type(kinds.kind_of(config)), "reads_weight", True)
    with pytest.raises(ConfigError, match=r"layers\.0\.up.*cannot be read by anyone but the layer"):
        plan(Layers(Packed), "default", config)


def test_first_calls_need_no_graph(early):
    """Of what the layer gives and the update beside it, with the bits of the formula; later calls are a graph."""
    base, x = Layers(Packed), torch.randn(2, 5, 64)
    lora = lorafx.compile(base, CONFIG | {"bias": "lora_only"})
    with torch.no_grad():
        lora.layers[0].up.trained_bias.default.bias.add_(1)
    for _ in range(4):
        lora(x).sum().backward()
    (call,) = lora.explain().calls
    assert call.early == 3 and call.served_by == "graph" and lora.explain().operators == 0
    plain = lorafx.compile(base, CONFIG | {"bias": "lora_only"}, capture="graph")
    plain.load_state_dict(lora.state_dict())
    torch.testing.assert_close(lora(x), plain(x), rtol=0, atol=0)


def test_adapters_have_the_dtype_that_a_layer_computes_in():
    """That of what is kept beside the weight, as scales, is none of theirs."""

    def half(inputs, outputs):
        layer = Packed(inputs, outputs)
        layer.scales = layer.scales.half()
        return layer

    for computed, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        base = Layers(half, depth=1)
        for layer in (base.layers[0].up, base.layers[0].down) if computed else ():
            layer.compute_dtype = computed
        lora = lorafx.compile(base, CONFIG, autocast_adapter_dtype=False)
        assert {parameter.dtype for parameter in trained(lora)} == {expected}


class Gated(nn.Module):
    """It has numbers of features and packed numbers, and is given two tensors, and gives two."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("codes", torch.ones(outputs, inputs, dtype=torch.int8))

    def forward(self, x, gate):
        return x @ self.codes.to(x.dtype).T * gate, None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gated, self.head = Gated(64, 32), nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.gated(x, torch.tensor(2.0))[0])


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_what_is_like_a_layer_and_no_layer_runs_as_it_is(capture):
    base, x = Net(), torch.randn(3, 64)
    lora = lorafx.compile(base, CONFIG | {"target_modules": ["head"], "init_lora_weights": True}, capture=capture)
    torch.testing.assert_close(lora(x), base(x), **CLOSE)


def test_an_adapter_on_a_layer_of_two_inputs_is_an_error():
    lora = lorafx.compile(Net(), CONFIG | {"target_modules": ["gated"]}, capture="sites")
    with pytest.raises(AdapterError, match="called with more than one tensor"):
        lora(torch.randn(3, 64))


class Cutting(Packed):
    """Whose code gives no gradient, as kernels for inference do."""

    def forward(self, x):
        return super().forward(x.detach())


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_a_layer_that_gives_no_gradient_is_warned_of(capture):
    base = nn.Sequential(nn.Linear(8, 64), Cutting(64, 32)).requires_grad_(False)
    lora = lorafx.compile(base, CONFIG | {"target_modules": ["0", "1"]}, capture=capture)
    with pytest.warns(UserWarning, match="Cutting gives its input no gradient"):
        lora(torch.randn(3, 8))


class PackedLinear(nn.Linear):
    """A layer that is called linear, keeps two numbers in a byte, and reads them itself."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        self.weight = nn.Parameter(torch.randint(0, 256, (inputs * outputs // 2, 1), dtype=torch.uint8), False)

    def forward(self, x):
        codes = torch.cat([self.weight & 15, self.weight >> 4], 1).view(self.out_features, self.in_features)
        return x @ ((codes.to(x.dtype) - 8) / 64).T


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_a_packed_weight_of_a_layer_that_is_called_linear(capture):
    base, x = Layers(PackedLinear, depth=2), torch.randn(3, 64)
    lora = lorafx.compile(base, CONFIG, capture=capture)
    torch.testing.assert_close(lora(x), formula(base, lora, x), **CLOSE)


def test_layers_that_transformers_makes_are_taken_at_first_sight():
    """With the shape of the dense weight, and adapters in floats that can train."""
    from transformers.integrations import bitnet, compressed_tensors, eetq, fbgemm_fp8, finegrained_fp8, higgs
    from transformers.integrations.gguf.utils import GgufLinear
    from transformers.integrations.metal_quantization import MetalLinear

    for layer in (
        finegrained_fp8.FP8Linear(256, 128, block_size=(32, 32)),
        finegrained_fp8.FP8Linear(256, 128, has_bias=True),
        fbgemm_fp8.FbgemmFp8Linear(256, 128, True),
        compressed_tensors.CompressedTensorsFP8Linear(256, 128, True),
        eetq.EetqLinear(256, 128, bias=True),
        MetalLinear(256, 128),
        higgs.HiggsLinear(256, 128, 4, dtype=torch.float16, group_size=32),
        GgufLinear(256, 128, 12, True),
        bitnet.BitLinear(256, 128, True, dtype=torch.float32, use_rms_norm=True),
        bitnet.AutoBitLinear(256, 128, use_rms_norm=True),
    ):
        ((name, reading, storage),) = weights_of(layer)
        assert isinstance(storage, Opaque) and reading is LINEAR, type(layer)
        assert storage.shape(layer, name) == (128, 256)
        assert storage.dtype(layer, name) in (torch.float16, torch.float32)


def bit_linear(inputs, outputs):
    layer = bitnet().BitLinear(inputs, outputs, True, dtype=torch.float32, use_rms_norm=True)
    layer.weight.copy_(bitnet().pack_weights(torch.randint(-1, 2, (outputs, inputs), dtype=torch.float32)))
    layer.weight_scale.fill_(inputs**0.5)
    return layer


def auto_bit_linear(inputs, outputs):
    return bitnet().AutoBitLinear(inputs, outputs, online_quant=outputs > inputs, use_rms_norm=True)


def bitnet():
    from transformers.integrations import bitnet

    return bitnet


@pytest.mark.parametrize("kind", [bit_linear, auto_bit_linear])
@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_layers_of_bitnet_get_the_update_beside_what_they_compute(kind, capture):
    """Not on the rounded input, nor scaled as the output is: so PEFT has it."""
    base, x = Layers(kind, depth=2).requires_grad_(False), torch.randn(3, 64)
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BitLinear rounds its input, and gives it no gradient
        lora = lorafx.compile(base, CONFIG, capture=capture)
        expected = formula(base, lora, x)
        torch.testing.assert_close(lora(x), expected, **CLOSE)
        wanted = torch.autograd.grad(expected.square().sum(), trained(lora))
        lora(x).square().sum().backward()
    for parameter, gradient in zip(trained(lora), wanted):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())
    with pytest.raises(MergeError, match="only the module itself"):
        lora.merge_adapter()


class Codes(torch.Tensor):
    """A weight of a library's own class, as quanto's: codes and a scale that look like a tensor of floats."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Codes(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.detach.default:
            return Codes(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{operator} of codes")


class OfCodes(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        codes = torch.randint(-7, 8, (outputs, inputs), dtype=torch.int8)
        self.weight = nn.Parameter(Codes(codes, torch.tensor(0.02)), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.codes * self.weight.scale, self.bias)


def assert_served(make, capture: str) -> lorafx.AdaptedModel:
    """An adapted model of two such layers, which gives the formula's numbers and trains."""
    base, x = Layers(make, depth=2), torch.randn(3, 64)
    lora = lorafx.compile(base, CONFIG, capture=capture)
    torch.testing.assert_close(lora(x), formula(base, lora, x), **CLOSE)
    lora(x).sum().backward()
    assert all(parameter.grad is not None for parameter in trained(lora))
    return lora


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_a_weight_of_a_librarys_own_class_of_tensors(capture):
    assert_served(OfCodes, capture)


def rounding(inputs, outputs):
    """As compressed-tensors has a layer of dense numbers round weight and input, by a forward of its own."""

    def forward(self, x):
        weight = self.weight.data
        self.weight.data = (16 * weight).round() / 16
        try:
            return type(self).forward(self, x + ((2 * x).round() / 2 - x).detach())
        finally:
            self.weight.data = weight

    layer = nn.Linear(inputs, outputs)
    layer.quantization_scheme, layer.quantization_status = "of 4 bits", "frozen"
    layer.forward = MethodType(forward, layer)
    return layer


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_an_adapter_sees_the_input_of_a_layer_that_rounds_its_own(capture):
    lora = assert_served(rounding, capture)
    with pytest.raises(MergeError, match="only the module itself"):
        lora.merge_adapter()

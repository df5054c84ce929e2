"""Layers whose weight nobody else can read: the adapter acts beside their own forward."""

import pytest
import torch
from packed_layers import CONFIG, Elsewhere, Layers, Packed, formula, hold, trained
from torch import nn

import lorafx
from lorafx.adapters import adapter, kinds
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
        adapter.plan(Layers(Packed), "default", config)


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

"""What holds of adapted quantised layers, whoever quantised them."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict

import torch
from torch import nn

import lorafx

RANK, SCALING = 3, 2.0
CONFIG = {"r": RANK, "lora_alpha": RANK * SCALING, "target_modules": ["up", "down"], "init_lora_weights": False}


class Block(nn.Module):
    """(…, 64) -> (…, 64), by way of 128 features."""

    def __init__(self, linear):
        super().__init__()
        self.up, self.down = linear(64, 128), linear(128, 64)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Layers(nn.Module):
    def __init__(self, linear, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(Block(linear) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Packed(nn.Module):
    """As those of GPTQ: codes of 4 bits in integers of 32, with scales."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.infeatures, self.outfeatures = inputs, outputs
        weight = torch.randn(outputs, inputs) / inputs**0.5
        scales = weight.abs().amax(1, keepdim=True) / 7
        codes = (weight / scales).round().to(torch.int32) + 8
        shifts = 4 * torch.arange(8, dtype=torch.int32)
        self.register_buffer("qweight", (codes.view(outputs, -1, 8) << shifts).sum(-1, dtype=torch.int32))
        self.register_buffer("scales", scales)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        codes = (self.qweight[..., None] >> 4 * torch.arange(8, dtype=torch.int32)) & 15
        return nn.functional.linear(x, (codes.flatten(1) - 8).to(x.dtype) * self.scales, self.bias)


class Elsewhere(nn.Module):
    """Whose weight is no tensor of the module, and whose code looks at numbers."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weights = [torch.randn(outputs, inputs) / inputs**0.5]

    def forward(self, x):
        if float(x.abs().max()) > 1e9:
            raise ValueError("too large")
        return x @ self.weights[0].T


def formula(base, lora, x):
    """What the adapted model computes: each quantised layer as it is by itself, and the update beside it."""

    def adapted(plain, layer, x):
        return plain(x) + SCALING * (x @ layer.lora_A.default.weight.T @ layer.lora_B.default.weight.T).to(x.dtype)

    for plain, layer in zip(base.layers, lora.layers):
        x = x + torch.tanh(adapted(plain.down, layer.down, torch.relu(adapted(plain.up, layer.up, x))))
    return x


def tensors(model):
    """All the bits of a model, packed ones and what they are packed with included."""
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    return {name: tensor.detach().reshape(-1).view(torch.uint8).clone() for name, tensor in state.items()}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def hold(base, x, folder, close, ways=("graph", "sites", "aot_eager"), pickles=True):
    """Adapt a model of equal quantised layers in each way, compare with the formula, save, load, copy; returns it."""
    plain = base(x)
    lora = lorafx.compile(base, CONFIG, capture="graph")
    expected = formula(base, lora, x)
    assert (expected - plain).abs().max() > 0.1, "the adapter makes a difference"
    wanted = torch.autograd.grad(expected.square().sum(), trained(lora))
    lora.save_pretrained(folder)
    options = {"graph": {"capture": "graph"}, "sites": {"capture": "sites"}, "aot_eager": {"backend": "aot_eager"}}
    for way in ways:
        loaded = lorafx.load(base, folder, is_trainable=True, **options[way])
        y = loaded(x)
        torch.testing.assert_close(y, expected, **close)
        y.square().sum().backward()
        for parameter, gradient in zip(trained(loaded), wanted):
            size = gradient.abs().max()
            torch.testing.assert_close(parameter.grad / size, gradient / size, rtol=0, atol=4 * close["atol"])
    for other in (copy.deepcopy(lora), *([pickle.loads(pickle.dumps(lora))] if pickles else [])):
        torch.testing.assert_close(other(x), expected, **close)
    with lora.disable_adapter():
        torch.testing.assert_close(lora(x), plain, **close)
    return lora


def hold_merged(base, lora, x, within):
    """Merge into the quantised weights, and take the adapter out again: every bit is as it was."""
    expected, before = lora(x), tensors(base)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lora.merge_adapter()
    assert any("loses what that cannot hold" in str(each.message) for each in told)
    error = (lora(x) - expected).norm() / expected.norm()
    assert 0 < error < within
    torch.testing.assert_close(base(x), lora(x), rtol=0, atol=0)
    lora.unmerge_adapter()
    assert same(before, tensors(base))
    torch.testing.assert_close(lora(x), expected, rtol=0, atol=0)


def trained(lora):
    return [parameter for parameter in lora.parameters() if parameter.requires_grad]


def hold_rows(rows, close):
    """An embedding of 32 rows and 64 features, adapted, by graph and by sites."""
    base, x = nn.Sequential(OrderedDict(rows=rows, head=nn.Linear(64, 5))).to("cpu"), torch.randint(0, 32, (2, 5))
    for capture in ("graph", "sites"):
        lora = lorafx.compile(base, CONFIG | {"target_modules": ["rows"]}, capture=capture)
        adapted = lora.get_submodule("rows")
        update = SCALING * (adapted.lora_embedding_A.default.T[x] @ adapted.lora_embedding_B.default.T)
        torch.testing.assert_close(lora(x), base.head(base.rows(x) + update), **close)
        lora(x).sum().backward()
        assert adapted.lora_embedding_B.default.grad.abs().max() > 0

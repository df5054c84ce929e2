"""Names of adapters: usable in a graph's Python and as a folder, or refused when the adapter is added."""

import pytest
import torch
from torch import nn

import lorafx
from lorafx.errors import AdapterError

CONFIG = {"r": 2, "target_modules": ["mlp", "attn"], "init_lora_weights": False, "bias": "lora_only"}
REFUSED = ["", ".", "..", "a.b", "a/b", "/a", "a\\b", "a\nb", "a\tb", "\0", "\x7f", "\u2028", "\u200b", "\ud800", 'a"b']
REFUSED += [
    "class",
    "None",
    "ﬁ",
    "e\u0301",
    "x" * 201,
    "é" * 101,
    "forward",
    "training",
    "_modules",
    "T_destination",
    3,
]
# Equal to what modules and tensors are called, the beginning of another's, and what is merely odd.
SERVED = ["mlp", "attn", "lora_A", "lora_B", "weight", "bias", "base_layer", "trained_bias", "modules_to_save", "0"]
SERVED += [
    "default_",
    "d",
    "defaul",
    "Default",
    " ",
    " a",
    "a ",
    "a'b",
    "a b",
    "é",
    "名前",
    "-",
    "~",
    "a%s{0}",
    "$x",
    "a#b",
]
SERVED += ["self", "torch", "print", "x" * 200]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp, self.attn = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.attn(self.mlp(x))


@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_a_name_that_cannot_be_used_is_refused_when_the_adapter_is_added(name, tmp_path):
    lora = lorafx.compile(Two(), CONFIG)
    names = dict(lora.named_parameters())
    lora.save_pretrained(tmp_path)
    for add in (lambda: lora.add_adapter(name, CONFIG), lambda: lora.load_adapter(tmp_path, name)):
        with pytest.raises(AdapterError, match="cannot name an adapter"):
            add()
    assert names == dict(lora.named_parameters())
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        lorafx.compile(Two(), CONFIG, adapter_name=name)


def test_each_adapter_saves_its_own_tensors_whatever_it_is_called(tmp_path):
    lora = lorafx.compile(Two(), CONFIG)
    for seed, name in enumerate(SERVED, 1):
        lora.add_adapter(name, {**CONFIG, "r": 1 + seed % 3})
    for name in lora.peft_config:
        for path in lora._lorafx.adapters[name].paths:
            lora.get_parameter(path).data.normal_()
    lora.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir() if file.is_dir()} == set(SERVED)
    for name in ("default", *SERVED):
        again = lorafx.load(Two(), tmp_path / ("" if name == "default" else name))
        paths = zip(lora._lorafx.adapters[name].paths, again._lorafx.adapters["default"].paths, strict=True)
        assert all(torch.equal(lora.get_parameter(a), again.get_parameter(b)) for a, b in paths)


@pytest.mark.parametrize("name", ["a'b", "self", "a b", "名前", "x" * 200, "weight"])
def test_a_graph_with_an_adapter_of_an_odd_name(name):
    lora, x = lorafx.compile(Two(), CONFIG, adapter_name=name, capture="graph"), torch.randn(2, 4)
    found = lora(x)
    assert torch.equal(found, lorafx.of(lora).graph(x)(x))
    assert torch.allclose(found, lora.merge_and_unload()(x), atol=1e-5)

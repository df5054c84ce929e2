"""Names of adapters: usable in a graph's Python and as a folder, or refused when the adapter is added."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
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
    "__base__",
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


_PARTS = ["mlp", "attn", "lora_A", "default", "weight", "a", "b", "_", "0", ".", "bias", "modules_to_save"]
ANY_NAMES = st.lists(st.lists(st.sampled_from(_PARTS), min_size=1, max_size=3).map("".join), max_size=4, unique=True)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(names=ANY_NAMES)
def test_a_name_is_refused_or_its_adapter_saves_its_own_tensors_and_no_others(names, tmp_path):
    """Names that begin alike, hold one another, or are those of modules."""
    lora, served = lorafx.compile(Two(), CONFIG, adapter_name="first"), ["first"]
    for number, name in enumerate(names):
        if "." in name:
            with pytest.raises(AdapterError, match="cannot name an adapter"):
                lora.add_adapter(name, CONFIG)
            continue
        lora.add_adapter(name, {**CONFIG, "r": 1 + number})
        served.append(name)
    for name in served:
        for path in lora._lorafx.adapters[name].paths:
            lora.get_parameter(path).data.normal_()
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    lora.save_pretrained(folder)
    for name in served:
        found = load_file((folder if name == "default" else folder / name) / "adapter_model.safetensors")
        own = lorafx.get_peft_model_state_dict(lora, adapter_name=name)
        assert found.keys() == own.keys() and all(torch.equal(found[key], own[key]) for key in own)
        by_path = [lora.get_parameter(path) for path in lora._lorafx.adapters[name].paths]
        assert len(by_path) == len(own) and {id(t) for t in by_path} == {id(t) for t in own.values()}

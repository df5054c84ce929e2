"""Names: what the base model calls its own is the base's on an adapted model, and `lorafx.of` has all of lorafx's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import lorafx
from lorafx.errors import AdapterError, CaptureError, SelectionError
from lorafx.model.adaptation import Adaptation

PUBLIC = [name for name in dir(Adaptation) if not name.startswith("_")]
PRIVATE = ["_adapter", "_install", "_leave", "_merge", "_serve", "_set_trainable", "_in_order", "tree"]
CONFIG = {"r": 2, "target_modules": ["lin"], "init_lora_weights": False}


class Uses(nn.Module):
    """lin(x), doubled, where the 2 is of the model's own, and the model has more such by all of the names."""

    def __init__(self, kind, *names):
        super().__init__()
        self.lin, self.name = nn.Linear(4, 5), names[0]
        for name in names:
            two = torch.full((5,), 2.0)
            if kind == "number":
                setattr(self, name, 2.0)
            if kind == "buffer":
                self._buffers[name] = two
            if kind == "parameter":
                self._parameters[name] = nn.Parameter(two)
            if kind == "module":
                self._modules[name] = nn.Hardtanh(-2.0, 2.0)

    def forward(self, x):
        own = getattr(self, self.name)
        return self.lin(x) * (own(torch.full((5,), 9.0)) if isinstance(own, nn.Module) else own)


class InItsClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 5)

    explain = 2.0

    def report(self, x):
        return self.lin(x)

    @property
    def sites(self):
        return self.explain

    def forward(self, x):
        return self.report(x) * self.sites


def assert_adapted(model, **options):
    """The model is adapted, trains, is merged and unmerged, saved and loaded, all by `lorafx.of`."""
    x, plain = torch.randn(3, 4), nn.Linear(4, 5)
    plain.load_state_dict(model.lin.state_dict())
    lora = lorafx.compile(model, CONFIG, **options)
    face = lorafx.of(lora)
    low, high = (lora.get_parameter(f"lin.lora_{ab}.default.weight") for ab in "AB")
    expected = 2 * (plain(x) + x @ low.T @ high.T * 4)
    assert torch.allclose(lora(x), expected, atol=1e-5) and torch.allclose(model(x), 2 * plain(x), atol=1e-5)
    assert [site.name for site in face.sites] == ["lin"] and len(face.explain().calls) == 1 and face.report().sites == 1
    face.merge_adapter()
    assert torch.allclose(lora(x), expected, atol=1e-5)
    with face.disable_adapter():
        assert torch.allclose(lora(x), 2 * plain(x), atol=1e-5)
    face.unmerge_adapter()
    return lora, face


@pytest.mark.parametrize("kind", ["number", "buffer", "parameter", "module"])
def test_names_of_the_model_s_own_are_the_model_s(kind):
    names = [name for name in PUBLIC if name not in ("graph",) or kind == "number"]
    model = Uses(kind, "blocks", *names)
    lora, _ = assert_adapted(model)
    for name in names:
        own = getattr(model, name)
        assert isinstance(getattr(lora, name), type(own)) if kind == "module" else getattr(lora, name) is own


def test_nothing_inside_goes_by_a_name_that_the_model_may_have(tmp_path):
    names = ["blocks", *PUBLIC, *PRIVATE]
    lora, face = assert_adapted(Uses("number", *names), capture="sites")
    face.add_adapter("other", {**CONFIG, "bias": "all"})
    face.set_adapter(["default", "other"])
    face.set_scale("other", 0.5)
    face.save_pretrained(tmp_path)
    again = lorafx.load(Uses("number", *names), tmp_path, is_trainable=True)
    assert lorafx.of(again).load_adapter(tmp_path / "other", "other").missing_keys == []
    face.delete_adapter("other")
    assert all(getattr(lora, name) == 2.0 for name in names)
    assert isinstance(face.merge_and_unload(), Uses)


@pytest.mark.parametrize("capture", ["auto", "sites"])
def test_names_in_the_model_s_class(capture):
    lora, face = assert_adapted(InItsClass(), capture=capture)
    assert lora.sites == 2.0 and lora.report(torch.zeros(4)).shape == (5,)
    assert capture == "sites" or face.graph(torch.zeros(3, 4))
    InItsClass.merge_adapter = 3
    try:
        assert lora.merge_adapter == 3 and callable(face.merge_adapter)
    finally:
        del InItsClass.merge_adapter
    assert callable(lora.merge_adapter)


def test_names_that_the_model_uses_later():
    lora = lorafx.compile(Uses("number", "factor"), CONFIG)
    lora.register_buffer("sites", torch.ones(1))
    lora.register_parameter("report", nn.Parameter(torch.ones(2)))
    lora.add_module("explain", nn.ReLU())
    lora.blocks = 4
    assert lora.sites.shape == (1,) and lora.report.shape == (2,) and isinstance(lora.explain, nn.ReLU)
    assert lora.blocks == 4 and {"sites", "report"} <= set(lora.state_dict())
    del lora.sites
    assert lora.sites == lorafx.of(lora).sites
    with pytest.raises(KeyError, match="exists"):
        lora.register_buffer("lin", torch.ones(1))


@pytest.mark.parametrize("capture", ["auto", "sites"])
def test_a_model_that_asks_whether_it_has_a_name_yet(capture):
    class Lazy(Uses):
        def forward(self, x):
            if not hasattr(self, "report"):
                self.report = 2.0
            return self.lin(x) * self.report

    lora = lorafx.compile(Lazy("number", "factor"), CONFIG, capture=capture)
    x = torch.randn(3, 4)
    for _ in range(2):  # the first call changes the model, and goes by sites
        assert torch.allclose(lora(x), 2 * lora.lin(x), atol=1e-5)
    assert lora.report == 2.0


def test_a_model_that_answers_for_another():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, x):
            return self.inner.lin(x) * self.sites

    lora = lorafx.compile(Wrapper(InItsClass()), CONFIG)
    assert lora.sites == 2.0 and lora(torch.randn(3, 4)).shape == (3, 5)
    assert callable(lora.merge_adapter) and lorafx.of(lora).sites[0].name == "inner.lin"


@pytest.mark.slow
def test_a_model_that_chooses_its_forward():
    class Two(Uses):
        def train(self, mode=True):
            self.forward = self.slow if mode else self.fast
            return super().train(mode)

        def slow(self, x):
            return self.lin(x) * 2

        def fast(self, x):
            return self.lin(x) * 3

    model, x = Two("number", "factor"), torch.randn(3, 4)
    lora = lorafx.compile(model.train(), CONFIG)
    for capture_again in (True, False):
        adapted = lora.lin(x).detach()
        assert torch.allclose(lora.train(capture_again)(x), adapted * (2 if capture_again else 3), atol=1e-5)
    assert not torch.allclose(lora(x), model.eval()(x))
    wrapped, lora.forward = lora.forward, lambda x: -wrapped(x)
    assert torch.allclose(lora(x), -3 * lora.lin(x), atol=1e-5)


def test_what_libraries_say_of_all_their_models_lorafx_says_of_adapted_ones():
    class Model(PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.lin = nn.Linear(4, 5)

        def forward(self, x):
            return self.lin(x)

    lora = lorafx.compile(Model(PreTrainedConfig()), CONFIG)
    for name in ("save_pretrained", "push_to_hub", "add_adapter", "load_adapter", "set_adapter"):
        assert getattr(lora, name).__func__ is getattr(Adaptation, name)
    assert lora.active_adapters == ["default"]


@pytest.mark.parametrize("library", ["diffusers.models.modeling_utils", "sentence_transformers.base.model"])
def test_libraries_that_are_not_installed_here_save_adapters_too(library, tmp_path):
    """Their own way would write the base, and all that was trained would be lost."""

    class OfLibrary(nn.Sequential):
        def save_pretrained(self, folder):
            raise AssertionError("it would save the base")

        def set_adapter(self, name):
            raise AssertionError("it would look for PEFT's layers")

    OfLibrary.__module__ = library
    lora = lorafx.compile(OfLibrary(nn.Linear(4, 5)), CONFIG | {"target_modules": ["0"]})
    lora.save_pretrained(tmp_path)
    lora.set_adapter("default")
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_way_to_save_of_the_model_s_own_is_warned_of():
    class Saves(nn.Sequential):
        def save_pretrained(self, folder):
            return folder

    with pytest.warns(UserWarning, match=r"Saves has a `save_pretrained` of its own.*lorafx\.of\(model\)"):
        lora = lorafx.compile(Saves(nn.Linear(4, 5)), CONFIG | {"target_modules": ["0"]})
    assert lora.save_pretrained("there") == "there"


def test_of_a_model_that_is_not_adapted():
    with pytest.raises(AdapterError, match=r"Linear is not adapted.*compile"):
        lorafx.of(nn.Linear(2, 2))


def test_names_of_graph_modules_at_the_root():
    model = Uses("buffer", "graph")
    assert_adapted(model, capture="sites")
    with pytest.raises(CaptureError, match="`graph`"):
        lorafx.compile(model, CONFIG, capture="graph")(torch.randn(3, 4))
    model.add_module("captured", nn.Linear(4, 4))
    with pytest.raises(SelectionError, match=r"captured cannot be adapted.*another name"):
        lorafx.compile(model, {"r": 2, "target_modules": ["captured"]})


def test_the_class_shows_the_names_and_has_methods_that_take_a_model():
    assert set(PUBLIC) <= set(dir(lorafx.AdaptedModel))
    assert lorafx.AdaptedModel.merge_adapter.__doc__ == Adaptation.merge_adapter.__doc__
    assert lorafx.AdaptedModel.sites is Adaptation.sites
    lora = lorafx.compile(nn.Sequential(nn.Linear(4, 4)), {"r": 2, "target_modules": ["0"]})
    lorafx.AdaptedModel.merge_adapter(lora, safe_merge=True)
    assert lora.merged_adapters == ["default"]

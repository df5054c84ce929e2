"""PEFT's names for what an adapted model is and does, compared with PEFT's."""

import peft
import pytest
import torch
from graphs import Chain, adapted
from modules import tiny_llama

import lorafx
from lorafx.errors import AdapterError, CheckpointError


def status(model, get):
    """What PEFT and lorafx say alike of a model's layers, or of the model."""
    ignored = {"adapter_model_type", "name", "module_type"}
    return [{k: v for k, v in vars(each).items() if k not in ignored} for each in ([get()] if callable(get) else get)]


@pytest.fixture
def both():
    """The same adapters on the same model, by PEFT and by lorafx."""
    models = []
    for lib in (peft, lorafx):
        torch.manual_seed(0)
        model = lib.get_peft_model(Chain(), peft.LoraConfig(r=2, target_modules=["first", "second"]))
        model.add_adapter("b", peft.LoraConfig(r=3, target_modules=["second"]))
        models.append(model)
    return models


@pytest.mark.parametrize(
    "change",
    [
        lambda m: None,
        lambda m: m.set_adapter("b"),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.set_requires_grad("b", True),
        lambda m: m.set_requires_grad(["default", "b"], False),
        lambda m: m.merge_adapter(),
    ],
)
def test_the_status_is_peft_s(both, change):
    for model in both:
        change(model)
    theirs, ours = both
    assert status(ours, ours.get_layer_status()) == status(theirs, theirs.get_layer_status())
    assert status(ours, ours.get_model_status) == status(theirs, theirs.get_model_status)
    assert [f"model.{each.name}" for each in ours.get_layer_status()] == [e.name for e in theirs.get_layer_status()]


def test_names_that_peft_documents(both):
    theirs, ours = both
    assert ours.peft_type == theirs.peft_type and ours.targeted_module_names == theirs.targeted_module_names
    assert ours.active_peft_config.r == theirs.active_peft_config.r and ours.modules_to_save is None
    assert ours.base_model.model is ours and ours.peft_config is ours.peft_config
    assert not ours.peft_config["b"].is_prompt_learning
    configs = ours.peft_config
    ours.delete_adapter("b")
    assert list(configs) == ["default"]


def test_adapters_are_disabled_for_good_and_enabled_again():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    before = lora(x)
    lora.merge_adapter()
    lora.disable_adapter_layers()
    assert torch.equal(lora(x), lora._lorafx.base(x)) and not lora.merged_adapters
    assert lora.active_adapters == ["default"] and not any(p.requires_grad for p in lora.parameters())
    lora.enable_adapter_layers()
    assert torch.equal(lora(x), before) and any(p.requires_grad for p in lora.parameters())


@pytest.mark.parametrize(
    ("function", "instead"),
    [
        ("get_peft_model_state_dict", "lorafx.get_peft_model_state_dict"),
        ("set_peft_model_state_dict", "lorafx.set_peft_model_state_dict"),
        ("get_layer_status", "the methods `get_layer_status"),
        ("get_model_status", "`get_model_status"),
    ],
)
def test_peft_s_own_functions_say_what_to_call(function, instead):
    for lora in (adapted(Chain()), lorafx.compile(tiny_llama(), {"target_modules": ["q_proj"]})):
        with pytest.raises(AdapterError, match=f"peft's own `{function}` cannot.*{instead}"):
            getattr(peft, function)(lora, *([{}] if function.startswith("set") else []))


def test_state_dicts_of_adapters_are_peft_s(both):
    theirs, ours = both
    for name in ("default", "b"):
        expected = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        assert lorafx.set_peft_model_state_dict(ours, expected, adapter_name=name).unexpected_keys == []
        found = lorafx.get_peft_model_state_dict(ours, adapter_name=name)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    doubled = {path: 2 * tensor for path, tensor in ours.state_dict().items()}
    twice = lorafx.get_peft_model_state_dict(ours, doubled)
    assert all(torch.equal(twice[key], 2 * lorafx.get_peft_model_state_dict(ours)[key]) for key in twice)
    before = {path: tensor.clone() for path, tensor in ours.state_dict().items()}
    wrong = {key: torch.zeros(9) if "lora_B" in key else torch.zeros_like(value) for key, value in twice.items()}
    for values in ({}, wrong, {**twice, "more": torch.zeros(1)}):
        with pytest.raises(CheckpointError):
            lorafx.set_peft_model_state_dict(ours, values)
    assert all(torch.equal(before[path], tensor) for path, tensor in ours.state_dict().items())


@pytest.mark.parametrize("name", ["from_pretrained", "get_prompt", "rescale_adapter_scale"])
def test_what_is_peft_s_alone_says_what_to_use(name):
    lora = adapted(Chain())
    assert not hasattr(lora, name)
    with pytest.raises(AttributeError, match=f"adapted by lorafx has no `{name}`. Instead: "):
        getattr(lora, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lora.nonsense  # noqa: B018


def test_the_status_names_who_has_quantised_the_base():
    bnb = pytest.importorskip("bitsandbytes")
    model = torch.nn.Sequential(bnb.nn.LinearNF4(64, 128), torch.nn.Linear(128, 64)).to("cpu")
    lora = lorafx.compile(model, {"r": 2, "target_modules": ["0", "1"]})
    assert [each.quantization_backend for each in lora.get_layer_status()] == ["bnb 4bit", None]
    assert lora.get_model_status().quantization_backend == "irregular"

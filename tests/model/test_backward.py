"""Backward where the adapters do not train as one would think: what is said, and when."""

import copy
import pickle
import warnings

import pytest
import torch
from graphs import Chain
from modules import ids, tiny_llama

import lorafx
from lorafx.errors import AdapterError

CONFIG = {"r": 2, "target_modules": ["second"], "init_lora_weights": False}


class Loss(Chain):
    def forward(self, x):
        return super().forward(x).square().mean()


@pytest.fixture
def x():
    return torch.randn(5, 4)


def test_what_was_loaded_for_inference_says_so(tmp_path, x):
    lorafx.compile(Loss(), CONFIG).save_pretrained(tmp_path)
    lora = lorafx.load(Loss(), tmp_path)
    loss = lora(x)
    assert not loss.requires_grad
    with pytest.raises(AdapterError, match=r"'default' loaded for inference; pass is_trainable=True"):
        loss.backward()
    lora.load_adapter(tmp_path, "more", is_trainable=True)
    lora.set_adapter("more")
    lora(x).backward()
    with torch.no_grad():
        assert vars(lora(x)) == {}


def test_what_is_merged_or_disabled_says_so(x):
    lora = lorafx.compile(Loss(), CONFIG)
    lora.merge_adapter()
    with pytest.raises(AdapterError, match=r"'default' merged; call `unmerge_adapter\(\)` first"):
        lora(x).backward()
    lora.unmerge_adapter()
    with lora.disable_adapter(), pytest.raises(AdapterError, match="disabled"):
        lora(x).backward()
    lora(x).backward()


def test_an_input_that_requires_gradients_does_not_hide_that_nothing_trains(x):
    """As trainers have it that checkpoint: the loss does require gradients, and they reach nothing that trains."""
    lora = lorafx.compile(Loss(), CONFIG)
    lora.merge_adapter()
    x.requires_grad_()
    with pytest.warns(UserWarning, match="nothing to train: 'default' merged"):
        lora(x).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora(x).backward()  # it was said


@pytest.mark.slow
def test_the_loss_of_a_transformers_model_says_so():
    lora = lorafx.compile(tiny_llama(), {"r": 2, "target_modules": ["q_proj"]})
    lora.merge_adapter()
    tokens = ids(1, 4)
    for call in ({}, {"return_dict": False}):
        returned = lora(input_ids=tokens, labels=tokens, **call)[0]
        with pytest.raises(AdapterError, match="merged"):
            copy.deepcopy(returned).backward()
        assert pickle.loads(pickle.dumps(returned)) == returned


def test_a_result_of_which_a_loss_is_computed_says_so_once_in_train_mode(x, recwarn):
    lora = lorafx.compile(Chain(), CONFIG)
    lora(x).sum().backward()
    lora.merge_adapter()
    lora.eval()(x)
    with torch.no_grad():
        lora.train()(x)
    assert recwarn.list == []
    for _ in range(2):
        lora(x)
    (said,) = recwarn.list
    assert "nothing to train: 'default' merged; call `unmerge_adapter()` first" in str(said.message)
    lora.unmerge_adapter()
    with lora.disable_adapter():
        lora(x)
    assert len(recwarn) == 1


def test_what_has_another_gradient_is_left_alone(x):
    lora = lorafx.compile(Loss(), CONFIG)
    lora.merge_adapter()
    x.requires_grad_()
    lora(x).backward()
    assert x.grad is not None
    lora.first.weight.requires_grad_()
    lora(x.detach()).backward()
    assert lora.first.weight.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["auto", "sites"])
def test_training_in_evaluation_mode_without_dropout_is_said_once(capture, x):
    def said(model, calls, **config):
        lora = lorafx.compile(model, {**CONFIG, **config}, capture=capture)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for call in range(calls):
                loss = lora(x)
                assert call or not caught, "it is backward that trains"
                loss.sum().backward()
        return [str(warning.message) for warning in caught]

    assert [text[:26] for text in said(Loss().eval(), 3, lora_dropout=0.1)] == ["trained in evaluation mode"]
    assert len(said(Chain().eval(), 2, lora_dropout=0.1)) == 1
    assert said(Loss().train(), 1, lora_dropout=0.1) == said(Loss().eval(), 1) == []


@pytest.mark.parametrize("capture", ["auto", "graph", "sites"])
def test_a_base_made_for_inference_infers_and_says_why_it_does_not_train(x, capture):
    with torch.inference_mode():
        base = Loss()
    lora = lorafx.compile(base, CONFIG, capture=capture)
    with pytest.raises(AdapterError, match=r"first.weight was made under `torch.inference_mode\(\)`"):
        lora(x).backward()
    with torch.no_grad():
        there = lora(x)
    with torch.inference_mode():
        assert torch.equal(lora(x), there)
    lora.first.weight, lora.second.weight = (torch.nn.Parameter(m.weight.clone()) for m in (base.first, base.second))
    for module in (lora.first, lora.second):
        module.bias = None if module.bias is None else torch.nn.Parameter(module.bias.clone())
    lora(x).backward()


@pytest.mark.parametrize("for_inference", [False, True])
def test_another_error_of_a_training_call_stays_what_it_is(x, for_inference):
    class Failing(Loss):
        def forward(self, x):
            raise RuntimeError("mine")

    with torch.inference_mode(for_inference):
        base = Failing()
    with pytest.raises(RuntimeError, match=r"^mine$"):
        lorafx.compile(base, CONFIG, capture="sites")(x)

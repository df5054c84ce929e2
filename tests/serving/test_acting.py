"""A call in which no site acts says so once, and a training step that trains nothing is an error."""

import threading
import warnings

import pytest
import torch
import transformers
from graphs import Chain, adapted
from serving_models import served
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafx
from lorafx.errors import AdapterError
from lorafx.graph.blocks import blocks_of
from lorafx.serving import early_calls
from lorafx.serving.acting import acts_in


class Copied(Chain):
    """A model that computes with a copy of a weight, made before it was adapted; or with the weight itself."""

    def __init__(self):
        super().__init__()
        self.copy = self.first.weight.detach().clone()

    def forward(self, x, copied=True):
        return self.second(x @ self.copy.T if copied else self.first(x))


@pytest.fixture(params=["auto", "sites"])
def copied(request):
    return lorafx.compile(Copied(), {"r": 2, "target_modules": ["first"]}, capture=request.param)


def test_a_training_step_in_which_no_site_acts_is_an_error_each_time(copied):
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"Copied runs no site of the adapter 'default'.* nothing of first\."):
            copied(torch.randn(5, 4))
    copied(torch.randn(5, 4), copied=False).sum().backward()
    assert copied.first.lora_B.default.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("ending", ["eval", "no_grad"])
def test_where_nothing_is_trained_it_is_said_once(copied, ending):
    copied.train(ending == "no_grad")
    with torch.set_grad_enabled(ending != "no_grad"):
        with pytest.warns(UserWarning, match="Copied runs no site of the adapter 'default': the result is the base"):
            copied(torch.randn(5, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            copied(torch.randn(5, 4))
            copied(torch.randn(2, 5, 4))
            copied(torch.randn(5, 4), copied=False)


def test_two_adapters_are_both_named(copied):
    copied.add_adapter("other", {"r": 2, "target_modules": ["first"]})
    copied.set_adapter(["default", "other"])
    with pytest.raises(AdapterError, match="the adapters 'default', 'other'"):
        copied(torch.randn(5, 4))
    with copied.disable_adapter():
        copied(torch.randn(5, 4))


class Cut(Chain):
    """A model that keeps no gradient of its first layer."""

    def forward(self, x):
        with torch.no_grad():
            x = torch.relu(self.first(x))
        return self.second(x)


@pytest.mark.filterwarnings("ignore:site first")
@pytest.mark.parametrize("capture", ["auto", "sites"])
def test_a_step_that_trains_something_else_alone_is_an_error(capture):
    lora, x = lorafx.compile(Cut(), {"r": 2, "target_modules": ["first"]}, capture=capture), torch.randn(5, 4)
    assert not lora(x).requires_grad, "torch says so itself in backward"
    lora.second.weight.requires_grad_(True)
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"no gradient of what this call of Cut gives reaches .* `no_grad`"):
            lora(x)
    assert lora.eval()(x).requires_grad


class Hidden(Chain):
    """A model whose first layer trains where autograd does not see its parameters."""

    def forward(self, x):
        return self.second(checkpoint(self.first, x, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:Chain could not be captured", "ignore:.*site first", "ignore:Hidden")
def test_what_trains_inside_a_function_of_others_is_left_alone():
    lora = adapted(Hidden(), target_modules=["first"])
    lora.second.weight.requires_grad_(True)
    lora(torch.randn(5, 4, requires_grad=True)).sum().backward()
    assert lora.first.lora_B.default.weight.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_sites_in_blocks_own_copies_and_merged_adapters_count(llama):
    lora, _ = llama
    gm = lora.graph(input_ids=torch.ones(2, 5, dtype=torch.long))
    assert acts_in(gm) and acts_in(blocks_of(gm)[0]) and not any("site" in node.meta for node in gm.graph.nodes)
    saved = adapted(Chain(), target_modules=["first"], modules_to_save=["second"])
    saved.second(torch.randn(5, 6)).sum().backward()
    merged = adapted(Chain())
    merged.merge_adapter()
    assert merged.eval()(torch.randn(5, 4)).shape == (5, 3)


class Decoding(nn.Module):
    """An encoder and a decoder, which can go on with what the encoder gave, or with what the first step cached."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Chain(), nn.Linear(3, 3)

    def forward(self, x=None, encoded=None, cache=()):
        if not cache:
            cache = (self.encoder(x) if encoded is None else encoded,)
        return self.decoder(cache[0]), cache


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_a_decoder_whose_encoder_or_first_step_ran_the_sites_is_silent():
    lora, x = lorafx.compile(Decoding(), {"r": 2, "target_modules": ["encoder.first"]}), torch.randn(5, 4)
    y, cache = lora(x)
    y, _ = lora(cache=cache)
    y, _ = lora(encoded=lora.encoder(x))
    y.sum().backward()
    assert all(p.grad is not None for p in lora.parameters() if p.requires_grad)
    with torch.no_grad():
        lora(encoded=lora.encoder(x))
        lora(cache=lora(x)[1])


def test_a_training_step_on_an_encoders_detached_output_is_an_error():
    lora, x = lorafx.compile(Decoding(), {"r": 2, "target_modules": ["encoder.first"]}), torch.randn(5, 4)
    with pytest.raises(AdapterError, match=r"nothing of encoder\.first"):
        lora(encoded=lora.encoder(x).detach())


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("targets", "repeats"), [(r"encoder.*\.q", 0), (r"decoder.*EncDecAttention\.k", 100)])
def test_generating_is_silent_where_the_sites_run_only_once(targets, repeats, monkeypatch):
    monkeypatch.setattr(early_calls, "REPEATS", repeats)
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    lora = lorafx.compile(t5.eval(), {"r": 2, "target_modules": targets})
    lora.generate(torch.ones(2, 5, dtype=torch.long), max_new_tokens=3, min_new_tokens=3)


class Threaded(Chain):
    """A model that runs a layer in a thread of its own."""

    def forward(self, x):
        results = []
        thread = threading.Thread(target=lambda: results.append(self.first(x)))
        thread.start()
        thread.join()
        return self.second(results[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("grad", [True, False])
def test_a_site_that_runs_in_a_thread_of_the_models_counts(grad):
    lora = lorafx.compile(Threaded(), {"r": 2, "target_modules": ["first"]}, capture="sites")
    with torch.set_grad_enabled(grad):
        assert lora(torch.randn(5, 4)).requires_grad == grad
    assert served(lora)[-1] == "sites"


@pytest.mark.filterwarnings("error")
def test_a_part_without_sites_is_silent():
    lora = lorafx.compile(nn.Sequential(Chain(), Chain()), {"r": 2, "target_modules": ["0.first"]})
    lora[1](torch.randn(5, 4))
    lora[0].second(torch.randn(5, 6))
    lora.add_adapter("other", {"r": 2, "target_modules": ["1.first"]})
    lora[1](torch.randn(5, 4))

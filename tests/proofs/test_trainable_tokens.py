"""Trainable tokens: rows of an embedding, looked up and read by a head that is tied to it."""

import copy
import warnings

import models
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from uses import hold

import lorafx
from lorafx.errors import ConfigError

TOKENS = [7, 1, 3]


class Tied(nn.Module):
    """Rows of an embedding, and the logits of a head that has its weight."""

    def __init__(self, bias=False):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 11, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, numbers):
        x = self.embed(numbers)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def formula(lora, numbers):
    weight = lora.embed.weight.index_copy(0, torch.tensor(TOKENS), lora.embed.trainable_tokens_delta.default)
    x = F.embedding(numbers, weight)
    for layer in lora.layers:
        x = x + torch.tanh(layer(x))
    return F.linear(x, weight, lora.head.bias)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*one site")
def test_its_equation_holds_in_every_use(tmp_path):
    config = lorafx.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed"])
    numbers = torch.tensor([[7, 0, 3, 3], [1, 10, 2, 7]])
    hold(lambda: Tied().double(), config, numbers, formula, tmp_path, blocks=False)


@pytest.mark.filterwarnings("ignore:.*one site")
@pytest.mark.parametrize("capture", [pytest.param("graph", marks=pytest.mark.slow), "sites"])
def test_a_head_adds_its_bias_to_their_logits_too(capture):
    config = lorafx.TrainableTokensConfig(token_indices=TOKENS, init_weights=False, target_modules=["embed"])
    lora, numbers = lorafx.compile(Tied(bias=True).double(), config, capture=capture), torch.tensor([[7, 0], [1, 10]])
    torch.testing.assert_close(lora(numbers), formula(lora, numbers), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*one site")
@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_is_pefts_tied_or_not(tied, tmp_path):
    peft = pytest.importorskip("peft")
    base, call = models.llama(tie_word_embeddings=tied), models.call("llama", labels=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.TrainableTokensConfig(token_indices=TOKENS))
        with torch.no_grad():
            theirs.get_input_embeddings().trainable_tokens_delta["default"].normal_()
        theirs.save_pretrained(tmp_path / "theirs")
    lora = lorafx.load(base, tmp_path / "theirs")
    with torch.no_grad():
        expected, found = (models.logits(models.run(model.eval(), call)) for model in (theirs, lora))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    lora.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(lora.unload()), tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(models.logits(models.run(again.eval(), call)), expected, rtol=0, atol=0)


def test_only_its_rows_train_and_no_target_means_the_input_embedding():
    model = models.gpt2()
    lora = lorafx.compile(model, lorafx.TrainableTokensConfig(token_indices=TOKENS))
    assert [name for name, p in lora.named_parameters() if p.requires_grad] == [
        "transformer.wte.trainable_tokens_delta.default"
    ]


@pytest.mark.parametrize("tokens", [[], [1, 1], [-1], ["a"]])
def test_lists_that_are_none_of_tokens_are_refused(tokens):
    with pytest.raises(ConfigError, match="token_indices"):
        lorafx.TrainableTokensConfig(token_indices=tokens)


def test_a_token_that_there_is_not_is_refused():
    config = lorafx.TrainableTokensConfig(token_indices=[11], target_modules=["0"])
    with pytest.raises(ConfigError, match="`token_indices` has 11, and 0 has 11 rows"):
        lorafx.compile(nn.Sequential(nn.Embedding(11, 4)), config)

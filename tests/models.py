"""Tiny models with random weights, seeded, for all tests; `call(model)` gives inputs that fit a model.

Widths differ wherever an architecture lets them (heads and key-value heads, input and output, hidden and
intermediate), so that a mixed-up axis cannot go unnoticed. Dropout is 0 unless a factory is told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, LABELS = 90, 3
Call = dict[str, Any] | tuple[Any, ...]


def llama(*, seed: int = 0, **overrides: Any) -> nn.Module:
    """A causal LM with grouped key-value heads: q 48 -> 64, k and v 48 -> 32, o 64 -> 48."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    return _made(transformers.LlamaForCausalLM, transformers.LlamaConfig, settings | overrides, seed)


def gpt2(*, seed: int = 0, **overrides: Any) -> nn.Module:
    """A causal LM of Conv1D layers (weights stored (in, out)), all with biases; the head is tied."""
    settings = {
        "vocab_size": VOCABULARY,
        "n_embd": 48,
        "n_inner": 80,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return _made(transformers.GPT2LMHeadModel, transformers.GPT2Config, settings | overrides, seed)


def bert(*, seed: int = 0, **overrides: Any) -> nn.Module:
    """A sequence classifier with three labels, its layers all with biases."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_labels": LABELS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return _made(transformers.BertForSequenceClassification, transformers.BertConfig, settings | overrides, seed)


def t5(*, seed: int = 0, **overrides: Any) -> nn.Module:
    """An encoder-decoder: q, k and v 48 -> 32, o 32 -> 48; one embedding tied three ways."""
    settings = {
        "vocab_size": VOCABULARY,
        "d_model": 48,
        "d_kv": 8,
        "d_ff": 80,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }
    return _made(transformers.T5ForConditionalGeneration, transformers.T5Config, settings | overrides, seed)


def vit(*, seed: int = 0, **overrides: Any) -> nn.Module:
    """An image classifier: a convolution into 16 patches, then two layers."""
    settings = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_labels": LABELS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return _made(transformers.ViTForImageClassification, transformers.ViTConfig, settings | overrides, seed)


class ConvNet(nn.Module):
    """Convolutions of one, two and three dimensions, one of them in groups, and a linear head."""

    def __init__(self, dropout: float = 0.0, dilation: int = 1):
        super().__init__()
        self.plane = nn.Conv2d(4, 6, (3, 2), padding=1, stride=(2, 1), dilation=dilation, groups=2)
        self.line = nn.Conv1d(6, 8, 3, padding="same")
        self.space = nn.Conv3d(1, 5, (1, 3, 2), bias=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(5, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4, height, width) -> (batch, LABELS)"""
        x = self.line(self.plane(x).flatten(2))
        x = self.space(torch.stack([x, -x, x.square()], -1)[:, None]).mean((2, 3, 4))
        return self.head(self.dropout(torch.tanh(x)))


class Mlp(nn.Module):
    """Two linear layers, 6 -> 10 -> 4, the second without a bias."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(10, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, 6) -> (…, 4)"""
        return self.down(self.dropout(torch.tanh(self.up(x))))


def convnet(*, seed: int = 0, **overrides: Any) -> nn.Module:
    """A `ConvNet`, in plain torch."""
    return _seeded(seed, lambda: ConvNet(**overrides))


def mlp(*, seed: int = 0, **overrides: Any) -> nn.Module:
    """An `Mlp`, in plain torch."""
    return _seeded(seed, lambda: Mlp(**overrides))


FACTORIES: dict[str, Callable[..., nn.Module]] = {f.__name__: f for f in (llama, gpt2, bert, t5, vit, convnet, mlp)}


def call(model: nn.Module | str, *, batch: int = 2, length: int = 7, labels: bool = True, seed: int = 0) -> Call:
    """Inputs for a model from this file (or its factory's name), adapted or not.

    Keyword arguments as a dict for transformers' models, positional ones as a tuple for plain torch. `length` is the
    number of tokens, or the height of what `convnet` sees.
    """
    rng = torch.Generator().manual_seed(seed)
    kind = model if isinstance(model, str) else _kind(model)
    if kind == "mlp":
        return (torch.randn(batch, 6, generator=rng),)
    if kind == "convnet":
        return (torch.randn(batch, 4, length, 6, generator=rng),)
    if kind == "vit":
        inputs = {"pixel_values": torch.randn(batch, 3, 16, 16, generator=rng)}
    else:
        inputs = {"input_ids": _tokens(batch, length, rng)}
    if labels:
        classes = kind in ("bert", "vit")
        inputs["labels"] = torch.arange(batch) % LABELS if classes else _tokens(batch, length, rng)
    return inputs


def run(model: nn.Module, inputs: Call) -> Any:
    """Call a model with inputs of either form."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def logits(output: Any) -> Tensor:
    """The tensor of scores in a model's output."""
    return output if isinstance(output, Tensor) else output.logits


def _tokens(batch: int, length: int, rng: torch.Generator) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=rng)  # 0 and 1 are padding and end of text to some


def _kind(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    if hasattr(config, "model_type"):
        return config.model_type
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__.lower()


def _made(model: type[nn.Module], config: type, settings: dict[str, Any], seed: int) -> nn.Module:
    return _seeded(seed, lambda: model(config(**settings)))


def _seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` gives with torch's generator at `seed`; the generator is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()

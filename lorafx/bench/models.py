"""The base model of a case, its inputs, and copies of it that share its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .cases import Case


class Linears(nn.Module):
    """The linear layers of a decoder layer and nothing else, each on an input of its width."""

    def __init__(self, hidden: int, intermediate: int, keys: int):
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(hidden, keys, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(hidden, intermediate, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        last = self.down_proj(self.gate_proj(x))
        return self.o_proj(self.q_proj(x)), self.k_proj(x), self.v_proj(x), self.up_proj(x), last


class OneLinear(nn.Module):
    """One linear layer."""

    def __init__(self, hidden: int):
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.q_proj(x),)


def build(case: Case, device: str) -> nn.Module:
    """The frozen base of a case, with the same random weights each time."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    with torch.device(device):
        base = _build(case).to(dtype).train().requires_grad_(False)
    return _quantised(base, case).to(device) if case.quantised else base


def _quantised(base: nn.Module, case: Case) -> nn.Module:
    """The base with bitsandbytes' layers in the place of its linear ones but the head, as transformers loads it."""
    import bitsandbytes as bnb

    for name, linear in list(base.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        sizes, options = (linear.in_features, linear.out_features), {"bias": linear.bias is not None}
        if case.quantised == "nf4":
            own: Any = bnb.nn.LinearNF4(*sizes, compute_dtype=linear.weight.dtype, **options)
            own.weight = bnb.nn.Params4bit(linear.weight.data, quant_type="nf4", module=own)
        else:
            own = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, **options)
            own.weight = bnb.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, own.train())
    base.__dict__[f"is_loaded_in_{4 if case.quantised == 'nf4' else 8}bit"] = True  # what PEFT goes by
    return base


def _build(case: Case) -> nn.Module:
    shape = case.shape
    if case.part == "linear":
        return OneLinear(shape.hidden)
    if case.part == "linears":
        return Linears(shape.hidden, shape.intermediate, shape.hidden // shape.heads * shape.kv_heads)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1 if case.part == "block" else shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=8 if case.part == "block" else shape.vocabulary,
        max_position_embeddings=2 * (case.sequence + case.decode),
        use_cache=bool(case.decode),
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        dtype=case.dtype,
    )
    of = transformers.AutoModel if case.part == "block" else transformers.AutoModelForCausalLM
    return of.from_config(config)


def twin(base: nn.Module) -> nn.Module:
    """A copy of a model's modules that shares its tensors: its modules can be replaced, and the base stays as it is."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    states = [
        vars(module)["state"] for module in base.modules() if "state" in vars(module)
    ]  # where int8 has its scales
    shared |= {id(state): state for state in states}
    return copy.deepcopy(base, shared)


@dataclass(frozen=True)
class Batch:
    """A model's arguments, the gradients of its outputs for backward (None for a loss), and what a cache holds.

    `past` are keys and values of each layer, (batch, heads, prefix, head width), for decoding.
    """

    arguments: dict[str, Tensor]
    gradients: tuple[Tensor | None, ...]
    past: tuple[tuple[Tensor, Tensor], ...] = ()

    def as_dtype(self, dtype: torch.dtype) -> Batch:
        """The same values in another dtype."""
        arguments = {
            name: value.detach().to(dtype).requires_grad_() if value.is_floating_point() else value
            for name, value in self.arguments.items()
        }
        gradients = tuple(each if each is None else each.to(dtype) for each in self.gradients)
        return Batch(arguments, gradients, tuple((keys.to(dtype), values.to(dtype)) for keys, values in self.past))


def batch_of(case: Case, base: nn.Module) -> Batch:
    """The batch of a case, the same for everyone: token ids for a whole model, else a hidden state with a gradient."""
    weight = next(base.parameters())
    rng = torch.Generator(weight.device).manual_seed(1)
    shape = case.shape
    if case.part == "model":
        size = case.batch, case.sequence + case.decode
        ids = torch.randint(0, shape.vocabulary, size, generator=rng, device=weight.device)
        past = _past(base, ids[:, : case.sequence]) if case.decode else ()
        return Batch({"input_ids": ids, "labels": ids.clone()}, (None,), past)

    def random(width: int) -> Tensor:
        size = case.batch, case.sequence, width
        return torch.randn(size, generator=rng, device=weight.device).to(weight.dtype)

    keys = shape.hidden // shape.heads * shape.kv_heads
    widths = (shape.hidden, keys, keys, shape.intermediate, shape.hidden) if case.part == "linears" else (shape.hidden,)
    name = "inputs_embeds" if case.part == "block" else "x"
    return Batch({name: random(shape.hidden).requires_grad_()}, tuple(map(random, widths)))


@torch.no_grad()
def _past(base: nn.Module, ids: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """The frozen base's keys and values of a prefix: nobody has to run, capture or compile it to decode after it."""
    cache: Any = transformers.DynamicCache()
    base(input_ids=ids, past_key_values=cache, use_cache=True)
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def outputs(found: Any) -> tuple[Tensor, ...]:
    """The outputs of a model that have a gradient: the loss, the hidden state, or a tuple as it is."""
    if isinstance(found, tuple):
        return found
    return (found.loss if "loss" in found else found.last_hidden_state,)

"""restore_causal: masks that sizes decide are recognised by what they are; all others stay."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from graphs import run
from modules import cases
from torch import nn
from torch.nn import functional as F

import lorafx
from lorafx.capture.export import trace
from lorafx.graph.blocks import block_calls, blocks_of
from lorafx.passes import Canonicalize, InlineBlocks, OutlineBlocks, RestoreCausal
from lorafx.pipeline import Pipeline

attention = torch.ops.aten.scaled_dot_product_attention.default


def square(x, below=True):
    positions = torch.arange(x.shape[1], device=x.device)
    return positions[None, :] <= positions[:, None] if below else positions[None, :] >= positions[:, None]


def window(size):
    def mask(x):
        positions = torch.arange(x.shape[1])
        near = positions[:, None] - positions[None, :] < size
        return square(x) & near

    return mask


def lowest(x):
    mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min, dtype=x.dtype)
    return torch.triu(mask, diagonal=1)[None, None]


def in_place(x):
    mask = torch.zeros(x.shape[1], x.shape[1])
    return mask.masked_fill_(~square(x), float("-inf"))


def written_later(x):
    mask = square(x).clone()
    view = mask[:, :1]
    view.logical_not_()
    return mask


def of_data(x):
    return square(x) & (x[..., 0] > -100)[:, None, None, :]


def distances(x):
    positions = torch.arange(x.shape[1])
    return positions[:, None] - positions[None, :]


def near(how):
    """A window whose width is written in another way than as an integer that distances are compared with."""
    return lambda x: square(x) & how(distances(x))


def across(x):
    """Of the columns alone, and broadcast over the queries."""
    return torch.arange(x.shape[1])[None, :] >= 0


def constant(x):
    return torch.ones(x.shape[0], 1, x.shape[1], x.shape[1], dtype=torch.bool).tril() & torch.tensor(True)


MASKS = {  # and what is left of each: whether the attention is causal, or None where the mask stays
    "comparisons": (square, True),
    "the other way round": (lambda x: square(x, below=False), None),
    "lower triangle": (constant, True),
    "lowest numbers": (lowest, True),
    "numbers that are not so low": (lambda x: lowest(x) / 2, None),
    "all ones": (lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), False),
    "zeros to be added": (lambda x: x.new_zeros(x.shape[0], 1, 1, x.shape[1]), False),
    "broadcast over queries": (across, False),
    "a small window": (window(3), None),
    "a window": (window(50), None),
    "a window that nothing reaches": (window(100_000), None),
    "operators in place": (in_place, None),
    "written to after it was made": (written_later, None),
    "data": (of_data, None),
    "one key too many": (lambda x: square(x) | square(x, below=False) & (window(1)(x)), True),
    "a window that a tensor says": (near(lambda d: d < torch.tensor(50)), None),
    "a window that a fraction says": (near(lambda d: d.float() * 0.02 < 1), None),
    "a window that a float says": (near(lambda d: d < 50.0), None),
    "a window that a root says": (near(lambda d: d.abs().sqrt() < 7), None),
    "a window that a square says": (near(lambda d: d * d < 2500), None),
    "a window that a quotient says": (near(lambda d: d // 8 < 7), None),
    "a window that a table says": (near(lambda d: d < torch.tensor([50, 51])[:1]), None),
    "a window that the length says": (lambda x: square(x) & (distances(x) < max(20, x.shape[1] // 8)), None),
    "integers that are added": (lambda x: distances(x) + 5 - 3 >= 2, True),
    "one diagonal more": (lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(1), None),
}


class Attending(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask, self.value = mask, nn.Linear(4, 4)

    def forward(self, x, *given, **named):
        heads = x.unsqueeze(1)
        mask = self.mask(x, *given, **named)
        return F.scaled_dot_product_attention(heads, heads, self.value(heads), attn_mask=mask).squeeze(1)


def attentions(gm):
    parts = [gm, *blocks_of(gm)]
    return [node for part in parts for node in part.graph.nodes if node.target is attention]


def kind(node):
    """Whether an attention is causal; None for one with a mask."""
    mask, causal = (node.args[place] if len(node.args) > place else None for place in (3, 5))
    return None if mask is not None else bool(causal)


QUICK = [
    *(
        "comparisons",
        "the other way round",
        "lowest numbers",
        "zeros to be added",
        "a window",
        "written to after it was made",
    ),
    *("data", "a window that a fraction says", "a window that a table says", "integers that are added"),
]


@pytest.mark.parametrize("name", cases(MASKS, quick=QUICK))
def test_a_mask_is_what_it_computes(name):
    mask, expected = MASKS[name]
    model, x = Attending(mask), torch.randn(2, 7, 4)
    gm = trace(model, x)
    Pipeline(Canonicalize(), RestoreCausal()).run(gm)
    assert [kind(node) for node in attentions(gm)] == [expected]
    for length in (7, 2, 60):
        x = torch.randn(2, length, 4)
        torch.testing.assert_close(gm(x), model(x))
    if expected is not None:
        assert all("arange" not in node.name and "ones" not in node.name for node in gm.graph.nodes)


@pytest.mark.slow
def test_a_mask_that_another_integer_decides_stays():
    model, x = Attending(lambda x, ahead: distances(x) + ahead - 2 >= 0), torch.randn(2, 7, 4)
    gm = lorafx.capture.export.trace_part(model, "", (x, 2), {}, free=[1])
    Pipeline(Canonicalize(), RestoreCausal()).run(gm)
    assert [kind(node) for node in attentions(gm)] == [None]
    for ahead in (2, 3, 7):
        torch.testing.assert_close(gm(x, ahead), model(x, ahead))


USES = [lambda mask: mask, lambda mask: ~~mask, lambda mask: mask.float().log()]


@pytest.mark.slow
@pytest.mark.parametrize("use", cases(USES, quick=USES[2:]))
def test_ones_have_the_dtype_of_the_mask(use):
    model, x = Attending(lambda x, attention_mask: use(attention_mask)[:, None, None, :]), torch.randn(2, 7, 4)
    lora = lorafx.compile(copy.deepcopy(model), {"r": 2, "target_modules": "all-linear"}, capture="graph")
    full, padded = torch.ones(2, 7, dtype=torch.bool), torch.arange(7).expand(2, 7) < 5
    for mask in (padded, full):
        torch.testing.assert_close(lora(x, attention_mask=mask), model(x, attention_mask=mask))
        (node,) = attentions(lora.graph(x, attention_mask=mask))
        assert kind(node) == (False if mask is full else None)


class Layered(nn.Module):
    """Layers of one kind, given masks of several."""

    def __init__(self, kinds):
        super().__init__()
        self.kinds = kinds
        self.layers = nn.ModuleList(Layer() for _ in kinds)

    def forward(self, x):
        masks = {"causal": square(x), "all": across(x), "window": window(3)(x)}
        for layer, kind in zip(self.layers, self.kinds):
            x = layer(x, masks[kind])
        return x


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Linear(4, 4)

    def forward(self, x, mask):
        heads = x.unsqueeze(1)
        return x + F.scaled_dot_product_attention(heads, heads, self.value(heads), attn_mask=mask[None]).squeeze(1)


@pytest.mark.slow
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("kinds", [("causal", "all", "window", "causal"), ("all",) * 2], ids="-".join)
def test_layers_of_several_kinds_of_masks_get_a_block_each(kinds, once):
    model, x = Layered(kinds), torch.randn(2, 7, 4)
    gm = lorafx.capture.export.trace_part(model, "", (x,), {}, once=once)
    Pipeline(Canonicalize(), OutlineBlocks(), RestoreCausal()).run(gm)
    found = {path: kind(attentions(block)[0]) for _, block, path in block_calls(gm)}
    names = {True: "causal", False: "all", None: "window"}
    assert tuple(names[found[f"layers.{n}"]] for n in range(len(kinds))) == kinds
    assert len(blocks_of(gm)) == len(set(kinds))
    for length in (7, 2, 20):
        x = torch.randn(2, length, 4)
        torch.testing.assert_close(gm(x), model(x))
    Pipeline(Canonicalize(), InlineBlocks()).run(gm)
    torch.testing.assert_close(gm(x), model(x))


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def language_model(name, **more):
    special = {
        "Gemma3ForCausalLM": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        "MistralForCausalLM": {"sliding_window": 4},
        "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "BertForMaskedLM": {},
    }
    options = {**SIZES, **HEADS, **special.get(name, {}), "pad_token_id": 0, "attn_implementation": "sdpa", **more}
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**options)).eval()


def adapted(model):
    """The model with an adapter that changes nothing yet."""
    return lorafx.compile(copy.deepcopy(model), {"r": 2, "target_modules": "all-linear"}, capture="graph")


@pytest.fixture(scope="module")
def llama():
    return adapted(language_model("LlamaForCausalLM", num_hidden_layers=1))


MODELS = {  # those of Llama are below
    "Gemma3ForCausalLM": {True, None},
    "GPT2LMHeadModel": {True},
    "BertForMaskedLM": {False},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_language_models(name):
    model = language_model(name)
    lora = adapted(model)
    ids = torch.randint(1, 64, (2, 9))
    assert {kind(node) for node in attentions(lora.graph(input_ids=ids))} == MODELS[name]
    with torch.no_grad():
        for length in (9, 3, 20):
            ids = torch.randint(1, 64, (2, length))
            torch.testing.assert_close(lora(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.slow
def test_embeddings_as_inputs(llama):
    """With one sequence transformers looks for packed ones, in the differences of positions."""
    for length in (9, 21):
        graph = llama.graph(inputs_embeds=torch.randn(1, length, 32))
        assert {kind(node) for node in attentions(graph)} == {True}


@pytest.mark.slow
def test_padding_and_packing_stay(llama):
    ids = torch.randint(1, 64, (2, 9))
    padded = torch.ones_like(ids)
    padded[0, 6:] = 0
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, 9)
    for kwargs in ({"attention_mask": padded}, {"position_ids": packed, "use_cache": False}):
        assert {kind(node) for node in attentions(llama.graph(input_ids=ids, **kwargs))} == {None}


@pytest.mark.slow
def test_a_mask_of_ones_masks_nothing(llama):
    ids = torch.randint(1, 64, (2, 9))
    full, padded = torch.ones_like(ids), torch.ones_like(ids)
    padded[1, 7:] = 0
    graphs = [llama.graph(input_ids=ids, attention_mask=mask) for mask in (full, padded)]
    assert [{kind(node) for node in attentions(graph)} for graph in graphs] == [{True}, {None}]
    with torch.no_grad():
        found = [llama(input_ids=ids, attention_mask=mask).logits for mask in (full, padded, full)]
        plain = llama._lorafx.base(input_ids=ids).logits
    torch.testing.assert_close(found[0], plain)
    torch.testing.assert_close(found[1][1, :7], plain[1, :7])  # right padding is behind
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    full[0, 3] = 0  # in place: it is looked at in each call
    with torch.no_grad():
        assert not torch.allclose(llama(input_ids=ids, attention_mask=full).logits, plain)


@pytest.mark.slow
def test_a_decoding_step_needs_no_mask(llama):
    ids = torch.randint(1, 64, (2, 9))
    with torch.no_grad():
        whole = llama._lorafx.base(input_ids=ids).logits
        first = llama(input_ids=ids[:, :6], use_cache=True)
        cache, logits = first.past_key_values, [first.logits]
        for step in range(6, 9):
            graph = llama.graph(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            assert {kind(node) for node in attentions(graph)} == {False}
            output = llama(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, [*logits, output.logits]
        torch.testing.assert_close(torch.cat(logits, 1), whole)
        cache = llama(input_ids=ids[:, :6], use_cache=True).past_key_values
        several = llama(input_ids=ids[:, 6:], past_key_values=cache)
    torch.testing.assert_close(several.logits, whole[:, 6:])


def test_pass_is_its_own_in_a_pipeline():
    model, x = Attending(square), torch.randn(2, 7, 4)
    lora = lorafx.compile(model, {"r": 2, "target_modules": ["value"]})
    gm = run(lora, (Canonicalize(), RestoreCausal()), x)
    assert [kind(node) for node in attentions(gm)] == [True]

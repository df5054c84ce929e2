"""Variants of LoRA where PEFT has no number; the rest is held to PEFT's in tests/peft/test_kinds.py."""

import pickle

import pytest
import torch
from modules import Tied
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorafx
from lorafx.errors import AdapterError, ConfigError

BLOCKS = {"target_modules_bd_a": ["first"], "target_modules_bd_b": ["second"], "nblocks": 2}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(9, 6), nn.Linear(6, 10), Conv1D(8, 10)

    def forward(self, tokens):
        return self.second(torch.tanh(self.first(self.embed(tokens))))


def adapted(**fields):
    return lorafx.compile(Net(), {"r": 2, "target_modules": ["first", "second"], **fields}, random_state=0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_bdlora": BLOCKS, "use_dora": True}, "`use_dora` and `use_bdlora` are variants"),
        ({"use_qalora": True, "qalora_group_size": 4}, "first has 6 inputs, which are no groups of"),
        ({"use_qalora": True, "qalora_group_size": 2, "lora_bias": True}, "`use_qalora` has no `lora_bias`"),
        ({"init_lora_weights": "mica", "r": 7}, 'first: `init_lora_weights="mica"` gives at most rank 6'),
        ({"init_lora_weights": "mica", "use_dora": True}, "`use_dora` and `mica` are variants"),
        ({"kasa_config": {}, "r": 6}, "first: `kasa_config` needs a rank below 6"),
        ({"velora_config": {}, "target_modules": ["embed"]}, "`velora_config` is for linear layers"),
        ({"use_bdlora": BLOCKS, "r": 3}, r"first: lora_A of shape \(3, 6\) has no 2 diagonal blocks"),
        ({"use_bdlora": BLOCKS | {"target_modules_bd_a": []}}, "first is named by neither"),
        ({"use_bdlora": BLOCKS | {"target_modules_bd_a": ["s"]}}, "second is named by both"),
        ({"use_bdlora": BLOCKS, "target_modules": ["embed"]}, "`use_bdlora` is for linear layers"),
        ({"use_bdlora": BLOCKS, "lora_bias": True}, "second has a block diagonal B"),
        ({"use_bdlora": BLOCKS, "init_lora_weights": "pissa"}, "`use_bdlora` needs `init_lora_weights` True or False"),
    ],
)
def test_what_a_variant_has_not_is_named(fields, said):
    with pytest.raises(ConfigError, match=said):
        adapted(**fields)


def test_what_is_left_of_a_base_is_for_adapters_that_take_the_same():
    fields = {"r": 2, "target_modules": ["first", "second"], "kasa_config": {}}
    lora = pickle.loads(pickle.dumps(adapted(**fields, trainable_token_indices={"embed": [3]})))
    lora.add_adapter("same", fields)  # but for the tokens, whose embedding nothing is taken out of
    before = {name: tensor.clone() for name, tensor in lora.state_dict().items()}
    for other in ({"r": 3}, {"target_modules": ["first"]}, {"kasa_config": None}):
        with pytest.raises(AdapterError, match="'other', which does not take the same from the same weights"):
            lora.add_adapter("other", fields | other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.state_dict().items())


@pytest.mark.parametrize("capture", ["graph", "sites"])
@pytest.mark.filterwarnings("ignore:.*one site")
def test_a_tied_weight_has_the_blocks_where_it_is_looked_up_too(capture):
    model, changed, x = Tied().double(), Tied().double(), torch.arange(11)[None]
    changed.load_state_dict(model.state_dict())
    fields = {"r": 5, "use_bdlora": {"target_modules_bd_a": ["head"], "nblocks": 5}, "init_lora_weights": False}
    lora = lorafx.compile(model, {"target_modules": ["head"], **fields}, capture=capture, random_state=0)
    a, b = lora.head.lora_A.default.weight, lora.head.lora_B.default.weight
    with torch.no_grad():
        changed.head.weight += b @ torch.block_diag(*a) * (8 / 5)
    torch.testing.assert_close(lora(x), changed(x), rtol=1e-12, atol=1e-12)
    assert (lora(x) - model(x)).abs().max() > 1e-3


def test_blocks_are_there_beside_trained_tokens_and_for_rows_that_choose():
    lora, tokens = (
        adapted(use_bdlora=BLOCKS, trainable_token_indices={"embed": [3, 1]}).eval(),
        torch.tensor([[3], [5]]),
    )
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 * parameter.requires_grad)
    expected = of_blocks(lora, tokens)
    torch.testing.assert_close(lora(tokens), expected)
    lora.add_adapter("other", lorafx.LoraConfig(r=3, target_modules=["first"], init_lora_weights=False))
    torch.testing.assert_close(lora(tokens, adapter_names=["default", "other"])[0], expected[0])
    before = {name: tensor.clone() for name, tensor in lora.state_dict().items()}
    lora.merge_adapter()
    torch.testing.assert_close(lora(tokens), expected)
    lora.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.state_dict().items())


def of_blocks(lora, tokens):
    """What `Net` gives with two blocks in A of its first layer, and in B of its second, a Conv1D; α / r = 4."""
    embedding = lora.embed.weight.detach().clone()
    embedding[[3, 1]] = lora.embed.token_adapter.default.trainable_tokens_delta
    first, second = ((layer.lora_A.default.weight, layer.lora_B.default.weight) for layer in (lora.first, lora.second))
    w1 = lora.first.weight + 4 * first[1] @ torch.block_diag(*first[0].chunk(2))
    w2 = lora.second.weight.T + 4 * torch.block_diag(*second[1].chunk(2)) @ second[0]
    h = torch.tanh(embedding[tokens] @ w1.T + lora.first.bias)
    return h @ w2.T + lora.second.bias

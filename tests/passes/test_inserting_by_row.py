"""insert_adapters where rows choose: one joint equation a site, told by an input; refused where rows are not known."""

import pytest
import torch
from models import llama
from rows import BASE, with_adapters
from torch import nn

import lorafx
from lorafx.errors import UncoveredOperatorError
from lorafx.graph.blocks import LAYERS, block_calls, blocks_of
from lorafx.model.rows import as_chosen, chosen
from lorafx.serving.choosing import Choice

CONFIGS = {"a": {"r": 2, "target_modules": ["q_proj"]}, "b": {"r": 3, "target_modules": ["q_proj", "down_proj"]}}

BOTH = {name: {"target_modules": ["0", "inner"]} for name in "ab"}


def graph_of(lora, names, **call):
    context, kwargs = as_chosen(chosen(lora._lorafx, names), (), call)
    return lora._lorafx.dispatcher.program(lora, context, (), kwargs).gm


@pytest.mark.slow
def test_a_site_has_one_joint_equation_and_blocks_are_given_the_rows():
    lora = with_adapters(llama(num_hidden_layers=3), CONFIGS).eval()
    with torch.no_grad():
        gm = graph_of(lora, ["a", BASE, "b"], input_ids=torch.randint(3, 90, (3, 5)))
    (block,) = blocks_of(gm)
    assert len(block.meta[LAYERS]) == 3
    rows = next(node for node in gm.graph.find_nodes(op="placeholder") if node.target == "lorafx_rows")
    assert all(call.args[-1] is rows for call, *_ in block_calls(gm))
    assert block.graph.find_nodes(op="placeholder")[-1].target == "lorafx_rows"
    joint = block.graph.find_nodes(op="call_function", target=torch.ops.lorafx.lora_by_row.default)
    assert [node.args[3] for node in joint] == [[1, 2], [2]]  # `a` is not at down_proj, and `b` keeps its number
    assert all(
        node.args[0].target in (torch.ops.aten.linear.default, torch.ops.lorafx.linear.default) for node in joint
    )


def test_a_graph_without_rows_has_no_such_input():
    lora = with_adapters(nn.Sequential(nn.Linear(6, 4)), {"a": {"target_modules": ["0"]}})
    assert all("rows" not in node.name for node in lora.graph(torch.randn(3, 6)).graph.nodes)


class Turned(nn.Module):
    """Reads a weight with something other than the rows first, in several ways; (rows, tokens, 6)."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.how = nn.Linear(6, 4), how

    def forward(self, x):
        return self.inner(self.how(x))


WAYS = {
    "turned": lambda x: x.transpose(0, 1),
    "turned and flattened": lambda x: x.transpose(0, 1).reshape(-1, 6),
    "sorted": lambda x: x.flatten(0, 1)[x.flatten(0, 1)[:, 0].argsort()],
    "summed over rows": lambda x: x.sum(0),
    "joined to itself": lambda x: torch.cat([x, x]),
}
FINE = {
    "flattened": lambda x: x.reshape(-1, 6),
    "flattened, then added to": lambda x: torch.tanh(x.reshape(-1, 6) + 1),
    "pooled": lambda x: x[:, 0],
    "the mean": lambda x: x.mean(1),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_things_than_rows_are_refused(way):
    lora = with_adapters(Turned(WAYS[way]), BOTH)
    with pytest.raises(UncoveredOperatorError, match=r"site inner is given .* which rows of the batch"):
        lora(torch.randn(4, 4, 6), adapter_names=["a", "b", "a", BASE])


@pytest.mark.parametrize("way", FINE)
def test_rows_that_are_flattened_or_pooled_are_known(way):
    lora = with_adapters(Turned(FINE[way]), BOTH)
    x, names = torch.randn(4, 5, 6), ["a", "b", "a", BASE]
    found = lora(x, adapter_names=names)
    for row, name in enumerate(names):
        own = lora(x[row : row + 1], adapter_names=[name])
        torch.testing.assert_close(found.view(4, -1, 4)[row], own.view(-1, 4))


def test_rows_are_known_behind_other_sites_of_flattened_tokens():
    """As in OPT, and in experts that all tokens go to; what adapters and their choice add keeps the rows first."""
    layers = nn.Sequential(nn.Flatten(0, 1), nn.RMSNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    config = lorafx.LoraConfig(r=2, target_modules=["2", "4"], init_lora_weights=False)
    lora = lorafx.compile(layers, config, adapter_name="a")
    lora.add_adapter(
        "b", lorafx.IA3Config(target_modules=["2", "4"], feedforward_modules=["4"], init_ia3_weights=False)
    )
    x, names = torch.randn(4, 3, 6), ["a", "b", "a", BASE]
    found = lora(x, adapter_names=names).view(4, 3, 4)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], lora(x[row : row + 1], adapter_names=[name]))


def test_beams_have_the_adapters_of_their_rows():
    lora = with_adapters(nn.Sequential(nn.Linear(6, 4)), BOTH)
    choice = Choice(lora._lorafx, ("b", None, "a"), repeats=True)
    _, kwargs = as_chosen(choice, (torch.randn(6, 6),), {})
    assert kwargs["lorafx_rows"].tolist() == [2, 2, 0, 0, 1, 1]

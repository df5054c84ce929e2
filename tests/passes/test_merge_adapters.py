"""merge_adapters: the insertion run backwards."""

import re

import pytest
import torch
from graphs import INSERT, PREPARE, Chain, adapted, run, text
from modules import EveryForm, Tied

from lorafx.errors import VerifyError
from lorafx.passes import MergeAdapters
from lorafx.pipeline import Context


def unnumbered(lines: list[str]) -> list[str]:
    return [re.sub(r"_\d+\b", "", line) for line in lines]


def reverted(lora, merged, *args):
    gm = run(lora, INSERT, *args)
    state = lora._lorafx.context
    MergeAdapters().rewrite(gm, Context(state.adapters, frozenset(merged)))
    gm.recompile()
    return gm


@pytest.mark.filterwarnings("ignore:.*one site")
@pytest.mark.parametrize(
    ("model", "args", "targets"),
    [
        (Chain, (torch.randn(5, 4),), ["first", "second"]),
        pytest.param(
            EveryForm,
            (torch.randint(0, 11, (2, 8)),),
            ["embedding", "conv1d", "conv2d", "conv3d", "addmm", "linear"],
            marks=pytest.mark.slow,
        ),
        pytest.param(Tied, (torch.randint(0, 11, (2, 6)),), ["embed"], marks=pytest.mark.slow),
        (lambda: Chain().bfloat16(), (torch.randn(5, 4, dtype=torch.bfloat16),), ["second"]),  # adapters in float32
    ],
)
def test_reversing_an_insertion_restores_the_graph(model, args, targets):
    lora = adapted(model(), target_modules=targets, lora_dropout=0.2)
    gm = reverted(lora, ["default"], *args)
    assert unnumbered(text(gm)) == unnumbered(text(run(lora, PREPARE, *args)))


def test_only_the_merged_adapter_leaves():
    lora = adapted(Chain(), target_modules=["second"])
    lora.add_adapter("other", {"r": 3, "target_modules": ["second"], "init_lora_weights": False})
    lora.set_adapter(["default", "other"])
    targets = {n.target for n in reverted(lora, ["default"], torch.randn(5, 4)).graph.find_nodes(op="get_attr")}
    assert "second.lora_A.other.weight" in targets
    assert "second.lora_A.default.weight" not in targets


def test_nothing_is_merged_unless_asked():
    lora = adapted(Chain())
    assert text(reverted(lora, [], torch.randn(5, 4))) == text(run(lora, INSERT, torch.randn(5, 4)))


def test_an_equation_that_cannot_be_found_is_an_error_not_a_double_update():
    lora = adapted(Chain(), target_modules=["second"])
    gm = run(lora, INSERT, torch.randn(5, 4))
    scaled = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)[0]
    scaled.target = torch.ops.aten.div.Tensor
    with pytest.raises(VerifyError, match="'default' is merged and still acts at second"):
        MergeAdapters().rewrite(gm, Context(lora._lorafx.context.adapters, frozenset({"default"})))


def test_merged_and_unmerged_calls_agree():
    model, x = Chain().double(), torch.randn(5, 4, dtype=torch.float64)
    lora = adapted(model)
    before = lora(x)
    lora.merge_adapter()
    assert not any("lora" in str(n.target) for n in lora.graph(x).graph.nodes)
    torch.testing.assert_close(lora(x), before, rtol=1e-13, atol=1e-13)

"""Equations in graphs: found by the operator that reads the weight, cast on both sides, refused where there is none."""

from dataclasses import dataclass

import pytest
import torch
from graphs import PREPARE, Chain, adapted, run
from modules import Tied
from torch import nn

import lorafx
from lorafx.adapters import kinds
from lorafx.adapters.config import AdapterConfig
from lorafx.adapters.equation import Equation, patterns
from lorafx.adapters.kinds import Kind, Spec
from lorafx.errors import UncoveredOperatorError
from lorafx.graph import SITE

aten = torch.ops.aten


def equation_of(lora, *inputs):
    """The equation at the first adapted operator of a call."""
    gm, adapter = run(lora, PREPARE, *inputs), lora._lorafx.adapters["default"]
    base = next(node for node in gm.graph.nodes if SITE in node.meta)
    return Equation.at(gm, base, adapter, adapter.selection[0])


def called(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_a_matrix_may_be_read_as_any_other_and_a_convolution_as_itself_alone():
    lora = adapted(
        nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 5, 2)), target_modules=["0", "2"]
    )
    names = [[operator.pattern.__name__ for operator in patterns(site)] for site in lora.sites]
    of_a_matrix = ["linear", "linear_of_rows", "linear_of_cast", "turned_linear", "addmm", "embedding"]
    assert names == [of_a_matrix, ["conv", "conv"]]


def test_loras_graph_is_its_equation_with_casts_on_both_sides():
    equation, found = equation_of(adapted(Chain(), target_modules=["second"], lora_dropout=0.2), torch.randn(5, 4))
    assert called(equation.after()) == [
        "aten.to.dtype",
        "aten.dropout.default",
        "aten.linear.default",
        "aten.linear.default",
        "aten.mul.Tensor",
        "aten.add.Tensor",
        "aten.to.dtype",
    ]
    assert called(equation.before()) == []
    given = equation.given(torch.bfloat16, found.bindings)
    assert given["lora_A"].path == "second.lora_A.default.weight" and given["lora_A"].dtype == torch.bfloat16
    assert given["operator_weight"].target == "second.weight"


def test_row_numbers_are_neither_cast_nor_dropped():
    model = nn.Sequential(nn.Embedding(11, 4))
    equation, _ = equation_of(adapted(model, target_modules=["0"], lora_dropout=0.2), torch.tensor([1, 2]))
    assert called(equation.after())[:2] == ["aten.t.default", "aten.embedding.default"]


@dataclass(frozen=True, kw_only=True)
class RowsConfig(AdapterConfig):
    peft_type: str = "ROWS"


class Rows(Kind):
    """A gain for each output, which the transposed weight has no place for."""

    config = RowsConfig

    def tensors(self, site, config):
        return {"gain": Spec("gain", (site.out_features,))}

    def init(self, site, config, tensors, rng, weight):
        tensors["gain"].fill_(2)

    def after(self, y, x, at):
        return aten.mul.Tensor(y, at.gain)


@pytest.fixture
def rows():
    kinds.register(Rows)
    yield
    del kinds.KINDS["ROWS"]


@pytest.mark.filterwarnings("ignore:.*one site")
def test_a_kind_without_a_transposed_form_is_refused_where_its_weight_is_read_so(rows):
    model, ids = Tied(), torch.randint(0, 11, (2, 6))
    lora = lorafx.compile(model, RowsConfig(target_modules=["embed"]))
    with pytest.raises(UncoveredOperatorError, match=r"site embed: aten\.linear\.default reads its weight"):
        lora(ids)
    torch.testing.assert_close(lora.embed(ids), 2 * model.embed(ids), rtol=0, atol=0)

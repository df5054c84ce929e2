"""Errors in a running graph name the model's own line."""

from types import FunctionType

import pytest
import torch
from modules import ids, tiny_llama
from torch import nn
from torch.fx import Graph, GraphModule

import lorafx
from lorafx.lowering.errors_in_graphs import naming_lines
from lorafx.serving.call_key import Call


class Looks(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.table = nn.Linear(4, 4), nn.Embedding(5, 4)

    def forward(self, x, at):
        y = self.lin(x)
        return y + self.table(at)  # here


def test_an_error_in_a_graph_names_the_model_s_line(capfd):
    lora = lorafx.compile(Looks(), {"target_modules": ["lin"]}, capture="graph", backend="eager")
    x = torch.randn(3, 4)
    lora(x, torch.tensor([0, 1, 2]))
    with pytest.raises(IndexError, match="out of range") as caught:
        lora(x, torch.tensor([0, 1, 9]))
    (note,) = caught.value.__notes__
    assert "test_errors_in_graphs.py" in note and "return y + self.table(at)  # here" in note
    assert "generated" not in capfd.readouterr().err
    lora(x, torch.tensor([0, 1, 2]))


def test_an_error_below_code_without_a_hash_is_the_error_itself():
    """As code is that a compiler has made."""

    def divide(x):
        return x / 0

    code = divide.__code__
    made = FunctionType(code.replace(co_consts=(*code.co_consts, {})), globals())
    graph = Graph()
    graph.output(graph.call_function(made, (graph.placeholder("x"),)))
    with pytest.raises(ZeroDivisionError):
        naming_lines(GraphModule(nn.Module(), graph))(3)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x, at):
        return x + torch.relu(self.lin(x))[at]


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x, at):
        for layer in self.layers:
            x = layer(x, at)
        return x


@pytest.mark.slow
@pytest.mark.parametrize("left_out, title", [((), "2 layers, layers.0 first"), (("outline_blocks",), "whole graph")])
def test_an_error_in_compiled_code_is_the_operator_s_own_and_says_so(left_out, title):
    pipeline = lorafx.passes.default.without(*left_out, "checkpoint_blocks")
    lora = lorafx.compile(Layers(), {"target_modules": ["lin"]}, backend="aot_eager", pipeline=pipeline)
    x = torch.randn(3, 4)
    lora(x, torch.tensor([0, 1, 2]))
    with pytest.raises(IndexError, match="out of bounds") as caught:
        lora(x, torch.tensor([0, 1, 9]))
    assert caught.value.__notes__[0].startswith(f"in compiled code ({title}); with backend='eager'")


@pytest.mark.slow
def test_an_error_in_a_block_does():
    lora = lorafx.compile(tiny_llama(), {"r": 2, "target_modules": ["q_proj"]}, capture="graph", backend="eager")
    lora(input_ids=ids(1, 5))
    lora.model.layers[1].mlp.down_proj.weight.data = torch.zeros(3, 3)
    call = Call.of(lora, lora._lorafx.context, "", (), {"input_ids": ids(1, 5)})
    dispatcher = lora._lorafx.dispatcher
    with pytest.raises(RuntimeError) as caught:
        dispatcher.run(next(iter(dispatcher)), call)
    assert "modeling_llama.py" in caught.value.__notes__[0] and "down_proj" in caught.value.__notes__[0]

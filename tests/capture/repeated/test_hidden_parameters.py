"""hidden_parameters: torch.export does not see layers' parameters, and the graph reads those that something used."""

import itertools
import queue

import torch
from torch import nn

from lorafx.capture.export import trace_part
from lorafx.capture.repeated.hidden_parameters import HiddenParameters

SEEN: queue.SimpleQueue = queue.SimpleQueue()  # of what a forward finds; a list would be seen to change


class Layer(nn.Module):
    """(…, 4) -> (…, 4); it has a parameter that it does not use."""

    def __init__(self):
        super().__init__()
        self.up, self.unused = nn.Linear(4, 4), nn.Parameter(torch.ones(2))

    def forward(self, x):
        SEEN.put(self.up.weight)
        return self.up(x).relu()


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(3)), nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_they_are_taken_out_of_layers_unless_something_else_has_them():
    model = Stack()
    model.tied = model.layers[1].up.weight
    HiddenParameters(model, model.layers)
    left = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert left == {"head.weight", "head.bias", "tied", "layers.1.up.weight"}
    assert model.layers[0].up._parameters == {"weight": None, "bias": None}


def test_stand_ins_pass_for_parameters_and_graphs_read_those_that_are_used():
    model, x = Stack(), torch.randn(3, 4)
    model.layers[0].up.weight.requires_grad_(False)
    gm = trace_part(model, "", (x,), {}, once=True)
    *_, seen = [SEEN.get() for _ in range(SEEN.qsize())]
    assert isinstance(seen, nn.Parameter) and type(seen) is not nn.Parameter and seen.shape == (4, 4)
    assert seen.requires_grad and not any(str(node.target).endswith("unused") for node in gm.graph.nodes)
    assert torch.equal(gm(x), model(x)) and all(p.device.type == "cpu" for p in model.parameters())
    assert {str(node.target) for node in gm.graph.find_nodes(op="get_attr")} >= {"head.weight", "head.bias"}


class Borrowing(Stack):
    """Reads a layer's weight before the layers, in another gradient mode."""

    def forward(self, x):
        with torch.no_grad():
            x = x @ self.layers[0].up.weight
        return super().forward(x)


def test_they_are_read_before_any_operator():
    model, x = Borrowing(), torch.randn(3, 4)
    gm = trace_part(model, "", (x,), {}, once=True)
    assert torch.equal(gm(x), model(x))
    before = list(itertools.takewhile(lambda node: node.op != "call_function", gm.graph.nodes))
    assert "layers.0.up.weight" in [str(node.target) for node in before]

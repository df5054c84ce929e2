"""turned: modules that turn their weight round and multiply by it are served without a graph."""

import pytest
import torch
from serving_models import served
from torch import nn
from torch.nn import functional as F

import lorafx
from lorafx.errors import UncoveredOperatorError

CONFIG = {"r": 2, "lora_alpha": 3, "target_modules": ["0"], "init_lora_weights": False}
READS = {
    "x @ W.T": lambda m, x: x @ m.weight.T + m.bias,
    "x @ W.t()": lambda m, x: x @ m.weight.t() + m.bias,
    "matmul of mT": lambda m, x: torch.matmul(x, m.weight.mT) + m.bias,
    "x.matmul of transpose": lambda m, x: x.matmul(m.weight.transpose(-1, 0)) + m.bias,
    "swapped by keywords": lambda m, x: x @ torch.transpose(m.weight, dim0=1, dim1=0) + m.bias,
    "mm": lambda m, x: torch.mm(x.flatten(0, -2), m.weight.T).unflatten(0, x.shape[:-1]) + m.bias,
    "addmm": lambda m, x: torch.addmm(m.bias, x.flatten(0, -2), m.weight.T).unflatten(0, x.shape[:-1]),
}


class Own(nn.Linear):
    """A linear layer that writes out what it does."""

    def __init__(self, read, outputs=5):
        super().__init__(6, outputs, dtype=torch.float64)
        self.read = read

    def forward(self, x):
        return self.read(self, x)


def compiled(read, outputs=5, **options):
    torch.manual_seed(0)
    return lorafx.compile(nn.Sequential(Own(read, outputs), nn.Tanh()), CONFIG, random_state=0, **options)


def expected(lora, x):
    layer = lora[0]
    change = 1.5 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    return torch.tanh(F.linear(x, layer.weight + change, layer.bias))


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_they_are_served_at_once_and_compute_what_a_graph_does(read):
    lora, x = compiled(read), torch.randn(2, 3, 6, dtype=torch.float64)
    for _ in range(3):  # of which the third looks at the weights' functions alone
        y = lora(x)
        torch.testing.assert_close(y, expected(lora, x))
    assert served(lora) == ["sites"]
    torch.testing.assert_close(compiled(read, capture="graph")(x), y)
    parameters = [p for p in lora.parameters() if p.requires_grad]
    found, wanted = (torch.autograd.grad(each.square().sum(), parameters) for each in (y, expected(lora, x)))
    torch.testing.assert_close(found, wanted)


def test_rows_choose_their_adapters():
    lora, x = compiled(READS["x @ W.T"], capture="sites"), torch.randn(3, 2, 6, dtype=torch.float64)
    lora.add_adapter("b", CONFIG, random_state=1)
    alone = lora(x)
    lora.set_adapter("b")
    other = lora(x)
    found = lora(x, adapter_names=["b", "default", "b"])
    torch.testing.assert_close(found, torch.stack([other[0], alone[1], other[2]]))


def test_what_leaves_its_module_is_known_as_long_as_the_call():
    class Gives(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self):
            return self.layer.weight.T

    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 5, bias=False)
            self.gives = Gives(self.layer)

        def forward(self, x):
            return x @ self.gives()

    lora = lorafx.compile(Takes(), {**CONFIG, "target_modules": ["layer"]}, capture="sites")
    x, layer = torch.randn(3, 6), lora.layer
    change = 1.5 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    torch.testing.assert_close(lora(x), F.linear(x, layer.weight + change))


@pytest.mark.parametrize("capture", ["auto", "sites"])
def test_what_is_kept_for_another_call_is_refused_there(capture):
    def read(layer, x):
        if not hasattr(layer, "kept"):
            layer.kept = layer.weight.T
        return x @ layer.kept + layer.bias

    lora, x = compiled(read, capture=capture), torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(UncoveredOperatorError, match=r"0\.weight is read by a tensor that shares its memory"):
        for _ in range(2):
            torch.testing.assert_close(lora(x), expected(lora, x))


OTHERS = {
    "linear": lambda m, x: F.linear(x, m.weight.T),
    "the other way round": lambda m, x: m.weight.T @ x.mT,
    "in a list": lambda m, x: torch.einsum("bi,io->bo", [x, m.weight.T]),
    "several": lambda m, x: torch.linalg.multi_dot([x, m.weight.T, m.weight]),
}


@pytest.mark.parametrize("read", OTHERS.values(), ids=OTHERS)
def test_other_products_with_a_turned_weight_are_no_linear_layers(read):
    lora, x = compiled(read, outputs=6, capture="sites"), torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(UncoveredOperatorError, match=r"0.* weight"):
        lora(x)

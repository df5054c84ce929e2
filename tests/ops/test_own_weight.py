"""own_weight: what a layer says its dense weight is, whoever asks."""

import pytest
import torch
from torch import nn

from lorafx.errors import AdapterError
from lorafx.tree.own_layers import number_of, run_by_itself

own_weight = torch.ops.lorafx.own_weight.default


@pytest.fixture
def layer():
    layer = nn.Linear(3, 5).double()
    run_by_itself(layer, "weight", 5, None, lambda module: None, lambda module, name: getattr(module, name) * 2)
    return layer


def test_it_is_what_the_layer_says_as_it_is_now(layer):
    x = torch.randn(2, 3, requires_grad=True)
    found = own_weight(x, number_of(layer), [5, 3])
    assert found.dtype == torch.float32 and not found.requires_grad
    assert torch.equal(found, (2 * layer.weight).float())
    with torch.no_grad():
        layer.weight.add_(1)
    assert torch.equal(own_weight(x, number_of(layer), [5, 3]), (2 * layer.weight).float())


def test_a_compiler_does_not_look_into_it(layer):
    number = number_of(layer)
    compiled = torch.compile(lambda x: x @ own_weight(x, number, [5, 3]).T, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, requires_grad=True)
    torch.testing.assert_close(compiled(x), x @ (2 * layer.weight).float().T)
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, (2 * layer.weight).float().sum(0).expand(2, 3))


def test_a_weight_of_another_shape_is_an_error(layer):
    with pytest.raises(AdapterError, match=r"Linear has a weight of \(5, 3\), which was \(4, 3\)"):
        own_weight(torch.randn(2, 3), number_of(layer), [4, 3])

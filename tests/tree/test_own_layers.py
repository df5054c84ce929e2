"""Layers that run their own forward: who they are, and by which number operators find them."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn

from lorafx.errors import AdapterError
from lorafx.tree.mirror import isolated, mirrored
from lorafx.tree.own_layers import NUMBER, layer_of, number_of, own_forward_of, run_by_itself, show_own_layers


class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return nn.functional.linear(2 * x, self.weight, self.bias)


def own(module=None):
    module = module or Double()
    run_by_itself(module, "weight", 3, None, lambda module: None, None)
    return module


def test_its_forward_is_the_operator_and_computes_what_the_module_does():
    plain = Double()
    expected, layer = plain(torch.ones(4, 2)), own(plain)
    torch.testing.assert_close(layer(torch.ones(4, 2)), expected, rtol=0, atol=0)
    assert own_forward_of(layer).features == 3 and own_forward_of(nn.Linear(2, 3)) is None
    first = own_forward_of(layer)
    assert own_forward_of(own(layer)) is first, "it is made one once"


def test_a_forward_that_was_put_on_the_module_itself_is_the_one_that_runs():
    layer = Double()
    layer.forward = lambda x: x.new_full((*x.shape[:-1], 3), 7.0)
    assert own(layer)(torch.ones(4, 2)).unique().item() == 7
    assert "forward" in vars(mirrored(layer)) and own_forward_of(mirrored(layer)) is None


def test_numbers_are_of_one_module_each_and_are_not_kept():
    layers = [own() for _ in range(3)]
    numbers = [int(number_of(layer)) for layer in layers]
    assert len(set(numbers)) == 3 and [layer_of(torch.tensor(n)) for n in numbers] == layers
    assert number_of(layers[0]) is number_of(layers[0])
    for other in (copy.deepcopy(layers[0]), mirrored(layers[0])):
        assert int(number_of(other)) not in numbers and layer_of(number_of(other)) is other
    assert layer_of(number_of(layers[0])) is layers[0]
    gone = numbers.pop()
    del layers[-1]
    gc.collect()
    with pytest.raises(AdapterError, match="deleted, or in another process"):
        layer_of(torch.tensor(gone))


def test_a_copy_runs_itself():
    layer = own()
    layer.lorafx_number = number_of(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.add_(1)
    x = torch.ones(4, 2)
    assert not torch.equal(layer(x), other(x))
    torch.testing.assert_close(other(x), Double.forward(other, x), rtol=0, atol=0)


def test_what_is_captured_has_tensors_without_values_and_the_layers_number():
    tree = nn.ModuleDict({"a": own(), "b": nn.Linear(3, 2)})
    before = tree["a"].weight
    bare = isolated(mirrored(tree))
    show_own_layers(bare, tree)
    assert bare["a"].weight.shape == before.shape and bare["a"].weight.untyped_storage().nbytes() == 4
    assert bare["a"].bias is tree["a"].bias
    assert bare["a"]._buffers[NUMBER] is number_of(tree["a"]) and NUMBER not in vars(bare["a"])
    assert bare["b"].weight is tree["b"].weight and tree["a"].weight is before
    assert own_forward_of(bare["a"]).module is bare["a"]


def test_another_bias_acts_for_one_call():
    layer, x = own(), torch.ones(4, 2)
    own_bias, zeros = layer.bias, torch.zeros(3)
    given = own_forward_of(layer).run(x, zeros)
    torch.testing.assert_close(given, 2 * x @ layer.weight.T, rtol=0, atol=1e-6)
    assert layer.bias is own_bias


def test_it_is_pickled():
    assert pickle.loads(pickle.dumps(nn.Sequential(Double())))[0](torch.ones(1, 2)).shape == (1, 3)


def test_threads_that_give_a_layer_different_biases_do_not_meet():
    layer, x = own(), torch.ones(4, 2)
    own_bias, forward = layer.bias, own_forward_of(layer)
    biases = [torch.full((3,), float(number)) for number in range(2)]
    expected = [forward.run(x, bias) for bias in biases]
    wrong = []

    def run(bias, wanted):
        wrong.extend(1 for _ in range(300) if not torch.equal(forward.run(x, bias), wanted))

    threads = [threading.Thread(target=run, args=each) for each in zip(biases, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and layer.bias is own_bias

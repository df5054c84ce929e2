"""mirror: a second tree of the same classes that shares every tensor, and nothing that is hung into it."""

import torch
from modules import Layer
from torch import nn

from lorafx.tree.attached import attach, own_children
from lorafx.tree.mirror import isolated, mirror, mirrored, without_hooks


class Holder(nn.Module):
    """Holds modules and methods of its parts in other places than `_modules`."""

    def __init__(self):
        super().__init__()
        self.layer = Layer()
        self.register_module("twin", None)
        self.again = self.layer
        self.parts, self.pair, self.table = [self.layer, 1], (self.layer,), {"act": self.layer.forward}
        self.plain = [3]
        self.method = self.layer.forward
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.method(x, self.scale)


def test_tensors_are_shared_even_when_one_is_replaced():
    model = Holder()
    copy = mirrored(model)
    assert type(copy) is Holder and copy is not model and copy.layer is not model.layer
    assert copy.layer.up.weight is model.layer.up.weight
    model.layer.up.weight = nn.Parameter(torch.zeros(6, 4))
    copy.scale = torch.tensor(5.0)
    assert not copy.layer.up.weight.any() and model.scale == 5
    x = torch.randn(3, 4)
    assert torch.equal(copy(x), model(x))


def test_modules_are_its_own_each_once():
    model = Holder()
    copy = mirrored(model)
    assert copy.again is copy.layer and copy._modules["twin"] is None
    copy.layer.extra = nn.Linear(2, 3)
    assert "extra" not in model.layer._modules
    copy.layer.eval()
    assert model.layer.training


def test_what_is_held_elsewhere_is_the_mirrors():
    model = Holder()
    copy = mirrored(model)
    assert copy.parts[0] is copy.pair[0] is copy.layer and copy.parts[1] == 1
    assert copy.method.__self__ is copy.table["act"].__self__ is copy.layer
    assert model.parts[0] is model.method.__self__ is model.layer
    assert copy.plain is model.plain


def test_what_was_attached_is_left_behind():
    model = Holder()
    attach(model, "layer.up.lora_A.default.weight", nn.Parameter(torch.ones(2, 4)))
    copy = mirrored(model)
    assert {name for name, _ in copy.named_modules()} == {name for name, _ in Holder().named_modules()}
    copy.layer.up.lora_A = nn.Module()
    assert own_children(copy.layer.up) == [copy.layer.up.lora_A], "one of its own, by the name of what was left behind"


def test_hooks_come_along_and_are_its_own():
    model, seen = Holder(), []
    model.layer.register_forward_hook(lambda *_: seen.append("layer"))
    copy = mirror(model)
    copy.layer.register_forward_pre_hook(lambda *_: seen.append("copy"))
    x = torch.randn(3, 4)
    model.layer(x, 1.0)
    assert seen == ["layer"]
    copy.layer(x, 1.0)
    assert seen == ["layer", "copy", "layer"]
    without_hooks(copy.layer)
    copy.layer(x, 1.0)
    assert len(seen) == 3 and len(model.layer._forward_hooks) == 1


def test_an_isolated_mirror_keeps_what_it_is_given_to_itself():
    model = Holder()
    model.table["nested"] = model.plain
    copy = isolated(mirrored(model))
    copy.plain.append(4)
    assert model.plain == [3] and copy.table["nested"] is copy.plain, "one container stays one"
    copy.layer._parameters.clear(), copy.layer.up._parameters.clear()
    assert model.layer.up.weight is not None and len(model.layer.up._parameters) == 2


def test_an_isolated_mirrors_stand_ins_are_parameters():
    model = Holder()
    model.layer.up._parameters["weight"] = torch.ones(6, 4, requires_grad=True)  # as functional_call leaves it
    copy = isolated(mirrored(model))
    assert isinstance(copy.layer.up.weight, nn.Parameter) and copy.layer.up.weight.requires_grad
    assert not isinstance(model.layer.up._parameters["weight"], nn.Parameter)

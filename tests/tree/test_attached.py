"""Attached: what adapters hang into a tree comes out again, and is told apart from the model's own."""

import copy
import operator
import pickle

import pytest
import torch
from modules import Stack
from torch import nn

from lorafx.tree.attached import (
    Held,
    Parents,
    attach,
    branch,
    detach,
    has_copies_among_children,
    named_own_modules,
    own_children,
    own_modules,
    set_trainable,
    trained_paths,
)
from lorafx.tree.hooks import RUNNING
from lorafx.tree.lookup import Ways, find_tensor, find_tensors, first_name

PATH = "layers.1.up.lora_A.default.weight"


def hung(*paths: str) -> nn.Module:
    model = Stack(depth=2).eval()
    for path in paths:
        attach(model, path, nn.Parameter(torch.ones(2, 4)))
    return model


def test_modules_on_the_way_are_made_in_the_owners_mode():
    model = hung(PATH)
    assert torch.equal(find_tensor(model, PATH), torch.ones(2, 4))
    made = model.get_submodule("layers.1.up.lora_A.default")
    assert not list(made.buffers()) and not made.training
    model.layers[0].up.train()
    attach(model, "layers.0.up.lora_A.default.weight", nn.Parameter(torch.ones(2, 4)))
    assert model.get_submodule("layers.0.up.lora_A.default").training


def test_what_a_module_has_of_an_adapter_is_found_by_the_adapters_name():
    model = hung(PATH, "layers.1.up.lora_embedding_A.other")
    up = model.layers[1].up
    assert up.lora_A["default"] is up.lora_A.default and [*up.lora_A] == ["default"]
    assert up.lora_embedding_A["other"] is up.lora_embedding_A.other
    assert "default" in up.lora_A and "other" not in up.lora_A
    with pytest.raises(KeyError, match="other"):
        up.lora_A["other"]


def test_buffers_that_no_state_dict_has_survive_the_meta_device():
    model, path = Stack(depth=2), "layers.1.up.adapter_scaling.default"
    attach(model, path, torch.tensor(1.5))
    state = model.state_dict()
    assert path not in state
    for back in (lambda: model.to_empty(device="cpu"), lambda: model.load_state_dict(state, assign=True)):
        model.to("meta").half()
        assert find_tensor(model, path).is_meta
        back()
        assert find_tensor(model, path).item() == 1.5
    model.layers[1].to_empty(device="cpu")
    model.to(torch.float64)
    assert find_tensor(model, path).item() == 1.5 and find_tensor(model, path).dtype == torch.float64


@pytest.mark.parametrize(
    "replace",
    [
        lambda holder, other: setattr(holder, "default", other),
        lambda holder, other: holder.add_module("default", other),
        lambda holder, other: holder._modules.__setitem__("default", other),
        lambda holder, other: holder._modules.update(default=other),
        lambda holder, other: operator.ior(holder._modules, {"default": other}),
        lambda holder, other: (holder._modules.pop("default"), holder.add_module("default", other)),
        lambda holder, other: (delattr(holder, "default"), holder.add_module("default", other)),
        lambda holder, other: (holder._modules.clear(), holder.add_module("default", other)),
    ],
)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_whoever_replaces_a_module_that_was_made_is_noticed(replace, copied):
    model = copied(hung(PATH))
    held = Held(model, Ways([PATH]))
    attach(model, "layers.1.up.lora_A.other.weight", nn.Parameter(torch.ones(2, 4)))
    detach(model, ["layers.1.up.lora_A.other.weight"])
    assert held.parents.are_in_place
    replace(model.layers[1].up.lora_A, nn.Linear(4, 2, bias=False))
    assert not held.parents.are_in_place


def test_what_is_hung_in_is_none_of_the_models_own():
    model = hung(PATH)
    own = list(own_modules(model))
    assert len(own) == len(set(own)) == len(list(Stack(depth=2).modules()))
    assert model.layers[1].up.lora_A not in own
    assert own_children(model.layers[1].up) == [] and own_children(model.layers[1]) == [
        model.layers[1].up,
        model.layers[1].down,
    ]
    assert not has_copies_among_children(model.layers[1].up) and not has_copies_among_children(model.layers[1])
    attach(model, "layers.1.modules_to_save.default.up", nn.Parameter(torch.ones(2)))
    assert has_copies_among_children(model.layers[1])


def test_a_models_own_python_goes_through_its_own_children_alone():
    model = hung(PATH)
    attach(model, "layers.1.modules_to_save.default.up", nn.Parameter(torch.ones(2)))
    layer, names = model.layers[1], ["up", "down"]

    def seen():
        by_names = [*layer._modules], [*layer._modules.keys()], [name for name, _ in layer._modules.items()]
        backwards = [*reversed(layer._modules)][::-1]
        assert len(layer._modules) == len(layer._modules.values()) == len([*layer.children()])
        assert all(each == by_names[0] for each in (*by_names, backwards, [*dict(layer._modules)]))
        return by_names[0]

    assert seen() == [*names, "modules_to_save"]
    RUNNING.mode = object()
    try:
        assert seen() == names and layer.modules_to_save is not None
    finally:
        RUNNING.mode = None
    assert seen() == [*names, "modules_to_save"] == [name for name, _ in copy.deepcopy(layer).named_children()]


def test_a_module_with_two_names_is_one_of_the_models_own():
    model = Stack(depth=2)
    model.again = model.layers[0]
    every = list(model.named_modules())
    attach(model, PATH, nn.Parameter(torch.ones(2, 4)))
    assert len(list(own_modules(model))) == len(every) and list(named_own_modules(model)) == every


def test_what_is_taken_out_leaves_no_empty_module():
    other = "layers.1.up.lora_A.other.weight"
    model = hung(PATH, other)
    names = [name for name, _ in Stack(depth=2).named_modules()]
    detach(model, [PATH, "layers.7.gone.weight"])
    assert find_tensor(model, PATH) is None and find_tensor(model, other) is not None
    assert "layers.1.up.lora_A" in dict(model.named_modules())
    detach(model, [other])
    assert [name for name, _ in model.named_modules()] == names
    model.layers[1].up.lora_A = nn.Module()
    assert own_children(model.layers[1].up) == [model.layers[1].up.lora_A], "one of the model's own by the same name"


def test_a_module_that_holds_another_adapters_buffer_stays():
    model, (first, second) = Stack(depth=2), (f"layers.1.up.adapter_scaling.{name}" for name in ("default", "other"))
    for path in (first, second):
        attach(model, path, torch.ones(()))
    detach(model, [first])
    assert find_tensor(model, first) is None and find_tensor(model, second) is not None


def test_an_empty_module_of_the_models_own_stays():
    model = Stack(depth=2)
    model.layers[1].up.lora_A = nn.Module()
    attach(model, PATH, nn.Parameter(torch.ones(2, 4)))
    detach(model, [PATH])
    assert dict(model.layers[1].up.named_children()).keys() == {"lora_A"}


def test_a_branch_has_the_live_modules_and_no_others():
    model = hung()
    bare = branch(model, ["layers.1.up", "head", "layers.1"])
    assert bare.get_submodule("layers.1") is model.layers[1] and bare.head is model.head
    assert dict(bare.named_children()).keys() == {"layers", "head"} and not bare.training
    assert dict(bare.layers.named_children()).keys() == {"1"} and not bare.layers.training
    assert branch(model, ["", "head"]) is model


def test_what_trains_is_what_was_said():
    model = hung(PATH).requires_grad_(False)
    model.head.weight.requires_grad_(True)
    set_trainable(find_tensors(model, [PATH, "head.bias", "nowhere.weight"]), True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {PATH, "head.bias", "head.weight"}
    set_trainable(find_tensors(model, ["head.weight"]), False)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {PATH, "head.bias"}
    assert trained_paths(model) == {"head.bias"}, "an adapter's own are not the base's"
    model.scale = nn.Parameter(torch.ones(1))
    assert trained_paths(model) == {"head.bias", "scale"}


OTHER = "layers.0.up.lora_A.default.weight"


def trained_by(held, model):
    """The tensors, by path, that train when those that are held are to, and do not when they are not."""
    found = []
    for trains in (True, False):
        held.set_trainable(trains)
        found.append([path for path in held.ways.paths if getattr(find_tensor(model, path), "requires_grad", False)])
    assert not found[1]
    return found[0]


def test_what_holds_tensors_has_those_train_that_are_there_now():
    model = hung(PATH, OTHER)
    held = Held(model, Ways([PATH, OTHER, "layers.0.up.lora_A.gone.weight"]))
    assert trained_by(held, model) == [PATH, OTHER]
    held = Held(model, Ways([PATH, OTHER]))
    before = model.get_parameter(PATH)
    owner = model.get_submodule("layers.1.up.lora_A.default")
    owner._parameters["weight"] = nn.Parameter(torch.zeros(3, 4))
    assert trained_by(held, model) == [PATH, OTHER] and not before.requires_grad
    weight = owner._parameters.pop("weight")  # as FSDP1 does
    vars(owner)["weight"] = weight.detach()
    assert trained_by(held, model) == [OTHER] and held.parents.are_in_place
    vars(owner).pop("weight")
    owner.register_parameter("weight", None)
    assert trained_by(held, model) == [OTHER]
    owner.weight = weight
    assert trained_by(held, model) == [PATH, OTHER]


def test_what_holds_tensors_is_good_until_a_module_is_another():
    model = hung(PATH, OTHER)
    parents = lambda: Parents(ways := Ways([PATH, OTHER, "layers.0.up.bias"]), ways.modules(model))  # noqa: E731
    known, holder = parents(), model.layers[1].up.lora_A
    assert known.are_in_place and known.are_bare
    for replace in (setattr, type(holder).add_module, lambda *named: delattr(*named[:2]) or setattr(*named)):
        replace(holder, "default", nn.Linear(4, 3))
        assert not known.are_in_place
        known = parents()
        assert known.are_in_place
    model.layers[1].up.lora_A = nn.ModuleDict({"default": nn.Linear(4, 3)})
    assert not known.are_in_place
    known = parents()
    model.layers[0] = nn.Sequential(model.layers[0])
    assert not known.are_in_place


def test_adapters_at_the_same_sites_have_what_is_above_them_in_common():
    model = hung(PATH, beside := PATH.replace("default", "b"), OTHER)
    held = Held(model, Ways([PATH]))
    assert Held(model, Ways([beside]), [held.parents]).parents is held.parents
    assert Held(model, Ways([PATH, OTHER]), [held.parents]).parents is not held.parents
    assert Held(model, Ways([OTHER]), [held.parents]).parents is not held.parents


def test_the_first_name_of_a_tied_weight():
    model = Stack(depth=2)
    model.layers[1].up.weight = model.layers[0].up.weight
    assert first_name(model, "layers.1.up.weight") == "layers.0.up.weight"
    assert find_tensor(model, "layers.0") is None and find_tensor(model, "layers.0.up.nothing") is None

"""wrappers: what is around a base before it is adapted is taken off, kept as a hook, or refused; names are bare."""

import copy
from collections import UserDict

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module
from graphs import adapted
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import lorafx
from lorafx.errors import AdapterError, MergeError
from lorafx.tree.mirror import mirrored
from lorafx.tree.wrappers import innermost, side_by_side, unwrapped


def refuses(gm, inputs):
    raise AssertionError("somebody ran what was compiled before")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.fc(x))


class DecoratedLayer(Layer):
    forward = torch.compile(Layer.forward, backend=refuses)


class Net(nn.Module):
    def __init__(self, layer=Layer):
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.out, self.act = nn.Linear(4, 3), torch.relu

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.out(self.act(x))


def net(layer=Layer):
    torch.manual_seed(0)
    return Net(layer)


def compiled(what):
    return torch.compile(what, backend=refuses)


def whole(model):
    return compiled(model)


def in_place(model):
    model.compile(backend=refuses)
    return model


def forward(model):
    model.forward = compiled(model.forward)
    return model


def layers(model):
    model.layers[0] = compiled(model.layers[0])
    model.layers[1].compile(backend=refuses)
    return model


def layers_and_leaves(model):
    model.layers[0].forward = compiled(model.layers[0].forward)
    model.layers[1].fc.forward = compiled(model.layers[1].fc.forward)
    model.act = compiled(torch.relu)
    return compiled(model)


def decorated(_):
    return net(DecoratedLayer)


x = torch.linspace(-1, 1, 12).view(3, 4)


WAYS = in_place, forward, layers, layers_and_leaves, decorated


@pytest.mark.parametrize("capture", ["graph", pytest.param("sites", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "wrap",
    [
        whole,
        *(pytest.param(w, marks=pytest.mark.slow) for w in (in_place, forward, layers, layers_and_leaves, decorated)),
    ],
)
def test_nothing_that_was_compiled_before_runs(wrap, capture, tmp_path):
    plain = adapted(net())
    lora = lorafx.compile(wrap(net()), plain.peft_config["default"], random_state=0, capture=capture)
    result = lora(x)
    assert torch.allclose(result, plain(x), atol=1e-6) and not torch.allclose(result, net()(x))
    assert dict(lora.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    result.sum().backward()
    assert all(parameter.grad is not None for parameter in lora.parameters() if parameter.requires_grad)
    for model, name in ((lora, "wrapped"), (plain, "bare")):
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("wrapped", "bare")]
    assert files[0].keys() == files[1].keys()


def test_the_base_keeps_its_wrapper_and_gets_its_modes_back():
    base = layers(net().eval())
    wrapper = torch.compile(base, backend="eager")
    lora = adapted(wrapper)
    lora.train()
    assert lora.merge_and_unload() is wrapper and base.layers[0]._orig_mod.fc.training
    assert type(base.layers[0]).__name__ == "OptimizedModule"


def test_an_adapted_model_is_recognised_within_its_wrapper_and_within_a_model():
    """It would run without its adapter: what is mirrored is the base."""
    with pytest.raises(AdapterError, match="adapted already"):
        adapted(torch.compile(adapted(net())))
    with pytest.raises(AdapterError, match=r"1\.inner in the model is adapted already"):
        adapted(nn.Sequential(nn.Linear(3, 4), nn.ModuleDict({"inner": adapted(net())})), target_modules=["0"])
    with pytest.raises(AdapterError, match=r"0\.fc in the model is adapted already"):
        adapted(adapted(net()).layers, target_modules=["1.fc"])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_scripted_module_is_refused():
    with pytest.raises(AdapterError, match=r"^1 is scripted by torch\.jit"):
        adapted(nn.Sequential(nn.Linear(3, 4), torch.jit.script(nn.ReLU())), target_modules=["0"])


def test_data_parallelism_over_one_device_is_nothing():
    model = nn.DataParallel(net())
    assert unwrapped(model) is innermost(model) is model.module
    assert "out.lora_A.default.weight" in dict(adapted(model).named_parameters())
    model.device_ids = [0, 1]
    with pytest.raises(AdapterError, match=r"wrapped in DataParallel.*adapt the model first"):
        adapted(model)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_processes_that_share_a_base_are_refused(one_process, monkeypatch):
    model = nn.parallel.DistributedDataParallel(net())
    assert unwrapped(model) is model.module
    monkeypatch.setattr(type(model.process_group), "size", lambda self: 2)
    with pytest.raises(AdapterError, match="DistributedDataParallel"):
        adapted(model)
    monkeypatch.undo()
    with pytest.raises(AdapterError, match="FullyShardedDataParallel"):
        adapted(FullyShardedDataParallel(net(), device_id=torch.device("cpu")))


def test_modules_side_by_side_are_those_of_the_same_name():
    base = layers(net())
    pairs = dict(side_by_side(base, mirrored(base)))
    assert len(pairs) == 7 and all(type(a) is type(b) and a is not b for a, b in pairs.items())


# --- accelerate ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hooks_that_move_arguments_are_part_of_the_graph():
    base = accelerate.dispatch_model(net(), {"": "cpu"}, force_hooks=True)
    lora = adapted(base)
    assert torch.equal(lora(x), adapted(net())(x)) and lora.explain().calls[0].served_by == "graph"
    assert "forward" in vars(base.layers[0].fc) and not hasattr(lora.layers[0].fc, "_hf_hook")


@pytest.mark.parametrize("where", ["cpu", pytest.param("disk", marks=pytest.mark.slow)])
def test_weights_that_are_loaded_for_a_call_are_adapted_there(where, tmp_path):
    base = net()
    offload = accelerate.cpu_offload if where == "cpu" else accelerate.disk_offload
    offload(base, **({} if where == "cpu" else {"offload_dir": str(tmp_path)}), execution_device=torch.device("cpu"))
    lora, plain = adapted(base), adapted(net())
    for model in (lora, copy.deepcopy(lora)):
        result = model(x)
        assert torch.allclose(result, plain(x), atol=1e-6)
        result.sum().backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert trained and all(parameter.grad is not None for parameter in trained)
        assert model.out.weight.is_meta
    with pytest.raises(MergeError, match="meta device"):
        lora.merge_adapter()


def test_offloaded_weights_cannot_be_copied():
    base = accelerate.cpu_offload(net(), execution_device=torch.device("cpu"))
    with pytest.raises(AdapterError, match=r"out\.bias is offloaded"):
        adapted(base, target_modules=["out"], bias="lora_only")


def test_a_hook_without_gradients_is_refused():
    class Without(ModelHook):
        no_grad = True

    base = net()
    add_hook_to_module(base.out, Without())
    with pytest.raises(AdapterError, match="Without runs Linear without gradients"):
        adapted(base)


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["out"], ["fc"], "all-linear"])
def test_a_base_that_holds_layers_of_peft_is_refused(targets):
    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["out"]))
    for base in (model, model.get_base_model()):
        with pytest.raises(AdapterError, match=r"out is peft\.tuners\.lora\.layer\.Linear .*'default'.*unload"):
            adapted(base, target_modules=targets)
    assert adapted(model.unload(), target_modules=targets)(x).shape == (3, 3)


def test_a_base_whose_tensors_a_library_moves_about_is_refused():
    packed, moved = Net(), Net()
    packed.layers[1].fc.quantization_status = "compressed"
    moved.layers[1].fc._parameters = UserDict(moved.layers[1].fc._parameters)
    for base, words in ((packed, "is packed until the model is first called"), (moved, "is in a UserDict")):
        with pytest.raises(AdapterError, match=rf"layers\.1\.fc .Linear. {words}.*dequantize=True"):
            lorafx.compile(base, {"r": 2, "target_modules": ["0.fc"]})

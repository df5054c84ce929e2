"""The LoRA kind: start values, shapes, and what it refuses."""

import math

import pytest
import torch
from graphs import Chain
from modules import EveryForm
from torch import nn

import lorafx
from lorafx.errors import AdapterError, ConfigError, MergeError


def start(model=None, **config):
    seed = config.pop("random_state", 0)
    chosen = {"r": 3, "target_modules": ["second"], **config}
    lora = lorafx.compile(model or Chain(), chosen, random_state=seed)
    return {n.split(".lora_")[1]: p.detach() for n, p in lora.named_parameters() if ".lora_" in n}


def test_a_is_kaiming_uniform_and_b_zero():
    tensors = start(nn.Sequential(nn.Linear(400, 300)), target_modules=["0"], r=50)
    a, bound = tensors["A.default.weight"], 1 / math.sqrt(400)
    assert a.abs().max() <= bound and abs(a.std() - bound / math.sqrt(3)) < 0.02 * bound
    assert not tensors["B.default.weight"].any()


def test_gaussian_has_standard_deviation_one_over_r():
    a = start(nn.Sequential(nn.Linear(400, 300)), target_modules=["0"], r=50, init_lora_weights="gaussian")
    assert abs(a["A.default.weight"].std() - 1 / 50) < 0.02 / 50
    assert not a["B.default.weight"].any()


def test_false_leaves_nothing_zero():
    assert all(tensor.any() for tensor in start(init_lora_weights=False, lora_bias=True).values())


def test_an_embedding_starts_the_other_way_round():
    tensors = start(nn.Sequential(nn.Embedding(11, 5)), target_modules=["0"])
    assert tensors["embedding_A.default"].shape == (3, 11) and not tensors["embedding_A.default"].any()
    assert tensors["embedding_B.default"].shape == (5, 3) and tensors["embedding_B.default"].any()


def test_shapes_of_every_form():
    targets = ["embedding", "conv1d", "conv2d", "conv3d", "addmm", "linear"]
    lora = lorafx.compile(EveryForm(), {"r": 2, "target_modules": targets})
    shapes = {n: tuple(p.shape) for n, p in lora.named_parameters() if ".lora_" in n and "embedding" not in n}
    assert shapes == {
        "conv1d.lora_A.default.weight": (2, 4, 3),
        "conv1d.lora_B.default.weight": (6, 1, 1),
        "conv2d.lora_A.default.weight": (2, 1, 3, 2),
        "conv2d.lora_B.default.weight": (5, 2, 1, 1),
        "conv3d.lora_A.default.weight": (2, 5, 2, 1, 2),
        "conv3d.lora_B.default.weight": (7, 2, 1, 1, 1),
        "addmm.lora_A.default.weight": (2, 7),
        "addmm.lora_B.default.weight": (5, 2),
        "linear.lora_A.default.weight": (2, 5),
        "linear.lora_B.default.weight": (3, 2),
    }


def test_random_state_decides_alone():
    torch.manual_seed(1)
    first = start(init_lora_weights=False, random_state=7)
    state = torch.get_rng_state()
    second = start(init_lora_weights=False, random_state=7)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = start(init_lora_weights=False, random_state=8)
    assert not torch.equal(first["A.default.weight"], other["A.default.weight"])
    torch.set_rng_state(state)
    model = Chain()
    untouched = torch.get_rng_state()
    start(model, init_lora_weights=False, random_state=7)
    assert torch.equal(torch.get_rng_state(), untouched)


def test_without_random_state_the_global_generator_decides():
    tensors = []
    for _ in range(2):
        model = Chain()
        torch.manual_seed(3)
        tensors.append(start(model, random_state=None)["A.default.weight"])
    assert torch.equal(*tensors)


@pytest.mark.parametrize(
    ("base", "autocast", "expected"),
    [
        (torch.bfloat16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float16, True, torch.float32),
        (torch.float64, True, torch.float64),
    ],
)
def test_dtype_of_the_adapter(base, autocast, expected):
    lora = lorafx.compile(Chain().to(base), {"target_modules": ["second"]}, autocast_adapter_dtype=autocast)
    assert lora.second.lora_A.default.weight.dtype == expected


def test_low_memory_leaves_the_adapter_on_meta():
    lora = lorafx.compile(Chain(), {"target_modules": ["second"]}, low_cpu_mem_usage=True)
    assert lora.second.lora_A.default.weight.is_meta and not lora.first.weight.is_meta


def test_what_cannot_be_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2))
    with pytest.raises(ConfigError, match=r"groups=2.*rank 3"):
        lorafx.compile(model, {"target_modules": ["0"], "r": 3})
    with pytest.raises(ConfigError, match="lora_bias"):
        lorafx.compile(nn.Sequential(nn.Embedding(4, 3)), {"target_modules": ["0"], "lora_bias": True})
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_no_weight_change_cannot_be_merged():
    lora = lorafx.compile(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), {"target_modules": ["0"], "r": 4})
    with pytest.raises(MergeError, match="groups=2"):
        lora.merge_adapter()


@pytest.mark.parametrize("name", ["", "a.b", "train", "forward"])
def test_a_name_that_no_module_can_have(name):
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        lorafx.compile(Chain(), {"target_modules": ["second"]}, adapter_name=name)

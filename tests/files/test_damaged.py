"""A damaged adapter, or one that does not fit, is one clear error and changes nothing."""

from __future__ import annotations

import json
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from checkpoints import (
    A_KEY,
    B_KEY,
    PREFIX,
    SETTINGS,
    SITE,
    adapted,
    base_model,
    config_of,
    load,
    set_config,
    set_tensors,
    tensors_of,
    to_pickle,
)
from safetensors.torch import save_file
from torch import Tensor, nn

import lorafx
from lorafx.adapters import building as making
from lorafx.adapters.kinds.lora_config import NOT_YET
from lorafx.errors import CheckpointError, ConfigError, LorafxError
from lorafx.files.checkpoint import CONFIG, OLD_WEIGHTS, WEIGHTS
from lorafx.testing import adapter_tensors, assert_same_tensors, same_bits

ASKED = {
    "megatron_config": {"a": 1},
    "loftq_config": {"loftq_bits": 4},
    "arrow_config": {"top_k": 2},
    "peft_type": "XLORA",
}


@dataclass(frozen=True)
class State:
    """What must not change about a model: its tensors, flags and modes, and what modules it has."""

    tensors: Mapping[str, Tensor]
    identities: Mapping[str, int]
    trainable: Mapping[str, bool]
    modes: Mapping[str, bool]

    @classmethod
    def of(cls, model: nn.Module) -> State:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls(
            {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
            {name: id(parameter) for name, parameter in parameters.items()},
            {name: parameter.requires_grad for name, parameter in parameters.items()},
            {name: module.training for name, module in model.named_modules()},
        )

    def check(self, model: nn.Module) -> None:
        now = State.of(model)
        assert_same_tensors(now.tensors, self.tensors)
        assert (now.identities, now.trainable, now.modes) == (self.identities, self.trainable, self.modes)


def edited(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def with_tensor(key: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    return lambda folder: set_tensors(folder, **{key: change(tensors_of(folder)[key])})


def with_new(key: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    return lambda folder: set_tensors(folder, **{key: torch.zeros(shape)})


def with_field(**values: Any) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, **values)


def without_field(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config_of(folder).items() if k != name}))

    return damage


def missing(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def a_folder_instead(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def one_value(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


SAVED_KEY = f"{PREFIX}model.norm.weight"
NEW_KEY = f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight"

DAMAGED_WEIGHTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    **{f"cut to {n} bytes": (edited(WEIGHTS, lambda b, n=n: b[:n]), ()) for n in (0, 1, 7, 8, 9, 100, 1000)},
    **{f"cut by {n} bytes": (edited(WEIGHTS, lambda b, n=n: b[:-n]), ()) for n in (1, 4, 3000)},
    "longer": (edited(WEIGHTS, lambda b: b + b"\0"), ()),
    "no safetensors": (edited(WEIGHTS, lambda b: b"PK\x03\x04 this is something else" * 40), ()),
    "huge header": (edited(WEIGHTS, lambda b: struct.pack("<Q", 2**60) + b[8:]), ()),
    "header no JSON": (edited(WEIGHTS, lambda b: b[:8] + b"x" + b[9:]), ()),
    "missing file": (missing(WEIGHTS), ()),
    "a folder": (a_folder_instead(WEIGHTS), ()),
    "no tensors": (lambda folder: save_file({}, folder / WEIGHTS), (A_KEY,)),
    "NaN": (with_tensor(B_KEY, lambda t: one_value(t, float("nan"))), (B_KEY,)),
    "infinity": (with_tensor(A_KEY, lambda t: one_value(t, -float("inf"))), (A_KEY,)),
    "NaN in a saved module": (with_tensor(SAVED_KEY, lambda t: one_value(t, float("nan"))), (SAVED_KEY,)),
    "missing key": (with_tensor(B_KEY, lambda t: None), (B_KEY,)),
    "missing saved module": (with_tensor(SAVED_KEY, lambda t: None), (SAVED_KEY,)),
    "unexpected site": (with_new(NEW_KEY, (4, 48)), (NEW_KEY,)),
    "unexpected suffix": (with_new(f"{PREFIX}{SITE}.lora_B.bias", (64,)), (f"{PREFIX}{SITE}.lora_B.bias",)),
    "unexpected base weight": (with_new(f"{PREFIX}{SITE}.weight", (64, 48)), (f"{PREFIX}{SITE}.weight",)),
    **{
        f"{wrapper} of {owner}": (with_new(f"{PREFIX}{owner}.{wrapper}.weight", (4,)), (owner,))
        for wrapper in ("modules_to_save", "modules_to_save.default", "original_module")
        for owner in ("nowhere", SITE)
    },
    "key without prefix": (with_new(f"{SITE}.lora_A.weight", (4, 48)), (f"{SITE}.lora_A.weight",)),
    "wrong shape": (with_tensor(A_KEY, lambda t: t[:, :-1]), (A_KEY,)),
    "transposed": (with_tensor(B_KEY, lambda t: t.t()), (B_KEY,)),
    "flattened": (with_tensor(B_KEY, lambda t: t.flatten()), (B_KEY,)),
    "a scalar": (with_tensor(B_KEY, lambda t: t[0, 0]), (B_KEY,)),
    "empty": (with_tensor(B_KEY, lambda t: t[:0]), (B_KEY,)),
    "wrong rank": (with_tensor(A_KEY, lambda t: t[:2]), (A_KEY,)),
    "wrong shape of a saved module": (with_tensor(SAVED_KEY, lambda t: t[:-1]), (SAVED_KEY,)),
    "integers": (with_tensor(A_KEY, lambda t: t.to(torch.int32)), (A_KEY,)),
    "booleans": (with_tensor(B_KEY, lambda t: t > 0), (B_KEY,)),
    "complex": (with_tensor(B_KEY, lambda t: t.to(torch.complex64)), (B_KEY,)),
    "integers in a saved module": (with_tensor(SAVED_KEY, lambda t: t.to(torch.int64)), (SAVED_KEY,)),
    "wrong embedding shape": (
        with_new(f"{PREFIX}model.embed_tokens.weight", (3, 48)),
        ("model.embed_tokens.weight",),
    ),
    "wrong embedding dtype": (
        lambda folder: set_tensors(
            folder, **{f"{PREFIX}lm_head.weight": torch.ones(models.VOCABULARY, 48, dtype=torch.int32)}
        ),
        ("lm_head.weight",),
    ),
}

DAMAGED_CONFIGS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing file": (missing(CONFIG), ()),
    "a folder": (a_folder_instead(CONFIG), ()),
    "empty": (edited(CONFIG, lambda b: b""), ()),
    "cut": (edited(CONFIG, lambda b: b[: len(b) // 2]), ()),
    "no JSON": (edited(CONFIG, lambda b: b"r = 4\n"), ()),
    "no text": (edited(CONFIG, lambda b: b"\xff\xfe\x00\x01"), ()),
    "too deep": (edited(CONFIG, lambda b: b"[" * 100_000), ()),
    "a list": (edited(CONFIG, lambda b: b"[" + b + b"]"), ()),
    "null": (edited(CONFIG, lambda b: b"null"), ()),
    "no peft_type": (without_field("peft_type"), ("peft_type",)),
    "unknown site": (with_field(target_modules=["q_porj"]), ("target_modules",)),
    "other rank": (with_field(r=8), (A_KEY, "`r`", "is 8", "r=4")),
    "other rank pattern": (with_field(rank_pattern={"down_proj": 3}), ("down_proj.lora_A.weight", "`rank_pattern`")),
    "unknown module to save": (with_field(modules_to_save=["nrom"]), ("modules_to_save",)),
    **{f"asks {field}": (with_field(**{field: value}), (field,)) for field, value in ASKED.items()},
}

NAN, INFINITY = float("nan"), float("inf")
WRONG_VALUES: list[tuple[str, Any]] = [
    *[("r", value) for value in ("8", 0, -1, 2.5, True, None, [4])],
    *[("lora_alpha", value) for value in ("16", None, True, NAN, INFINITY)],
    *[("lora_dropout", value) for value in ("0", 1.5, -0.1, None, NAN)],
    *[("bias", value) for value in ("some", None, True)],
    *[("target_modules", value) for value in (5, [1], {"q_proj": 1}, [["q_proj"]], "(", "*_proj", True)],
    *[("exclude_modules", value) for value in (3, [None], "(", {"a": 1})],
    *[("layers_to_transform", value) for value in ("1", [0.5], [True], {"0": 1}, [None])],
    *[("rank_pattern", value) for value in ([1], "q_proj", {"q_proj": "4"}, {"q_proj": 0}, {"(": 2})],
    *[("alpha_pattern", value) for value in ([1], {"q_proj": None}, {"q_proj": NAN}, {"(": 2})],
    *[("modules_to_save", value) for value in ("norm", [1], 7, ["norm", "("])],
    *[("init_lora_weights", value) for value in (3, None, ["gaussian"])],
    *[(name, "yes") for name in ("use_rslora", "lora_bias", "fan_in_fan_out", "inference_mode", "use_dora")],
    *[("peft_type", value) for value in (3, None, ["LORA"], "", "lora")],
    *[("megatron_core", 5), ("qalora_group_size", "x"), ("eva_config", 5)],  # without effect here, but wrong
    *[(name, 5) for name in ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")],
]


def assert_one_error(folder: Path, file: str, named: tuple[str, ...], **how: Any) -> None:
    """Loading is one error that names the file and these, and base and adapted models are as they were."""
    base, other = base_model(), adapted()
    base.model.norm.weight.requires_grad_(False)
    base.model.layers[0].eval()
    before, other_before, names = State.of(base), State.of(other), list(other.peft_config)
    for attempt in (
        lambda: lorafx.load(base, folder, **how),
        lambda: lorafx.load(base, folder, is_trainable=True, **how),
        lambda: other.load_adapter(folder, "second", **how),
    ):
        with warnings.catch_warnings(), pytest.raises(LorafxError) as caught:
            warnings.simplefilter("ignore")
            attempt()
        before.check(base)
        other_before.check(other)
        assert list(other.peft_config) == names and other.active_adapters == ["default"]
        for part in (str(folder / file), *named):
            assert part in str(caught.value)


@pytest.mark.parametrize("what", DAMAGED_WEIGHTS)
def test_damaged_weights_are_one_error_and_change_nothing(saved: Path, what: str) -> None:
    damage, named = DAMAGED_WEIGHTS[what]
    damage(saved)
    assert_one_error(saved, WEIGHTS, named)


@pytest.mark.parametrize("what", DAMAGED_CONFIGS)
def test_damaged_configs_are_one_error_and_change_nothing(saved: Path, what: str) -> None:
    damage, named = DAMAGED_CONFIGS[what]
    damage(saved)
    assert_one_error(saved, WEIGHTS if what.startswith("other rank") else CONFIG, named)


@pytest.mark.parametrize(("field", "value"), WRONG_VALUES, ids=str)
def test_a_config_value_that_makes_no_sense_is_one_error_and_changes_nothing(
    saved: Path, field: str, value: Any
) -> None:
    set_config(saved, **{field: value})
    assert_one_error(saved, CONFIG, (field,))


def test_a_layers_pattern_that_is_no_regex_is_one_error(saved: Path) -> None:
    set_config(saved, layers_pattern="(", layers_to_transform=[0])
    assert_one_error(saved, CONFIG, ("layers_pattern",))


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", {A_KEY: 3}, [1, 2], {1: torch.ones(2)}, {A_KEY: {"nested": torch.ones(2)}}],
    ids=["empty", "text", "number", "list", "number as key", "nested"],
)
def test_damaged_pickles_are_one_error_and_change_nothing(saved: Path, content: Any) -> None:
    to_pickle(saved)
    if isinstance(content, bytes):
        (saved / OLD_WEIGHTS).write_bytes(content)
    else:
        torch.save(content, saved / OLD_WEIGHTS)
    assert_one_error(saved, OLD_WEIGHTS, (), weights_only=True)


@pytest.mark.parametrize("length", [10, 200, 2000])
def test_cut_pickles_are_one_error_and_change_nothing(saved: Path, length: int) -> None:
    to_pickle(saved)
    edited(OLD_WEIGHTS, lambda data: data[:length])(saved)
    assert_one_error(saved, OLD_WEIGHTS, (), weights_only=True)


def test_every_field_that_is_not_implemented_is_in_the_table() -> None:
    assert set(NOT_YET) <= set(ASKED)


@pytest.mark.parametrize("field", ASKED)
def test_a_field_that_is_not_implemented_is_refused_by_compile(field: str) -> None:
    base = base_model()
    before = State.of(base)
    with pytest.raises(ConfigError, match=field):
        lorafx.compile(base, SETTINGS | {field: ASKED[field]})
    before.check(base)


def test_float8_tensors_load_as_in_peft(saved: Path) -> None:
    expected = tensors_of(saved)[A_KEY].to(torch.float8_e4m3fn)
    set_tensors(saved, **{A_KEY: expected})
    weight = dict(load(saved).named_parameters())[f"{SITE}.lora_A.default.weight"]
    assert same_bits(weight, expected.to(torch.float32))


def test_a_folder_that_does_not_exist_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        lorafx.load(base_model(), tmp_path / "nowhere")


def test_a_config_of_the_users_own_must_fit_the_file(saved: Path) -> None:
    base = base_model()
    before = State.of(base)
    with pytest.raises(LorafxError, match=re.escape(str(saved / WEIGHTS))):
        lorafx.load(base, saved, config=SETTINGS | {"r": 7})
    before.check(base)


@pytest.mark.parametrize("name", ["", "a.b", "forward", "a/b", "/a"])
def test_a_name_that_cannot_be_used_changes_nothing(saved: Path, name: str) -> None:
    lora = load(saved, is_trainable=True)
    before = State.of(lora)
    with pytest.raises(LorafxError):
        lora.load_adapter(saved, name)
    before.check(lora)
    assert list(lora.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["weight", "lora_A", "base_layer", "modules_to_save", "bias", "0", "a b"])
def test_a_name_that_looks_like_something_else_works(tmp_path: Path, name: str) -> None:
    lora = adapted()
    lora.add_adapter(name, SETTINGS | {"r": 2})
    lora.save_pretrained(tmp_path)
    again = load(tmp_path)
    again.load_adapter(tmp_path / name, name)
    assert_same_tensors(adapter_tensors(again, name), adapter_tensors(lora, name))
    assert_same_tensors(adapter_tensors(again), adapter_tensors(lora))


def test_the_wrong_model_is_one_error_naming_the_file(saved: Path) -> None:
    base = base_model(hidden_size=32)
    before = State.of(base)
    with pytest.raises(CheckpointError, match=re.escape(str(saved / WEIGHTS))):
        lorafx.load(base, saved)
    before.check(base)


@pytest.mark.parametrize("n", [1, 3])
def test_a_failure_while_tensors_are_hung_in_changes_nothing(
    saved: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    base, calls, real = base_model(), [0], making.attach

    def attach(*args: Any, **how: Any) -> None:
        calls[0] += 1
        if calls[0] == n:
            raise MemoryError("injected")
        real(*args, **how)

    lora = load(saved, is_trainable=True)
    before, lora_before = State.of(base), State.of(lora)
    monkeypatch.setattr(making, "attach", attach)
    for attempt in (lambda: lorafx.load(base, saved), lambda: lora.load_adapter(saved, "second")):
        calls[0] = 0
        with pytest.raises(MemoryError):
            attempt()
    before.check(base)
    lora_before.check(lora)
    assert list(lora.peft_config) == ["default"]

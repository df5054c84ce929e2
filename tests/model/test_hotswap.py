"""Hot swap: values from files into an adapter that runs; ranks, scalings and targets differ, and graphs stay."""

import peft
import pytest
import torch
from graphs import Chain, adapted
from modules import Stack
from safetensors.torch import load_file
from torch import nn

import lorafx
from lorafx.errors import AdapterError, ConfigError

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
COMMON = {"target_modules": ["first", "second"], "init_lora_weights": False}


@pytest.fixture
def folders(tmp_path):
    """A base in float64, and adapters of it in folders: of other ranks, scalings and targets."""
    torch.manual_seed(0)
    base = Chain().double().state_dict()
    configs = {
        "small": {"r": 2, "lora_alpha": 6},
        "large": {"r": 5, "lora_alpha": 1, "use_rslora": True},
        "mixed": {"r": 3, "rank_pattern": {"second": 1}, "alpha_pattern": {"first": 7}},
        "plain": {"r": 4, "lora_alpha": 3},
        "half": {"r": 2, "target_modules": ["second"]},
        "other": {"r": 2, "target_modules": ["first"]},
    }
    for name, config in configs.items():
        model = Chain().double()
        model.load_state_dict(base)
        lorafx.compile(model, {**COMMON, **config}).save_pretrained(tmp_path / name)
    return base, tmp_path


def loaded(folders, name, adapter_name="default", **options):
    base, folder = folders
    model = Chain().double()
    model.load_state_dict(base)
    return lorafx.load(model, folder / name, adapter_name=adapter_name, **options)


def kept(lora):
    """The graphs that serve calls, what compilers made of them, and the parameters with their addresses."""
    programs = list(lora._lorafx.dispatcher)
    pieces = lora._lorafx.dispatcher.graphs.lowering.pieces
    state = {path: (id(p), p.data_ptr()) for path, p in lora.named_parameters()}
    scales = {path: (id(b), b.data_ptr()) for path, b in lora.named_buffers()}
    return [id(p.gm) for p in programs], [p.compiled for p in pieces.values()], state, scales


@pytest.mark.parametrize("options", [{"backend": "aot_eager"}, {"capture": "graph"}, {"capture": "sites"}])
def test_nothing_is_captured_or_compiled_and_no_address_changes(folders, options, monkeypatch):
    lora, x = loaded(folders, "small", **options), torch.randn(4, 4, dtype=torch.float64)
    names = ("large", "mixed", "half", "other", "small")
    expected = {name: loaded(folders, name)(x) for name in names}
    lora.prepare_for_hotswap(target_rank=5)
    torch.testing.assert_close(lora(x), expected["small"], **CLOSE)
    found = kept(lora)
    monkeypatch.setattr("lorafx.serving.graph_builder.trace_part", lambda *a, **k: pytest.fail("captured again"))
    for name in names:
        lora.hotswap_adapter(folders[1] / name, "default")
        torch.testing.assert_close(lora(x), expected[name], **CLOSE)
        assert kept(lora) == found, name


@pytest.mark.slow
def test_peft_computes_the_same(folders):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    model, x = Chain().double(), torch.randn(4, 4, dtype=torch.float64)
    model.load_state_dict(folders[0])
    theirs, ours = peft.PeftModel.from_pretrained(model, folders[1] / "small"), loaded(folders, "small")
    prepare_model_for_compiled_hotswap(theirs, target_rank=5, config=theirs.peft_config)
    lorafx.prepare_model_for_compiled_hotswap(ours, target_rank=5, config=ours.peft_config)
    for name in ("plain", "half"):  # PEFT has a number for a pattern of `alpha_pattern` in vain, and refuses rsLoRA
        hotswap_adapter(theirs, str(folders[1] / name), "default", torch_device="cpu")
        lorafx.hotswap_adapter(ours, folders[1] / name, "default", torch_device="cpu")
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["large", "mixed", "half", "other"])
def test_what_is_saved_is_the_file_that_it_was_swapped_from(folders, name, tmp_path):
    lora = loaded(folders, "small")
    lora.prepare_for_hotswap(target_rank=6)
    lora.hotswap_adapter(folders[1] / name, "default")
    lora.save_pretrained(tmp_path / "again")
    old, new = (load_file(each / name_of) for each, name_of in zip((folders[1] / name, tmp_path / "again"), FILES * 2))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    assert lora.peft_config["default"].r == loaded(folders, name).peft_config["default"].r
    of_state = lorafx.get_peft_model_state_dict(lora)
    assert of_state.keys() == old.keys() and all(torch.equal(old[key], of_state[key]) for key in old)
    doubled = lorafx.get_peft_model_state_dict(lora, {path: 2 * t for path, t in lora.state_dict().items()})
    assert all(torch.equal(2 * old[key], doubled[key]) for key in old)
    lorafx.set_peft_model_state_dict(lora, doubled)
    assert all(torch.equal(2 * old[key], t) for key, t in lorafx.get_peft_model_state_dict(lora).items())
    lora.load_adapter(folders[1] / name, "default")
    assert all(torch.equal(old[key], t) for key, t in lorafx.get_peft_model_state_dict(lora).items())


FILES = ("adapter_model.safetensors",)


def test_room_stays_empty_in_training(folders):
    lora, x = loaded(folders, "small", is_trainable=True), torch.randn(4, 4, dtype=torch.float64)
    bare = loaded(folders, "small", is_trainable=True)
    lora.prepare_for_hotswap(target_rank=4)
    for model in (lora, bare):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert not lora.first.lora_A.default.weight[2:].any() and not lora.second.lora_B.default.weight[:, 2:].any()
    found, expected = lorafx.get_peft_model_state_dict(lora), lorafx.get_peft_model_state_dict(bare)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("trains", ["second", "both", "neither"])
def test_who_trains_stays_as_it_was(folders, trains):
    lora = loaded(folders, "half", is_trainable=trains != "neither")
    lora.load_adapter(folders[1] / "half", "second", is_trainable=trains in ("second", "both"))
    if trains == "second":
        lora.set_requires_grad("default", False)
    before = lora.get_model_status().requires_grad
    lora.prepare_for_hotswap(
        target_rank=5, config=lora.peft_config["default"].replace(target_modules=COMMON["target_modules"])
    )
    assert lora.get_model_status().requires_grad == before
    assert set(before.values()) == {"second": {True, False}, "both": {True}, "neither": {False}}[trains]


def test_what_trained_before_a_block_without_adapters_trains_after_it(folders):
    lora = loaded(folders, "half", is_trainable=True)
    frozen = next(path for path in lora._lorafx.adapters["default"].paths if path.endswith("lora_A.default.weight"))
    lora.get_parameter(frozen).requires_grad_(False)
    with lora.disable_adapter():
        lora.prepare_for_hotswap(
            target_rank=5, config=lora.peft_config["default"].replace(target_modules=COMMON["target_modules"])
        )
        assert lora.get_model_status().requires_grad == {"default": False}
    own = {name: p.requires_grad for name, p in lora.named_parameters() if ".default." in name}
    assert len(own) > 2 and [name for name, trains in own.items() if not trains] == [frozen]


def test_a_slot_is_prepared_for_other_targets_by_their_configs(folders):
    lora, x = loaded(folders, "half"), torch.randn(4, 4, dtype=torch.float64)
    before = lora(x)
    with pytest.raises(AdapterError, match=r"it adapts first, for which the slot has no tensors; call .*config="):
        lora.hotswap_adapter(folders[1] / "small", "default")
    assert torch.equal(lora(x), before)
    lora.prepare_for_hotswap(config={"a": lora.peft_config["default"], "b": lorafx.LoraConfig(**COMMON, r=2)})
    torch.testing.assert_close(lora(x), before, **CLOSE)
    assert set(lorafx.get_peft_model_state_dict(lora)) == {
        "base_model.model.second.lora_A.weight",
        "base_model.model.second.lora_B.weight",
    }
    lora.hotswap_adapter(folders[1] / "small", "default")
    torch.testing.assert_close(lora(x), loaded(folders, "small")(x), **CLOSE)


def test_without_preparation_a_smaller_rank_and_another_scaling_fit(folders):
    lora, x = loaded(folders, "large"), torch.randn(4, 4, dtype=torch.float64)
    lora(x)
    for name in ("small", "half"):
        lora.hotswap_adapter(folders[1] / name, "default")
        torch.testing.assert_close(lora(x), loaded(folders, name)(x), **CLOSE)


def filled(config, seed):
    """An adapter of this config whose tensors are all random; masks and row numbers stay."""
    torch.manual_seed(0)
    model = Chain().double()
    torch.manual_seed(seed)
    lora = lorafx.compile(model, config)
    with torch.no_grad():
        for p in lora.parameters():
            p.copy_(torch.rand_like(p) + 0.1) if p.requires_grad else None
    return lora


BOTH = {"target_modules": ["first", "second"]}
# Of each kind: configs of a small and a large adapter; one that leaves a site out, if it can.
SIZED = {
    "dora": [lorafx.LoraConfig(**BOTH, use_dora=True, r=r, lora_alpha=r + 1) for r in (2, 5)],
    "loha": [lorafx.LoHaConfig(**BOTH, r=r, alpha=r + 1) for r in (2, 5)],
    "hira": [lorafx.HiraConfig(**BOTH, r=r) for r in (2, 5)],
    "hra": [lorafx.HRAConfig(**BOTH, r=r) for r in (2, 5)],
    "hra in one": [lorafx.HRAConfig(**BOTH, r=r, apply_GS=True) for r in (2, 4)],
    "adalora": [lorafx.AdaLoraConfig(**BOTH, init_r=r, target_r=2, total_step=9) for r in (2, 5)],
}


@pytest.mark.parametrize("kind", SIZED)
def test_other_kinds_with_a_rank_have_room_for_others(kind, tmp_path, monkeypatch):
    x = torch.randn(4, 4, dtype=torch.float64)
    small, large = SIZED[kind]
    configs = [small, large] + [large.replace(r=3, target_modules=["second"])] * (kind != "dora")
    expected = []
    for number, config in enumerate(configs):
        lora = filled(config, number)
        expected.append(lora(x))
        lora.save_pretrained(tmp_path / str(number))
    lora = filled(small, 0)
    lora.prepare_for_hotswap(target_rank=5 if kind != "hra in one" else 4)
    lora.graph(x)
    torch.testing.assert_close(lora(x), expected[0], **CLOSE)
    state = kept(lora)
    monkeypatch.setattr("lorafx.serving.graph_builder.trace_part", lambda *a, **k: pytest.fail("captured again"))
    for number in (*range(1, len(configs)), 0):
        lora.hotswap_adapter(tmp_path / str(number), "default")
        torch.testing.assert_close(lora(x), expected[number], **CLOSE)
        assert kept(lora) == state, number
        lora.save_pretrained(tmp_path / "again")
        old, new = (load_file(tmp_path / name / FILES[0]) for name in (str(number), "again"))
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize(
    "config",
    [
        lorafx.C3AConfig(**BOTH, block_size=2, block_size_pattern={"second": 3}),
        lorafx.FourierFTConfig(**BOTH, n_frequency=7),
    ],
    ids=["c3a", "fourierft"],
)
def test_kinds_without_a_rank_take_adapters_of_fewer_and_of_more_sites(config, tmp_path):
    x, half = torch.randn(4, 4, dtype=torch.float64), config.replace(target_modules=["second"])
    expected = []
    for number, each in enumerate((half, config)):
        lora = filled(each, number)
        expected.append(lora(x))
        lora.save_pretrained(tmp_path / str(number))
    lora = filled(half, 0)
    lora.prepare_for_hotswap(config=config)
    for number in (0, 1, 0):
        lora.hotswap_adapter(tmp_path / str(number), "default")
        torch.testing.assert_close(lora(x), expected[number], **CLOSE)


def test_kinds_of_which_nothing_does_nothing_are_refused_by_name(tmp_path):
    dora, half = SIZED["dora"][0], SIZED["dora"][0].replace(target_modules=["second"])
    filled(half, 0).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="does not adapt first, and LORA has no values that do nothing"):
        filled(dora, 0).hotswap_adapter(tmp_path, "default")
    with pytest.raises(AdapterError, match="cannot have first besides: LORA has no values that do nothing there"):
        filled(half, 0).prepare_for_hotswap(config=dora)
    for config, options in (
        (lorafx.VeraConfig(**BOTH, r=3), {}),
        (lorafx.LoKrConfig(**BOTH, r=2), {"target_rank": 4}),
        (lorafx.IA3Config(**BOTH, feedforward_modules=[]), {}),
    ):
        with pytest.raises(AdapterError, match=rf"no adapter here can hold others \({config.peft_type}\)"):
            filled(config, 0).prepare_for_hotswap(**options)


def test_convolutions_in_groups_have_room_in_each_group(tmp_path):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(4, 6, (2, 3), groups=2)

        def forward(self, x):
            return self.conv(x)

    x, expected = torch.randn(2, 4, 5, 5, dtype=torch.float64), {}
    for r in (2, 4):
        config = {"r": r, "target_modules": ["conv"], "init_lora_weights": False}
        lora = lorafx.compile(Grouped().double(), config, random_state=r)
        lora.save_pretrained(tmp_path / str(r))
        expected[r] = lora(x)
    with pytest.raises(ConfigError, match="rank 7 is no multiple"):
        lora.prepare_for_hotswap(target_rank=7, config=lora.peft_config)
    lora.prepare_for_hotswap(target_rank=8)
    for r in (4, 2):
        lora.hotswap_adapter(tmp_path / str(r), "default")
        torch.testing.assert_close(lora(x), expected[r], **CLOSE)
        lora.save_pretrained(tmp_path / "again")
        old, new = (load_file(tmp_path / each / FILES[0]) for each in (str(r), "again"))
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_a_scale_that_was_set_stays_when_preparing_and_goes_with_the_swap(folders):
    lora, x = loaded(folders, "small"), torch.randn(4, 4, dtype=torch.float64)
    lora.set_scale("default", 0.5)
    before = lora(x)
    lora.prepare_for_hotswap(target_rank=3)
    torch.testing.assert_close(lora(x), before, **CLOSE)
    lora.hotswap_adapter(folders[1] / "mixed", "default")
    torch.testing.assert_close(lora(x), loaded(folders, "mixed")(x), **CLOSE)
    lora.set_scale("default", 0.0)
    torch.testing.assert_close(lora(x), lora._lorafx.base(x), **CLOSE)


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (None, {"r": 3}, r"lora_A.weight is \(3, 4\), and there is room for \(2, 4\); call .*target_rank"),
        (None, {"r": 2, "lora_dropout": 0.1}, "they differ in lora_dropout"),
        (None, {"r": 2, "lora_bias": True}, "they differ in lora_bias"),
        (None, {"r": 2, "bias": "all"}, "they differ in bias"),
        (None, {"r": 2, "init_lora_weights": "mica"}, "they differ in init_lora_weights"),  # of which A alone trains
        (None, {"r": 2, "init_lora_weights": "pissa"}, "start values were taken out of the base"),
        (lambda lora: lora.merge_adapter(), {"r": 2}, "is merged; unmerge it before swapping"),
    ],
)
def test_what_does_not_fit_is_one_clear_error_and_changes_nothing(change, config, said, tmp_path):
    adapted(Chain(), **config).save_pretrained(tmp_path)
    lora = adapted(Chain())
    _ = change and change(lora)
    before = {path: tensor.clone() for path, tensor in lora.state_dict().items()}
    with pytest.raises(AdapterError, match=said):
        lora.hotswap_adapter(tmp_path, "default")
    assert all(torch.equal(before[path], tensor) for path, tensor in lora.state_dict().items())
    with pytest.raises(AdapterError, match="no adapter 'nobody'"):
        lora.hotswap_adapter(tmp_path, "nobody")


def test_what_cannot_be_prepared_for_is_refused_and_changes_nothing():
    lora = adapted(Chain(), target_modules=["second"])
    lora.add_adapter("big", {"r": 5, "target_modules": ["first"]})
    before = {path: tensor.clone() for path, tensor in lora.state_dict().items()}
    for error, said, options in (
        (AdapterError, r"'big' has first.lora_A.weight of \(5, 4\), for which target_rank=4", {"target_rank": 4}),
        (AdapterError, "they differ in lora_dropout", {"config": {"target_modules": ["first"], "lora_dropout": 0.1}}),
        (ConfigError, "`target_rank` must be a positive int", {"target_rank": 0}),
        (ConfigError, "`check_compiled` must be", {"check_compiled": "never"}),
        (ConfigError, "no adapter of type VERA", {"config": lorafx.VeraConfig(target_modules=["first"])}),
    ):
        with pytest.raises(error, match=said):
            lora.prepare_for_hotswap(**options)
        assert before.keys() == lora.state_dict().keys() and not list(lora.named_buffers())
        assert all(torch.equal(before[path], tensor) for path, tensor in lora.state_dict().items())


@pytest.mark.slow
def test_what_is_compiled_already_is_remarked_on():
    lora = lorafx.compile(Stack().double(), {"target_modules": "all-linear", "r": 2}, backend="aot_eager")
    lora(torch.randn(5, 4, dtype=torch.float64))
    with pytest.raises(AdapterError, match="compiled already"):
        lora.prepare_for_hotswap(target_rank=4)
    with pytest.warns(UserWarning, match="compiled already"):
        lora.prepare_for_hotswap(target_rank=4, check_compiled="warn")
    lora.prepare_for_hotswap(target_rank=6, check_compiled="ignore")

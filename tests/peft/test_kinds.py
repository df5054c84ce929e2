"""Kinds beside PEFT's, row by row of `kind_cases.py`: what they compute, train, merge, write and start from."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path

import models
import peft
import pytest
import torch
from kind_cases import CASES as FIRST
from kind_cases import CLOSE, Both, KindCase, both, drawn, shake, step, trained
from more_kind_cases import CASES as MORE
from peft.tuners.lora.monteclora import BufferedMontecloraSampler
from safetensors.torch import load_file

import lorafx
from lorafx.adapters import kinds
from lorafx.adapters.default_targets import IA3_FEEDFORWARD, IA3_TARGETS
from lorafx.adapters.storages import weights_of
from lorafx.graph.blocks import blocks_of
from lorafx.serving import early_calls

pytestmark = pytest.mark.slow  # real PEFT beside lorafx
CASES = FIRST | MORE
WEIGHTS = "adapter_model.safetensors"
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def draw_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's MonteCLoRA draws ahead; here it draws in each call, what lorafx draws and in its order."""
    monkeypatch.setattr(BufferedMontecloraSampler, "get", drawn)


@pytest.fixture
def pair(case: KindCase, tmp_path: Path) -> Both:
    return both(case, tmp_path / "theirs")


@every_case
def test_outputs_and_gradients_are_pefts(pair: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_calls, "REPEATS", 1)
    x = pair.case.x()
    with torch.no_grad():
        expected, plain = pair.theirs.eval()(x), pair.base(x)
        torch.testing.assert_close(pair.ours.eval()(x), expected, **pair.case.close)
    assert (expected - plain).abs().max() > 1e-3, "the adapter makes a difference"
    for _ in range(2):  # by sites, then by a graph
        assert_same_step(pair)
    assert pair.ours.explain().calls[-1].served_by == "graph"
    if pair.case.dropout:
        assert not torch.allclose(step(pair.theirs, pair.case.inputs)[0], expected), "something was dropped"


@pytest.mark.usefixtures("early")
@every_case
def test_it_merges_to_what_pefts_merges_to(pair: Both) -> None:
    if not pair.case.merges:
        pytest.skip("it is no change of the base's tensors")
    x, before = pair.case.x(), {name: t.clone() for name, t in pair.ours.state_dict().items()}
    expected = pair.ours.eval()(x)
    pair.ours.merge_adapter()
    torch.testing.assert_close(pair.ours(x), expected, **pair.case.close)
    merged = {name: pair.ours.state_dict()[name] for name in pair.base.state_dict()}
    for name, theirs in pair.theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(
            merged[name], theirs, **pair.case.close, msg=lambda text, name=name: f"{name}: {text}"
        )
    pair.ours.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair.ours.state_dict().items())


@every_case
def test_peft_reads_what_lorafx_writes(pair: Both, tmp_path: Path) -> None:
    pair.ours.save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(folder / WEIGHTS) for folder in (pair.folder, tmp_path / "ours"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert _config(tmp_path / "ours") == _config(pair.folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(pair.base), tmp_path / "ours").eval()
    assert not [str(each.message) for each in caught if "missing" in str(each.message).lower()]
    assert not peft.set_peft_model_state_dict(again, ours).unexpected_keys
    x = pair.case.x()
    assert torch.equal(again(x), pair.theirs.eval()(x))


def _config(folder: Path) -> dict[str, object]:
    """A folder's config; PEFT writes sets as lists of any order."""
    values = json.loads((folder / "adapter_config.json").read_text())
    named = [key for key, value in values.items() if isinstance(value, list) and all(isinstance(v, str) for v in value)]
    return values | {key: sorted(values[key]) for key in named}


@pytest.mark.usefixtures("early")
@every_case
def test_it_starts_as_pefts_does(case: KindCase, tmp_path: Path) -> None:
    x = case.x()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(case.base(), case.theirs())
        for config in (case.ours(), case.theirs()):
            ours = lorafx.get_peft_model(case.base(), config)
            assert {n: p.shape for n, p in trained(ours).items()} == {n: p.shape for n, p in trained(theirs).items()}
            divisors = sum(".ranknum." in name for name, _ in theirs.named_parameters())  # see `trained`
            wanted = [count - divisors for count in theirs.get_nb_trainable_parameters()]
            assert [*ours.get_nb_trainable_parameters()] == wanted
            start = (ours.eval()(x) - case.base()(x)).abs().max()
            assert (start < 1e-12) == case.starts_at_zero
            ours.save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    assert _config(tmp_path) == _config(tmp_path / "theirs")
    assert load_file(tmp_path / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()
    ours, theirs = (_by_role(load_file(folder / WEIGHTS)) for folder in (tmp_path, tmp_path / "theirs"))
    for role, values in ours.items():
        assert (values.count_nonzero() > 0) == (theirs[role].count_nonzero() > 0), role
        if len(values) > 24:  # the spread of so few is off by a fifth or so
            torch.testing.assert_close(values.double().std(), theirs[role].double().std(), rtol=0.6, atol=1e-2)


def _by_role(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All values of a file's tensors that layers have in common, by what follows the layer's number."""
    roles = {key: key.partition(".layers.")[2].partition(".")[2] or key for key in sorted(tensors)}
    named = {role: [tensors[key].flatten() for key in roles if roles[key] == role] for role in roles.values()}
    return {role: torch.cat(values) for role, values in named.items()}


# One row of each kind, with dropout where there is one.
ON_LINEAR = {
    case.config + getattr(case.ours(), "variant", ""): case
    for name, case in CASES.items()
    if name.endswith((" linear", " dropout")) and case.layers == "linear"
}
# One kind that is fused, and those that read the weight, turn, scale, and share a tensor: a graph for each way.
IN_GRAPHS = ["LoraConfig", "LoraConfiguse_dora", "OFTConfig", "IA3Config", "VeraConfig"]
FLAT = lorafx.passes.default.without("outline_blocks", "checkpoint_blocks")


@pytest.mark.parametrize("options", [{"backend": "aot_eager"}, {"pipeline": FLAT}], ids=["compiled", "flat"])
@pytest.mark.parametrize("name", [name for name in ON_LINEAR if ON_LINEAR[name] in FIRST.values()])
def test_a_compiler_and_a_graph_without_blocks_give_it(name: str, tmp_path: Path, options: dict) -> None:
    """Of kinds that have no proof in `tests/proofs`."""
    assert_same_step(both(ON_LINEAR[name], tmp_path, **options))


def assert_same_step(pair: Both) -> None:
    inputs = pair.case.inputs
    (theirs, wanted), (ours, found) = step(pair.theirs, inputs), step(pair.ours, inputs)
    torch.testing.assert_close(ours, theirs, **pair.case.close)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if not pair.case.wrong_gradient or pair.case.wrong_gradient not in name:
            named = {"msg": lambda text, name=name: f"{name}: {text}"}
            torch.testing.assert_close(found[name], gradient, **pair.case.close, **named)


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("name", ON_LINEAR)
def test_it_trains_on_4_bits_as_pefts_on_what_these_stand_for(name: str, tmp_path: Path) -> None:
    """Several kinds of PEFT have no layer for 4 bits, or take the packed bytes for the weight."""
    pytest.importorskip("bitsandbytes")
    from quantised import quantised

    case, inputs = ON_LINEAR[name], models.call("llama", labels=False)
    case = KindCase("linear", case.config, case.fields | case.on_llama | {"target_modules": ["q_proj", "down_proj"]})
    base, dense = quantised(tmp_path / "base", "nf4"), models.llama()
    for path, module in base.named_modules():
        for parameter, _, storage in weights_of(module):
            if storage.whole:
                weight = storage.of(module).dense(storage.stored(module, parameter))
                dense.get_submodule(path).weight.data.copy_(weight)
    plain = copy.deepcopy(dense)
    theirs = peft.get_peft_model(dense, case.theirs())
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lorafx.load(base, tmp_path / "theirs", is_trainable=True)
    expected, wanted = step(theirs, inputs)
    if name == "C3AConfig":  # PEFT's derivative by what a layer is given is wrong, so layers below have other gradients
        _, wanted = step(lorafx.load(plain, tmp_path / "theirs", is_trainable=True), inputs)
    close = {"rtol": 1e-4, "atol": 1e-4}  # sums of 80 products in float32, through two layers
    for _ in range(4 if name in IN_GRAPHS else 1):  # three calls by sites, then a graph
        out, found = step(ours, inputs)
        torch.testing.assert_close(out, expected, **close)
        for key, gradient in wanted.items():
            within = {"rtol": 1e-4, "atol": 2 * out.numel() * torch.finfo(torch.float32).eps}  # the loss adds up `out`
            torch.testing.assert_close(found[key], gradient, **within, msg=lambda text, key=key: f"{key}: {text}")


NAMES = ["IA3", "LoHa", "LoKr", "OFT", "BOFT", "HRA", "Vera", "Shira", "FourierFT", "C3A", "Delora", "RandLora"]


@pytest.mark.parametrize("name", [*NAMES, "Hira", "Miss", "Road", "AdaLora"])
def test_default_targets_are_pefts(name: str) -> None:
    tables = vars(peft.utils.constants)
    theirs = tables[f"TRANSFORMERS_MODELS_TO_{name.upper()}_TARGET_MODULES_MAPPING"]
    ours = {kind.config.__name__: kind.config for each in kinds.KINDS.values() for kind in each}[f"{name}Config"]
    wanted = {key: value if isinstance(value, str) else tuple(value) for key, value in theirs.items()}
    assert ours.default_targets == wanted


def test_default_feedforward_modules_are_pefts() -> None:
    theirs = peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    for model_type, targets in IA3_TARGETS.items():
        named = [name for name in theirs.get(model_type, targets) if name in targets]  # PEFT has none for one of them
        assert list(IA3_FEEDFORWARD[model_type]) == named or model_type not in theirs, model_type


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("name", IN_GRAPHS)
def test_a_llama_gives_it_from_the_first_call_on(name: str, tmp_path: Path) -> None:
    case, inputs = ON_LINEAR[name], models.call("llama", labels=False)
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    case = dataclasses.replace(case, fields=case.fields | case.on_llama | targets)
    pair = both(case, tmp_path, models.llama().double(), gradient_checkpointing=True)
    theirs, wanted = step(pair.theirs, inputs)
    for _ in range(4):  # three calls by sites, then a graph
        ours, found = step(pair.ours, inputs)
        # transformers' norms round to float32
        close = {"rtol": 1e-5, "atol": 1e-6} if case.close == CLOSE else case.close
        torch.testing.assert_close(ours, theirs, **close)
        for name, gradient in wanted.items():
            if not case.wrong_gradient or case.wrong_gradient not in name:
                torch.testing.assert_close(found[name], gradient, **close)
    assert blocks_of(pair.ours.graph(**inputs)), "equal layers share a block"

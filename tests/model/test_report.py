"""What an adapted model says of itself: the report, and the tables that it is made of."""

import html

import torch
from graphs import Chain, adapted

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


def test_numbers_are_set_to_the_right():
    lines = table("t", ("name", "count"), [("a", 5), ("bb", 12345)]).splitlines()
    assert any("12,345 │" in line for line in lines) and any("     5 │" in line for line in lines)


def test_tables_fit_the_terminal(monkeypatch):
    monkeypatch.setattr("lorafx.tables.width_of_terminal", lambda: 40)
    lines = table(
        "t", ("name", "why"), [("model.layers.0.self_attn.q_proj", "one thing and another thing")]
    ).splitlines()
    assert max(map(len, lines)) <= 40 and len(lines) > 6


def test_sites_and_reports_are_shown_in_notebooks_as_they_print():
    lora = adapted(Chain(), target_modules=["second"])
    lora(torch.randn(5, 4))
    for each in (lora.sites, lora.report(), lora.explain()):
        shown = each._repr_html_()
        assert shown == f"<pre>{html.escape(str(each))}</pre>" and "second" in lora.sites._repr_html_()

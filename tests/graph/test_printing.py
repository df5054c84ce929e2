"""Printing: a graph as text, with its blocks, and two graphs side by side."""

import pytest
import torch
from graphs import Chain, adapted
from modules import Layer, Stack

import lorafx
from lorafx.errors import SelectionError
from lorafx.graph.printing import COLUMN, diff, graph_lines


def test_a_graph_is_a_line_a_node_with_shapes_and_options():
    gm = adapted(Chain(), target_modules=["second"]).eval().graph(torch.randn(5, 4))
    lines = [line.replace("s77", "n") for line in graph_lines(gm) if "guards_fn" not in line]
    assert lines == [
        "x = input  # (n, 4)",
        "first_weight = first.weight  # (6, 4)",
        "linear = linear(x, first_weight)  # (n, 6)",
        "relu = relu(linear)  # (n, 6)",
        "second_weight = second.weight  # (3, 6)",
        "second_bias = second.bias  # (3)",
        "second_lora_a_default_weight = second.lora_A.default.weight  # (2, 6)",
        "second_lora_b_default_weight = second.lora_B.default.weight  # (3, 2)",
        "lora_linear = lorafx.lora_linear(relu, second_weight, second_bias, None, second_lora_a_default_weight, "
        "second_lora_b_default_weight, 3.0)  # (n, 3)",
        "return (lora_linear,)",
    ]


def test_blocks_follow_under_a_title_that_names_their_layers():
    gm = adapted(Stack(lambda number: Layer(inner=6 + number // 2)), target_modules=["up"]).graph(torch.randn(5, 4))
    summary, *lines = str(gm).splitlines()
    assert lines == graph_lines(gm)
    assert (
        summary.startswith(f"# {len(gm.graph.nodes)} nodes, block_0 of ")
        and "layers.2 … layers.3 (2 layers)" in summary
    )
    titles = [line for line in lines if line.endswith(":")]
    assert [title.partition(", ")[2] for title in titles] == [
        "run by layers.0, layers.1:",
        "run by layers.2, layers.3:",
    ]
    first = lines[lines.index(titles[0]) + 1 : lines.index(titles[1])]
    assert first and all(line.startswith("    ") for line in first) and any("up.weight" in line for line in first)


def marked(lines: str) -> list[tuple[str, str, str]]:
    """Left, mark and right of each line of a diff."""
    return [
        (line[:COLUMN].rstrip(), line[COLUMN + 1 : COLUMN + 2].strip(), line[COLUMN + 3 :])
        for line in lines.splitlines()
    ]


def test_a_diff_shows_both_sides_and_marks_what_changed():
    model, x = Chain(), torch.randn(5, 4)
    lora = adapted(model, target_modules=["second"]).eval()
    plain, rewritten = lorafx.trace(model, x), lora.graph(x)
    found = [(a.partition("  #")[0], mark, b.partition("  #")[0]) for a, mark, b in marked(diff(plain, rewritten))]
    a, b = (f"second_lora_{m.lower()}_default_weight = second.lora_{m}.default.weight" for m in "AB")
    made = "lora_linear = lorafx.lora_linear(relu, second_weight, second_bias, None, second_lora_a_default_weight"
    assert found[0] == ("…", "", "")
    assert found[-5:-2] == [
        ("second_bias = second.bias", "", "second_bias = second.bias"),
        ("linear_1 = linear(relu, second_weight, second_bias)", "|", a),
        ("return (linear_1,)", "|", b),
    ]
    assert found[-2][:2] == found[-1][:2] == ("", ">")
    assert made.startswith(found[-2][2].removesuffix("…")) and found[-2][2].endswith("…")
    assert found[-1][2] == "return (lora_linear,)"
    back = [(mark, left) for left, mark, _ in marked(diff(rewritten, plain)) if mark == "<"]
    assert [left for _, left in back][-1] == "return (lora_linear,)" and len(back) == 2


def test_graphs_that_differ_in_where_they_read_are_equal():
    model, x = Chain(), torch.randn(5, 4)
    lora = adapted(model)
    assert diff(lora.graph(x), lora.graph(x)) == "the graphs are equal"
    early, late = lorafx.trace(model, x), lorafx.trace(model, x)
    lorafx.Pipeline.parse("canonicalize").run(late)
    assert graph_lines(early) != graph_lines(late) and diff(early, late) == "the graphs are equal"


def test_a_diff_of_one_site_has_its_lines_alone():
    model, x = Stack(), torch.randn(5, 4)
    lora = adapted(model, target_modules=["up", "down"]).eval()
    whole, ours = (diff(lorafx.trace(model, x), lora.graph(x), site=site) for site in (None, "layers.1.up"))
    assert "down" in whole and "down" not in ours
    assert "lora_linear" in ours and "layers.1.up.weight" in ours and "layers.2" not in ours
    assert ours._repr_html_().startswith("<pre>…") and repr(ours) == str(ours)
    with pytest.raises(SelectionError, match=r"'layers\.9\.up'; nearest: layers\.\d\.up"):
        diff(lora.graph(x), lora.graph(x), site="layers.9.up")

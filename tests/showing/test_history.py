"""History: each stage of a graph as plain values."""

import torch
from graphs import Chain, adapted
from modules import Layer, Stack

import lorafx
from lorafx.showing import Line, record
from lorafx.showing.history import AS_CAPTURED, changes, innermost


def history_of(lora, *args):
    lora.graph(*args)
    (program,) = lorafx.of(lora)._lorafx.dispatcher
    return record(program.to_rewrite(lora), lorafx.passes.default, program.context)


def test_there_is_a_stage_a_pass_and_the_last_is_what_is_served():
    lora, x = adapted(Chain(), target_modules=["second"]).eval(), torch.randn(5, 4)
    history = history_of(lora, x)
    assert [stage.name for stage in history.stages] == [AS_CAPTURED, *map(str, lorafx.passes.default)]
    (part,) = history.last.parts
    served = [node.name for node in lora.graph(x).graph.nodes if node.op not in ("get_attr", "output")]
    assert [line.name for line in part.lines] == [*served, "return"]
    assert not any("lora" in line.code for line in history.first.parts[0].lines)


def test_a_line_says_what_is_computed_where_and_by_whom():
    history = history_of(adapted(Chain(), target_modules=["second"], r=2).eval(), torch.randn(5, 4))
    before = next(line for line in history.first.parts[0].lines if line.module == "second")
    after = next(line for line in history.last.parts[0].lines if line.site == "second")
    assert before.code == "linear(relu, second.weight, second.bias)"
    assert (before.made_by, before.site) == ("", "") and before.shape.endswith(", 3)") and before.dtype == "float32"
    assert "graphs.py" in before.source or "linear.py" in before.source
    assert after.code.startswith(
        "lorafx.lora_linear(relu, second.weight, second.bias, None, second.lora_A.default.weight"
    )
    assert (after.made_by, after.adapter, after.inputs) == ("fuse_lora", "default", ("relu",))


def test_a_layer_is_found_in_the_block_that_it_runs():
    lora = adapted(Stack(lambda number: Layer(inner=6 + number // 2)), target_modules=["up"])
    history = history_of(lora, torch.randn(5, 4))
    found = {layer: innermost(history.last.parts, f"layers.{layer}.up") for layer in range(4)}
    assert all(path == "up" for _, path in found.values())
    assert found[0][0] is found[1][0] and found[1][0] is not found[2][0]
    assert all(line.module == "up" or line.site == "up" for line in found[0][0].of_module("up"))
    assert innermost(history.last.parts, "layers.9.up") is None


def test_what_a_pass_has_noted_is_no_change():
    a, b = Line("y", "linear(x, w)"), Line("y", "linear(x, w)", site="first")
    c = Line("y", "linear(z, w)")
    assert changes([a], [b]) == ([], [])
    assert changes([a], [c]) == ([a], [c])

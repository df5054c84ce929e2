"""Text: what `show` tells of a call, a pass, a module."""

import pytest
import torch
from graphs import Chain, adapted
from modules import Stack

import lorafx
from lorafx.errors import CaptureError, SelectionError


@pytest.fixture(scope="module")
def shown():
    lora = adapted(Chain(), target_modules=["second"], r=2).eval()
    lora.graph(torch.randn(5, 4))
    return lora.show


def test_a_site_is_shown_as_captured_then_pass_by_pass_then_as_it_is(shown):
    text = str(shown("second"))
    headings = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert headings[:3] == ["second", "as captured", "insert_adapters"] and headings[-2:] == ["fuse_lora", "now"]
    captured, now = text.split("insert_adapters")[0], text.split("now\n")[1]
    assert "linear_1 = linear(relu, second.weight, second.bias)" in captured and "lora" not in captured
    assert "· the model  relu" in captured  # what gives it its input, dimmed
    assert "fuse_lora  lora_linear = lorafx.lora_linear(relu, second.weight" in now
    fused = text.split("\nfuse_lora\n")[1].split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in fused].count("+") == 1 and fused[0].startswith("  - linear_1 = linear(relu")


def test_a_pass_is_shown_by_what_it_changed(shown):
    text = str(shown("fuse_lora"))
    assert text.startswith("fuse_lora\nthe call:") and "  + lora_linear = lorafx.lora_linear(" in text
    inserted = [line[2:4] for line in str(shown("insert_adapters")).splitlines()[2:]]
    assert inserted.count("- ") == 1 and inserted.count("+ ") == 8  # `return` alone reads another value
    assert str(shown("share_input")) == "share_input changed nothing"
    assert len(str(shown("elide_casts")).split("elide_casts")) == 3  # it stands in the pipeline twice


def test_without_a_name_it_counts_what_each_pass_wrote(shown):
    text = str(shown())
    rows = [line.replace("│", " ").split() for line in text.splitlines()]
    assert ["fuse_lora", "6", "2"] in rows and not any(row[:1] == ["share_input"] for row in rows)


def test_a_layer_is_shown_with_those_that_run_the_same_block():
    lora = adapted(Stack(), target_modules=["up"])
    text = str(lora.show("layers.2.up", torch.randn(5, 4)))
    assert text.startswith("layers.2.up, in block_0, run by layers.0 … layers.3 (4 layers)")
    assert str(lora.show("block_0")).startswith("layers.0, in block_0, run by layers.0")
    with pytest.raises(SelectionError, match=r"'up'; nearest: layers\.0\.up, layers\.1\.up, "):
        lora.show("up")


def test_a_name_that_is_not_there_is_refused_with_the_nearest(shown):
    with pytest.raises(SelectionError, match="no pass, module or site called 'secnd'; nearest: second"):
        shown("secnd")
    with pytest.raises(SelectionError, match="called 'x'; show\\(\\) lists the passes and graphs"):
        shown("x")


def test_on_a_terminal_long_lines_are_folded_below_their_marks(monkeypatch):
    monkeypatch.setattr("lorafx.showing.text.width_of_terminal", lambda: 80)
    lora = adapted(Chain(), target_modules=["second"], r=2).eval()
    fused = str(lora.show("second", torch.randn(5, 4))).split("\nfuse_lora\n")[1].split("\n\n")[0].splitlines()
    folds = [line for line in fused if line.startswith("        ")]
    assert len(folds) >= 2 and max(map(len, fused)) <= 80 and " ".join(map(str.strip, folds)).endswith("3.0)")


def test_without_a_graph_it_asks_for_a_call():
    lora = adapted(Chain(), target_modules=["second"])
    with pytest.raises(CaptureError, match="Give show\\(\\) the arguments of a call"):
        lora.show("second")


def test_a_notebook_shows_it_in_a_box(shown):
    assert shown("second")._repr_html_().startswith("<pre>second\n") and "&gt;" not in repr(shown("second"))


def test_the_model_is_as_it_was(shown):
    lora, x = adapted(Chain(), target_modules=["second"]).eval(), torch.randn(5, 4)
    before, state = lora.graph(x).code, {name: value.clone() for name, value in lora.state_dict().items()}
    lora.show("second")
    assert lora.graph(x).code == before and len(lora.explain().calls) == 1
    assert all(torch.equal(value, state[name]) for name, value in lora.state_dict().items())


def test_of_another_adapter_of_the_same_form_its_own_name_is_shown():
    lora, x = adapted(Chain(), target_modules=["second"]).eval(), torch.randn(5, 4)
    lora.graph(x)
    lora.add_adapter("other", lorafx.LoraConfig(target_modules=["second"], r=lora.peft_config["default"].r))
    lora.set_adapter("other")
    text = str(lora.show("second", x))
    assert "lora_A.other.weight" in text and "lora_A.default.weight" not in text

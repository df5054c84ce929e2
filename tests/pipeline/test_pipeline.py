"""Pipelines: text and back, order, verification after every pass, observers."""

from dataclasses import dataclass

import pytest
import torch
from graphs import INSERT, Chain, adapted, context

import lorafx
from lorafx.errors import PipelineError
from lorafx.passes import Canonicalize, FoldScaling, InsertAdapters, MatchTargets, default
from lorafx.pipeline import Pass, Pipeline

aten = torch.ops.aten


@dataclass(frozen=True)
class WithOptions(Pass):
    """A pass with options of many types, which changes nothing."""

    label: str = "a, b{c}"
    sizes: tuple[int, ...] = (1, 2)
    table: dict | None = None
    rate: float = 0.5

    def rewrite(self, gm, context):
        return 0


def test_a_pipeline_prints_and_parses_to_itself():
    text = (
        "canonicalize, elide_casts, elide_slices, elide_empty, outline_blocks, restore_causal, restore_gqa, "
        "restore_norm, restore_rotary, split_reads, restore_linear, match_targets, insert_adapters, "
        "merge_adapters, freeze_base, elide_packed, elide_casts, elide_dropout, fuse_lora, fuse_own_layers, "
        "fuse_loss, share_input, fuse_dropout, sum_weights, fold_scaling, choose_kernels, checkpoint_blocks"
    )
    assert str(default) == text
    assert Pipeline.parse(text) == default


@pytest.mark.parametrize(
    "options",
    [{}, {"label": "quo\"te' }, x{"}, {"sizes": ()}, {"table": {"a": [1, (2,)], "b": None}}, {"rate": -1e-9}],
)
def test_options_print_and_parse(options):
    pipeline = Pipeline(Canonicalize(), WithOptions(**options), FoldScaling())
    assert Pipeline.parse(str(pipeline)) == pipeline


def test_text_may_be_laid_out():
    assert Pipeline.parse("canonicalize,\n  with_options{\n rate = 2.0, label='x'},\n") == Pipeline(
        Canonicalize(), WithOptions(rate=2.0, label="x")
    )
    assert Pipeline.parse("") == Pipeline()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("canonicalise", r"unknown pass 'canonicalise'; known: .*\bcanonicalize, "),
        ("with_options{colour='red'}", "options: label, sizes, table, rate"),
        ("with_options{rate=open('x')}", "cannot read"),
        ("with_options{3}", "cannot read"),
        ("with_options{rate=1", "cannot read"),
        ("canon icalize", "is no pass"),
    ],
)
def test_text_that_does_not_parse_says_why(text, message):
    with pytest.raises(PipelineError, match=message.replace("{", r"\{")):
        Pipeline.parse(text)


def test_parts_and_sums_are_pipelines():
    assert isinstance(default[:3], Pipeline) and default[0] == Canonicalize()
    assert default[:2] + default[2:] == default
    assert "fold_scaling" not in str(default.without("fuse_lora", "fold_scaling"))
    with pytest.raises(PipelineError, match="nonsense"):
        default.without("nonsense")


def test_passes_are_frozen():
    with pytest.raises(AttributeError):
        WithOptions().rate = 1.0


def test_a_wrong_order_names_both_passes_and_one_that_works():
    with pytest.raises(PipelineError) as caught:
        Pipeline(Canonicalize(), InsertAdapters(), MatchTargets()).check()
    assert "insert_adapters requires `sites`, which match_targets establishes only later" in str(caught.value)
    assert "canonicalize, match_targets, insert_adapters" in str(caught.value)


def test_a_pass_cannot_establish_what_it_requires_itself():
    @dataclass(frozen=True)
    class Circular(Pass):
        requires = frozenset({"roundness"})
        establishes = frozenset({"roundness"})

    with pytest.raises(PipelineError, match="circular requires `roundness`, which circular establishes only later"):
        Pipeline(Circular()).check()


def test_a_pass_that_says_it_did_nothing_is_not_believed():
    @dataclass(frozen=True)
    class Silent(Pass):
        def rewrite(self, gm, context):
            for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
                node.target = torch.ops.aten.tanh.default
            return 0

    model, x = Chain(), torch.randn(5, 4)
    gm = lorafx.trace(model, x)
    Pipeline(Silent()).run(gm)
    assert torch.equal(gm(x), model.second(torch.tanh(model.first(x))))


def test_a_missing_pass_is_named_by_its_fact():
    with pytest.raises(PipelineError, match="insert_adapters requires `sites`, which no pass"):
        Pipeline(Canonicalize(), InsertAdapters()).check()


def test_observers_see_every_gap_between_passes():
    seen = []

    def observer(previous, gm, following):
        seen.append((previous and previous.name, len(gm.graph.nodes), following and following.name))

    lora = lorafx.compile(Chain(), {"target_modules": ["first"]}, observers=[observer], pipeline=INSERT)
    lora(torch.randn(5, 4))
    assert [(a, b) for a, _, b in seen] == [
        (None, "canonicalize"),
        ("canonicalize", "elide_casts"),
        ("elide_casts", "elide_slices"),
        ("elide_slices", "elide_empty"),
        ("elide_empty", "outline_blocks"),
        ("outline_blocks", "restore_causal"),
        ("restore_causal", "restore_gqa"),
        ("restore_gqa", "restore_norm"),
        ("restore_norm", "restore_rotary"),
        ("restore_rotary", "split_reads"),
        ("split_reads", "restore_linear"),
        ("restore_linear", "match_targets"),
        ("match_targets", "insert_adapters"),
        ("insert_adapters", None),
    ]
    assert seen[-1][1] > seen[-2][1]


def test_steps_count_nodes_and_parameters():
    lora = adapted(Chain(), target_modules=["second"])
    gm = lorafx.trace(lora, torch.randn(5, 4))
    steps = {step.name: step for step in default.run(gm, context(lora))}
    assert steps["insert_adapters"].parameters_added == 2 * 6 + 3 * 2
    assert steps["insert_adapters"].nodes_after - steps["insert_adapters"].nodes_before == 9
    assert all(step.milliseconds > 0 for step in steps.values())


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        (lambda gm: None, "`rewrite` of the pass odd returned None"),
        (
            lambda gm: {}["first"],
            r"the pass odd raised KeyError: 'first'\nbefore it: canonicalize, .*, checkpoint_blocks$",
        ),
    ],
)
def test_a_pass_that_does_not_say_how_often_it_rewrote_or_fails_is_named(rewrite, message):
    @dataclass(frozen=True)
    class Odd(Pass):
        def rewrite(self, gm, context):
            return rewrite(gm)

    lora = lorafx.compile(Chain(), {"target_modules": ["second"]}, pipeline=default + (Odd(),))
    with pytest.raises(PipelineError, match=message):
        lora(torch.randn(5, 4))

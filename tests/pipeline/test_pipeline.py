"""Pipelines: text and back, order, verification after every pass, observers."""

from dataclasses import dataclass

import pytest
import torch
from graphs import INSERT, Chain, adapted, context, run

import lorafx
from lorafx.errors import PipelineError, VerifyError
from lorafx.passes import Canonicalize, FoldScaling, InsertAdapters, MatchTargets, default
from lorafx.pipeline import Context, Pass, Pipeline

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
        "merge_adapters, freeze_base, elide_casts, elide_dropout, fuse_lora, fuse_loss, share_input, "
        "fuse_dropout, fold_scaling, choose_kernels, checkpoint_blocks"
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
        ("canonicalise", "unknown pass 'canonicalise'; known: canonicalize"),
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


def test_a_missing_pass_is_named_by_its_fact():
    with pytest.raises(PipelineError, match="insert_adapters requires `sites`, which no pass"):
        Pipeline(Canonicalize(), InsertAdapters()).check()


def test_compile_checks_the_order_first():
    with pytest.raises(PipelineError):
        lorafx.compile(Chain(), {"target_modules": ["first"]}, pipeline="insert_adapters, canonicalize")


def test_the_pipeline_is_the_users():
    x, config = torch.randn(5, 4), {"target_modules": ["first"], "init_lora_weights": False}
    plain = lorafx.compile(Chain(), config, pipeline=default.without("fuse_lora", "fold_scaling"))
    assert plain.graph(x).graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    text = lorafx.compile(Chain(), config, pipeline=str(default))
    assert not text.graph(x).graph.find_nodes(op="call_function", target=aten.mul.Tensor)


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


def breaking(name: str, action) -> Pass:
    """A pass that breaks the graph in one way."""

    @dataclass(frozen=True)
    class Breaking(Pass):
        def rewrite(self, gm, context):
            action(gm)
            return 1

    Breaking.name = name
    return Breaking()


def wrong_value(gm):
    node = gm.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(aten.relu.default, (node,))
    new.meta.update(node.meta, lorafx=lorafx.graph.Provenance("break"))
    new.meta["val"] = node.meta["val"].to(torch.float16)


def no_maker(gm):
    node = gm.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    with gm.graph.inserting_after(node):
        gm.graph.call_function(aten.relu.default, (node,)).meta.update(node.meta)


def missing_attribute(gm):
    gm.graph.find_nodes(op="get_attr")[0].target = "nowhere.weight"


def other_output(gm):
    gm.graph.output_node().args = ((gm.graph.find_nodes(op="get_attr")[0],),)


def renamed_input(gm):
    gm.graph.find_nodes(op="placeholder")[0].target = "renamed"


def use_before_definition(gm):
    relu = gm.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    gm.graph.output_node().prepend(relu)


def thawed(gm):
    gm.get_parameter("first.weight").requires_grad_(True)


def read_for_nothing(gm):
    node = gm.graph.find_nodes(op="get_attr")[0]
    with gm.graph.inserting_before(node):
        new = gm.graph.get_attr("second.lora_A.default.weight")
    new.meta.update(lorafx=lorafx.graph.Provenance("break"), val=gm.get_parameter(new.target))


def inserted_twice(gm):
    for node in gm.graph.nodes:
        if node.meta.get("adapted_by"):
            node.meta["adapted_by"] *= 2


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (wrong_value, "true_values.*claims.*float16"),
        (no_maker, "provenance.*does not say who made it"),
        (missing_attribute, "well_formed.*nowhere.weight, which does not exist"),
        (other_output, "same_interface: outputs were"),
        (renamed_input, "same_interface: inputs were"),
        (use_before_definition, "well_formed"),
        (thawed, "only_adapters_train: first.weight is trainable"),
        (read_for_nothing, "no_orphans: second.lora_A.default.weight"),
        (inserted_twice, "one_adapter_of_a_name"),
    ],
)
def test_the_verifier_names_the_pass_at_fault(action, message):
    lora = adapted(Chain(), target_modules=["second"])
    gm = lorafx.trace(lora, torch.randn(5, 4))
    with pytest.raises(VerifyError, match=message) as caught:
        Pipeline(*default, breaking(action.__name__, action)).run(gm, context(lora))
    assert f"after {action.__name__} (before it: canonicalize" in str(caught.value)


def test_the_graph_that_a_pass_broke_is_shown():
    lora = adapted(Chain(), target_modules=["second"])
    with pytest.raises(VerifyError) as caught:
        run(lora, (*default, breaking("no_maker", no_maker)), torch.randn(5, 4))
    assert "> relu_default = relu(relu)" in str(caught.value)


def test_a_broken_graph_is_refused_before_the_first_pass():
    gm = lorafx.trace(Chain(), torch.randn(5, 4))
    missing_attribute(gm)
    with pytest.raises(VerifyError, match="nowhere"):
        default.run(gm, Context())

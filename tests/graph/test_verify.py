"""The verifier: every way to break a graph is found, after the pass that did it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from graphs import Chain, adapted, context, run

import lorafx
from lorafx.errors import VerifyError
from lorafx.graph import verify as verifier
from lorafx.passes import default
from lorafx.pipeline import Context, Pass, Pipeline

aten = torch.ops.aten


def breaking(name: str, action) -> Pass:
    """A pass that breaks the graph in one way, and says that it has rewritten nothing."""

    @dataclass(frozen=True)
    class Breaking(Pass):
        def rewrite(self, gm, context):
            action(gm)
            return 0

    Breaking.name = name
    return Breaking()


def wrong_value(gm):
    node = gm.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(aten.relu.default, (node,))
    new.meta.update(node.meta, lorafx=lorafx.graph.Provenance("break"))
    new.meta["val"] = node.meta["val"].to(torch.float16)


def wrong_size(gm):
    """A number for a size that is a symbol, and another than the symbol stands for: 5."""
    node = gm.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(aten.relu.default, (node,))
    new.meta.update(node.meta, lorafx=lorafx.graph.Provenance("break"), val=torch.empty(7, 6))


def other_input(gm):
    node = gm.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    node.args = (gm.graph.find_nodes(op="placeholder")[0],)  # 4 features, where there were 6


def input_of_other_dtype(gm):
    node = gm.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(aten.to.dtype, (node.args[0], torch.float64))
    new.meta.update(node.meta, lorafx=lorafx.graph.Provenance("break"), val=node.args[0].meta["val"].double())
    node.args = (new,)


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
        (wrong_size, "true_values.*relu.* gives .* and claims .*'7', '6'"),
        (other_input, r"true_values.*relu.* gives \(.*'4'.* and claims \(.*'6'"),
        (input_of_other_dtype, "true_values.*relu.* gives .*float64.*claims.*float32"),
        (no_maker, "provenance.*does not say who made it"),
        (missing_attribute, "all_there.*nowhere.weight, which does not exist"),
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
    first, *more = str(caught.value).splitlines()
    assert first.startswith(f"after {action.__name__}: ")
    assert any(line.startswith("before it: canonicalize, ") for line in more)


def test_a_value_is_not_computed_again_where_no_input_is_another_kind_of_tensor(monkeypatch):
    lora, computed = adapted(Chain(), target_modules=["second"]), []
    gm = lorafx.trace(lora, torch.randn(5, 4))
    relu = gm.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    before = verifier.snapshot(gm)
    with gm.graph.inserting_before(relu):
        twin = gm.graph.node_copy(relu.args[0])
    relu.args = (twin,)
    monkeypatch.setattr(verifier, "fake_value", lambda node, *rest: computed.append(node) or node.meta["val"])
    assert verifier.true_values(verifier.State(gm, before, (), frozenset(), frozenset())) is None
    assert computed == [twin]
    relu.meta["val"] = relu.meta["val"].clone()  # what a pass claims anew is looked at again
    verifier.true_values(verifier.State(gm, before, (), frozenset(), frozenset()))
    assert computed == [twin, twin, relu]


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

"""inline_blocks: a graph with blocks becomes the flat graph it was made of."""

import pytest
import torch
from graphs import adapted
from modules import KINDS, Stack, cases

import lorafx
from lorafx.graph.blocks import blocks_of
from lorafx.passes import Canonicalize, InlineBlocks, OutlineBlocks
from lorafx.pipeline import Pipeline


@pytest.mark.parametrize("kind", cases(KINDS, quick=["an odd one"]))
def test_inlining_undoes_outlining(kind):
    lora, x = adapted(Stack(KINDS[kind][0]), target_modules=["up", "down"]), torch.randn(5, 4)
    graphs = []
    for passes in ((Canonicalize(),), (Canonicalize(), OutlineBlocks(), InlineBlocks())):
        gm = lorafx.trace(lora, x)
        Pipeline(*passes).run(gm)
        assert not blocks_of(gm)
        graphs.append(gm)
    flat, inlined = graphs
    operators = [[(n.op, str(n.target)) for n in gm.graph.nodes if n.op != "call_module"] for gm in graphs]
    assert sorted(operators[0]) == sorted(operators[1])
    assert torch.equal(flat(x), inlined(x))


@pytest.mark.slow
def test_passes_may_follow_on_the_flat_graph():
    lora, x = adapted(Stack(), target_modules=["up", "down"]), torch.randn(5, 4)
    expected = lora(x)
    names = [each.name for each in lorafx.passes.default]
    here = names.index("outline_blocks") + 1
    pipeline = lorafx.passes.default[:here] + (InlineBlocks(),) + lorafx.passes.default[here:]
    gm = lorafx.trace(lora, x)
    pipeline.run(gm, lora._lorafx.context)
    assert torch.equal(gm(x), expected) and not blocks_of(gm)

"""merge_on_the_fly: adapted linears merge where that takes fewer multiplications, and compute the same either way."""

from __future__ import annotations

import models
import pytest
import torch
from graphs import INSERT, Chain, adapted, context, run, text
from modules import Fork
from torch import nn

import lorafx
from lorafx.passes import ElideCasts, ElideDropout, FuseLora, MergeOnTheFly, ShareInput

FUSED = (*INSERT, ElideCasts(), ElideDropout(), FuseLora())
MERGING = lorafx.passes.default + [MergeOnTheFly()]
one, several = torch.ops.lorafx.lora_linear, torch.ops.lorafx.lora_linears


def marked(gm):
    return [node for node in gm.graph.nodes if node.kwargs.get("merge")]


def test_before_and_after():
    lora, x = adapted(Chain(), target_modules=["second"]), torch.randn(5, 2, 4)
    before, after = (text(run(lora, passes, x)) for passes in (FUSED, (*FUSED, MergeOnTheFly())))
    assert after[:-1] == before[:-1]
    assert after[-1] == before[-1].removesuffix(")") + ", merge=True)"
    assert after[-1].startswith("lora_linear = lorafx.lora_linear(relu, second_weight, second_bias, None, ")


@pytest.mark.slow
def test_sites_that_share_are_marked_once_and_only_once():
    gm = run(adapted(Fork()), (*FUSED, ShareInput(), MergeOnTheFly()), torch.randn(5, 4))
    assert [node.target for node in marked(gm)] == [several.default, one.default]
    lora = adapted(Fork())
    assert MergeOnTheFly().rewrite(gm, context(lora)) == 0
    early = run(lora, (*FUSED, MergeOnTheFly(), ShareInput()), torch.randn(5, 4))
    assert len(marked(early)) == 4  # in the wrong order nothing is shared, but no mark is lost


def test_dropout_sites_are_left():
    lora, x = adapted(Chain(), lora_dropout=0.5), torch.randn(5, 4)
    assert marked(run(lora, (*FUSED, MergeOnTheFly()), x)) == []
    assert len(marked(run(lora.eval(), (*FUSED, MergeOnTheFly()), x))) == 2


class Packed(nn.Parameter):
    """A parameter of a class of its own, as quantised weights are."""


def test_weights_that_are_no_plain_tensors_are_left():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    gm = run(lora, FUSED, x)
    first = lora.get_submodule("first")
    first.weight = Packed(first.weight.detach(), requires_grad=False)
    assert MergeOnTheFly().rewrite(gm, context(lora)) == 1
    assert [node.args[1].target for node in marked(gm)] == ["second.weight"]


def test_a_weight_that_is_computed_is_merged_as_the_value_it_is(merges):
    lora, x = adapted(Chain()), torch.randn(50, 4)
    gm = run(lora, FUSED, x)
    (read,) = [node for node in gm.graph.nodes if node.target == "second.weight"]
    with gm.graph.inserting_after(read):
        doubled = gm.graph.call_function(torch.ops.aten.mul.Tensor, (read, 2.0))
    doubled.meta["val"] = read.meta["val"]
    read.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    gm.recompile()
    expected = gm(x)
    assert MergeOnTheFly().rewrite(gm, context(lora)) == 2
    gm.recompile()
    torch.testing.assert_close(gm(x), expected)
    assert merges == [50, 50]


def test_the_pipeline_as_text():
    assert str(MERGING) == f"{lorafx.passes.default}, merge_on_the_fly"
    assert lorafx.Pipeline.parse(str(MERGING)) == MERGING and "merge_on_the_fly" not in str(lorafx.passes.default)
    lora = lorafx.compile(Chain(), {"r": 2, "target_modules": "all-linear"}, pipeline=str(MERGING))
    assert len(marked(lora.graph(torch.randn(5, 4)))) == 2
    with pytest.raises(lorafx.errors.PipelineError, match="merge_on_the_fly requires `adapters`"):
        lorafx.Pipeline(MergeOnTheFly(), *lorafx.passes.default).check()


def llama(pipeline, dtype=torch.float32, layers=1, **options):
    """The same model in every dtype: its values are all bfloat16 numbers. Updates are as large as its weights."""
    config = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"}
    options |= {"pipeline": pipeline, "autocast_adapter_dtype": False}
    lora = lorafx.compile(models.llama(num_hidden_layers=layers).to(dtype), config, **options).train()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora.parameters():
            values = 0.05 * torch.randn(parameter.shape, generator=rng) if parameter.requires_grad else parameter
            parameter.copy_(values.bfloat16())
    return lora


def step(lora, batch=4, length=40):
    """The loss, and the gradient of each adapter tensor, as float64."""
    lora.zero_grad()
    loss = lora(**models.call(lora, batch=batch, length=length)).loss
    loss.backward()
    gradients = [p.grad.double() for p in lora.parameters() if p.requires_grad]
    assert len(gradients) in (7 * 2, 2 * 7 * 2)
    return [loss.detach().double(), *gradients]


def distance(found, exact):
    """The largest relative distance among losses and gradients."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


@pytest.fixture(scope="module")
def exact():
    return step(llama(lorafx.passes.default, torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "autocast", "checkpointing"),
    [(torch.float32, False, True), (torch.bfloat16, False, False), (torch.bfloat16, True, False)],
    ids=["float32, checkpointing", "bfloat16", "bfloat16, autocast"],
)
def test_a_llama_trains_as_without_the_pass(dtype, autocast, checkpointing, exact, merges):
    """As near to the exact step as the default is, which rounds as often, up to a factor of two."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = distance(step(llama(lorafx.passes.default, dtype)), exact)
        assert merges == [] and 0 < plain < 8 * torch.finfo(dtype).eps
        found = distance(step(llama(MERGING, dtype, gradient_checkpointing=checkpointing)), exact)
    assert len(merges) == 4 * (1 + checkpointing) and set(merges) == {160}
    assert found <= 2 * plain


@pytest.mark.slow
def test_inference_merges_prefill_and_not_single_tokens(merges):
    plain, lora = (llama(pipeline).eval() for pipeline in (lorafx.passes.default, MERGING))
    with torch.no_grad():
        for length, counted in ((40, 4), (1, 0)):
            merges.clear()
            call = models.call(lora, batch=2, length=length, labels=False)
            torch.testing.assert_close(lora(**call).logits, plain(**call).logits)
            assert len(merges) == counted


@pytest.mark.slow
def test_by_sites(merges):
    """A call that is no graph: each site is an operator by itself."""

    class Uncapturable(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Chain()

        def forward(self, x):
            return self.inner(x) if x.sum().item() > 1e9 else self.inner(x).sin()

    x, gradients = torch.randn(50, 4), []
    for pipeline in (lorafx.passes.default, MERGING):
        torch.manual_seed(0)
        config = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
        lora = lorafx.compile(Uncapturable(), config, random_state=0, pipeline=pipeline)
        lora(x).sin().sum().backward()
        assert {call.served_by for call in lora.explain().calls} == {"sites"}
        gradients.append([p.grad for p in lora.parameters() if p.requires_grad])
    assert merges == [50, 50]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_base_weight_that_trains_gets_its_gradient(merges):
    gradients = []
    for passes in ((*FUSED, MergeOnTheFly()), FUSED):
        lora = adapted(Chain().double())
        for parameter in lora.parameters():
            parameter.requires_grad_()
        x = torch.linspace(-1, 1, 200, dtype=torch.float64).view(50, 4)
        gm = run(lora, [each for each in passes if each.name != "freeze_base"], x)
        torch.manual_seed(0)
        gm(x).sin().sum().backward()
        gradients.append({name: p.grad for name, p in lora.named_parameters()})
    assert merges == [50, 50] and None not in gradients[0].values()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_a_compiled_llama_keeps_no_merged_weight_and_compiles_once_more_for_few_rows():
    """Cut into forward and backward as with Inductor: by what has to be kept."""
    plain, lora = llama(lorafx.passes.default, layers=2), llama(MERGING, layers=2, backend="aot_eager_decomp_partition")
    sizes = 160 * torch.finfo(torch.float32).eps  # no sum has more terms
    assert distance(step(lora), step(plain)) <= sizes
    own, kept = {p.untyped_storage().data_ptr() for p in lora.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora(**models.call(lora, batch=4, length=40))
    weights = {tuple(p.shape) for p in lora.parameters() if p.ndim == 2}
    weights |= {shape[::-1] for shape in weights}
    kept = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert kept and not [t.shape for t in kept if tuple(t.shape) in weights]
    once = sum(times for _, times, _ in lora.explain().compiled)
    for batch, length in ((2, 5), (3, 4), (4, 50)):
        assert distance(step(lora, batch, length), step(plain, batch, length)) <= sizes
    assert sum(times for _, times, _ in lora.explain().compiled) <= 2 * once

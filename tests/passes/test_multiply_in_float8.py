"""multiply_in_float8: layers in float8 multiply in float8, alone, adapted, in groups; others stay as they are."""

from __future__ import annotations

import models
import pytest
import torch
from graphs import INSERT, context, run, text
from torch import nn

import lorafx
from lorafx.errors import ConfigError
from lorafx.ops import float8
from lorafx.passes import ElideCasts, ElideDropout, FuseDropout, FuseLora, MultiplyInFloat8, ShareInput
from lorafx.torch_private.tracing import FakeTensorMode

FUSED = (*INSERT, ElideCasts(), ElideDropout(), FuseLora(), ShareInput(), FuseDropout())
IN_FLOAT8 = lorafx.passes.default + [MultiplyInFloat8()]
own = torch.ops.lorafx


class Fork(nn.Module):
    """(…, 16) -> (…, 48): three layers of one input, and one of their outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(16, 48, bias=False), nn.Linear(16, 32)
        self.last = nn.Linear(32, 48)

    def forward(self, x):
        return self.last(torch.relu(self.a(x) * self.c(x))) + self.b(x)


def adapted(targets="all-linear", in_float8=None, pipeline=None, **config):
    torch.manual_seed(0)
    base = lorafx.to_float8(Fork().requires_grad_(False), in_float8)
    chosen = {"r": 2, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False, **config}
    return lorafx.compile(base, chosen, random_state=0, pipeline=pipeline)


def operators(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function" and "getitem" not in node.name]


def test_before_and_after():
    lora, x = adapted(["last"]), torch.randn(5, 2, 16)
    before, after = (text(run(lora, passes, x)) for passes in (FUSED, (*FUSED, MultiplyInFloat8())))
    dense = [line.partition(" = ")[2] for line in before if "lorafx.from_float8" in line]
    assert dense[0] == "lorafx.from_float8(a_weight, a_scale, torch.float32)" and len(dense) == 4
    assert [line.partition(" = ")[2] for line in after if "lorafx.f" in line] == [
        "lorafx.float8_linear(x, a_weight, a_scale, a_bias)",
        "lorafx.float8_linear(x, c_weight, c_scale, c_bias)",
        "lorafx.float8_lora_linears(relu, [last_weight], [last_scale], [last_bias], None,"
        " [last_lora_a_default_weight], [last_lora_b_default_weight], [3.0], 0.0)",
        "lorafx.float8_linear(x, b_weight, b_scale, None)",
    ]


@pytest.mark.slow
def test_layers_of_one_input_are_one_operator():
    gm = run(adapted(), (*FUSED, MultiplyInFloat8()), torch.randn(5, 16))
    found = [node for node in gm.graph.nodes if node.target is own.float8_lora_linears.default]
    assert [len(node.args[1]) for node in found] == [3, 1]
    assert own.from_float8.default not in operators(gm) and own.lora_linears.default not in operators(gm)


@pytest.mark.slow
def test_of_a_group_those_in_float8():
    lora, x = adapted(in_float8=["a", "b"]), torch.randn(5, 16)
    before, gm = run(lora, FUSED, x), run(lora, (*FUSED, MultiplyInFloat8()), x)
    rest, ours = (
        next(node for node in gm.graph.nodes if node.target is target)
        for target in (own.lora_linears.default, own.float8_lora_linears.default)
    )
    assert [node.target for node in rest.args[1]] == ["c.weight"]
    assert [node.target for node in ours.args[1]] == ["a.weight", "b.weight"]
    near(gm(x), before(x))


def near(found, dense):
    """Rounding x to float8 is off by 1/16 at most, and by a fiftieth or so on average."""
    assert 0 < (found - dense).norm() < 0.06 * dense.norm()


@pytest.mark.slow
def test_dropout_is_before_the_adapters_alone():
    lora, x = adapted(lora_dropout=0.5), torch.randn(50, 16)
    gms = [run(lora, passes, x) for passes in (FUSED, (*FUSED, MultiplyInFloat8()))]
    assert operators(gms[1]).count(own.float8_lora_linears.default) == 4
    outputs = []
    for gm in gms:
        torch.manual_seed(1)
        outputs.append(gm(x))
    near(*outputs[::-1])


@pytest.mark.slow
def test_other_dtypes_and_autocast_stay():
    lora = adapted(["last"])
    with torch.autocast("cpu", torch.bfloat16):
        gm = run(lora, (*FUSED, MultiplyInFloat8()), torch.randn(5, 16))
    assert own.from_float8.default in operators(gm)
    assert own.float8_linear.default not in operators(gm)


@pytest.mark.slow
def test_a_second_time_changes_nothing():
    lora = adapted()
    gm = run(lora, (*FUSED, MultiplyInFloat8()), torch.randn(5, 16))
    assert MultiplyInFloat8().rewrite(gm, context(lora)) == 0


def test_a_gpu_without_products_of_float8_is_refused(monkeypatch):
    lora, x = adapted(), torch.randn(5, 16)
    gm = run(lora, FUSED, x)
    monkeypatch.setattr(float8, "capability", lambda device: (8, 0))
    monkeypatch.setattr("lorafx.passes.multiply_in_float8.capability", lambda device: (8, 0))
    for node in gm.graph.find_nodes(op="call_function", target=own.from_float8.default):
        with FakeTensorMode():
            node.meta["val"] = torch.empty(node.meta["val"].shape, device="cuda")
    with pytest.raises(ConfigError, match=r"cuda:0 has compute capability 8\.0, and products of float8 need 8\.9"):
        MultiplyInFloat8().rewrite(gm, context(lora))


def test_the_pipeline_as_text():
    assert str(IN_FLOAT8) == f"{lorafx.passes.default}, multiply_in_float8"
    assert lorafx.Pipeline.parse(str(IN_FLOAT8)) == IN_FLOAT8
    with pytest.raises(lorafx.errors.PipelineError, match="multiply_in_float8 requires `adapters`"):
        lorafx.Pipeline(MultiplyInFloat8(), *lorafx.passes.default).check()


def llama(pipeline, dtype=torch.float32, layers=2, **options):
    base = lorafx.to_float8(models.llama(num_hidden_layers=layers).to(dtype).requires_grad_(False))
    config = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"}
    lora = lorafx.compile(base, config, pipeline=pipeline, autocast_adapter_dtype=False, **options).train()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in lora.parameters() if p.requires_grad):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=rng))
    return lora


def step(lora):
    """The loss, and the gradients of all adapter tensors in one row."""
    loss = lora(**models.call(lora, batch=4, length=17)).loss
    loss.backward()
    gradients = [p.grad.double().flatten() for p in lora.parameters() if p.requires_grad]
    assert len(gradients) == 2 * 7 * lora.config.num_hidden_layers
    return loss.detach().double(), torch.cat(gradients)


@pytest.fixture(scope="module")
def one_layer():
    return step(llama(IN_FLOAT8, layers=1))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "layers"), [(torch.float32, 1), (torch.bfloat16, 2)], ids=str)
def test_a_llama_trains(dtype, layers):
    dense, dense_gradient = step(llama(lorafx.passes.default, dtype, layers))
    loss, gradient = step(llama(IN_FLOAT8, dtype, layers))
    assert 0 < (loss - dense).abs() < 0.01 * dense
    assert torch.cosine_similarity(gradient, dense_gradient, 0) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"capture": "sites"}, {"gradient_checkpointing": True}, {"backend": "aot_eager"}], ids=str
)
def test_a_llama_trains_alike_in_other_ways(options, one_layer):
    """Another order of sums may round a number of x or of a gradient to a neighbour."""
    loss, gradient = one_layer
    other, other_gradient = step(llama(IN_FLOAT8, layers=1, **options))
    torch.testing.assert_close(other, loss, rtol=1e-3, atol=0)
    assert torch.cosine_similarity(gradient, other_gradient, 0) > 0.998


@pytest.mark.slow
def test_a_compiled_llama_keeps_no_copy_of_a_weight():
    """Cut into forward and backward as with Inductor: backward turns the weights over again."""
    lora, kept = llama(IN_FLOAT8, layers=1, backend="aot_eager_decomp_partition"), []
    step(lora)
    weights = {tuple(p.shape) for p in lora.parameters() if p.ndim == 2 and not p.requires_grad}
    for group in ((64, 32, 32), (80, 80)):
        weights.add((sum(group), 48))
    weights |= {shape[::-1] for shape in weights}
    own_memory = {p.untyped_storage().data_ptr() for p in lora.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora(**models.call(lora, batch=4, length=17))
    kept = [t for t in kept if t.untyped_storage().data_ptr() not in own_memory]
    assert kept and not [t.shape for t in kept if tuple(t.shape) in weights]
    assert not [t for t in kept if t.dtype == torch.float8_e4m3fn], "and nothing that was rounded"

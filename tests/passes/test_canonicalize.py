"""canonicalize: dead nodes and metadata assertions go, attributes sink to their use, effects stay."""

import torch
from graphs import Chain, adapted, run, text
from torch import nn

import lorafx
from lorafx.passes import Canonicalize

aten = torch.ops.aten


def test_attributes_sink_to_their_first_use():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    assert text(run(lora, (), x)) == [
        "first_weight = first.weight",
        "second_weight = second.weight",
        "second_bias = second.bias",
        "linear = linear(x, first_weight)",
        "relu = relu(linear)",
        "linear_1 = linear(relu, second_weight, second_bias)",
    ]
    assert text(run(lora, (Canonicalize(),), x)) == [
        "first_weight = first.weight",
        "linear = linear(x, first_weight)",
        "relu = relu(linear)",
        "second_weight = second.weight",
        "second_bias = second.bias",
        "linear_1 = linear(relu, second_weight, second_bias)",
    ]


class Wasteful(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.unused = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 7)

    def forward(self, x):
        self.unused(self.linear(x))
        return self.norm(self.linear(x).to(torch.float64).to(torch.float32))


def test_what_is_not_used_goes_and_what_writes_stays():
    lora = adapted(Wasteful(), target_modules=["linear"])
    gm = run(lora, (Canonicalize(),), torch.randn(5, 4))
    targets = [node.target for node in gm.graph.nodes]
    assert "unused.weight" not in targets
    assert aten._assert_tensor_metadata.default not in targets
    assert targets.count(aten.linear.default) == 1
    assert aten.add_.Tensor in targets, "the norm counts its batches"


def test_statistics_are_kept_where_nothing_uses_the_norm():
    """By an operator that does not say that it writes."""

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("variance", torch.ones(3))

        def forward(self, x):
            x = self.linear(x)
            nn.functional.batch_norm(x, self.mean, self.variance, training=True)
            return x

    model = Watching()
    run(adapted(model), (Canonicalize(),), torch.randn(5, 4))(torch.randn(5, 4))
    assert model.mean.any()


def test_metadata_assertions_were_there_to_remove():
    raw = lorafx.trace(Wasteful(), torch.randn(5, 4))
    assert any(node.target == aten._assert_tensor_metadata.default for node in raw.graph.nodes)


def test_buffers_are_written_where_the_model_keeps_them():
    model = Wasteful()
    lora = adapted(model, target_modules=["linear"])
    lora(torch.randn(5, 4))
    assert model.norm.num_batches_tracked == 1
    assert model.norm.running_mean.abs().sum() > 0


def test_a_canonical_graph_does_not_change():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    gm = run(lora, (Canonicalize(),), x)
    before = text(gm)
    assert Canonicalize().rewrite(gm, lora._lorafx.context) == 0
    assert text(gm) == before

"""Lowering: the rewritten graph through torch.compile computes what it computes eagerly."""

import pytest
import torch
from graphs import Chain, adapted
from losses import Own, both, shifted, times_asked
from torch import nn
from torch.utils import _pytree as pytree

import lorafx
from lorafx import ops
from lorafx.errors import ConfigError
from lorafx.graph.blocks import blocks_of
from lorafx.lowering import pieces
from lorafx.lowering.backend import Backend
from lorafx.lowering.inductor import OurPasses
from lorafx.ops.deferral import Deferred
from lorafx.torch_private.inductor import POST_PASS

eps = torch.finfo(torch.float32).eps


def gradients(lora, call) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    lora.zero_grad()
    loss = call()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in lora.named_parameters() if p.requires_grad}


class Mixed(nn.Module):
    """A site of each way that scaling folds: addmm for products, add(alpha=) for a convolution."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 4), nn.Linear(4, 6)
        self.conv, self.head = nn.Conv1d(6, 5, 3, padding=1), nn.Linear(5, 3)

    def forward(self, ids):
        hidden = torch.tanh(self.linear(self.embedding(ids)))
        return self.head(torch.tanh(self.conv(hidden.transpose(1, 2))).mean(-1))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_equals_eager(backend):
    """float32; a gradient sums over at most 16 x 8 places."""
    tokens = torch.randint(0, 11, (16, 8))
    lora = adapted(Mixed(), target_modules=["embedding", "linear", "conv", "head"])
    loss, expected = gradients(lora, lambda: lora(tokens).square().sum())
    lora._lorafx.dispatcher.backend = Backend(backend)
    lora._lorafx.dispatcher.clear()
    compiled_loss, found = gradients(lora, lambda: lora(tokens).square().sum())
    assert abs(loss - compiled_loss) <= 128 * eps * abs(loss)
    for name, gradient in expected.items():
        assert (gradient - found[name]).abs().max() <= 128 * eps * gradient.abs().max(), name
    assert lora(torch.randint(0, 11, (5, 9))).shape == (5, 3)


def test_a_backend_that_is_none_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"backend='inductr' is none of auto, eager, .*inductor"):
        lorafx.compile(Chain(), {"target_modules": ["first"]}, backend="inductr")


def test_auto_is_eager_without_cuda():
    lora = adapted(Chain())
    lora(torch.randn(5, 4))
    assert not lora._lorafx.dispatcher.graphs.lowering.pieces


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(x)))


class Deep(nn.Module):
    """A head that is more than a few operators, on as many layers as wanted."""

    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return torch.log_softmax(torch.tanh(self.head(x.square().mean(1))) / 2, -1).square()


def deep(depth=5, backend="aot_eager", **options):
    torch.manual_seed(0)
    config = {"r": 2, "target_modules": ["up", "down"], "init_lora_weights": False}
    return lorafx.compile(Deep(depth), config, random_state=0, backend=backend, **options)


def times(lora):
    return {title: times for title, times, _ in lora.explain().compiled}


@pytest.mark.slow
def test_an_eager_graph_calls_our_operators_as_functions():
    """In the outer graph and in blocks; the graph that people look at keeps the operators."""
    lora = deep(backend="eager")
    x = torch.randn(5, 2, 4)
    output = lora(x)
    program = next(iter(lora._lorafx.dispatcher))
    graphs = {run: [run, *blocks_of(run)] for run in (program.gm, program.lowered.graph)}
    targets = {run: {n.target for gm in parts for n in gm.graph.nodes} for run, parts in graphs.items()}
    operator = torch.ops.lorafx.lora_linear.default
    assert operator in targets[program.gm] and ops.lora_linear not in targets[program.gm]
    assert ops.lora_linear in targets[program.lowered.graph] and operator not in targets[program.lowered.graph]
    assert torch.equal(pytree.tree_leaves(program.gm(x))[0], output)


@pytest.mark.slow
def test_layers_share_a_compilation_and_keep_it():
    """Sizes, adapters of the same shapes and the values of weights compile nothing again.

    The block is compiled twice: the first layer's input needs no gradient, what the others are given does.
    """
    torch.manual_seed(0)
    lora, plain = deep(), adapted(Deep(5))
    plain = lorafx.compile(Deep(5), lora.peft_config["default"])
    plain.load_state_dict(lora.state_dict())
    for x in (torch.randn(6, 7, 4), torch.randn(3, 9, 4)):
        loss, expected = gradients(plain, lambda x=x: plain(x).sum())
        compiled_loss, found = gradients(lora, lambda x=x: lora(x).sum())
        assert abs(loss - compiled_loss) <= 256 * eps * abs(loss)
        for name, gradient in expected.items():
            assert (gradient - found[name]).abs().max() <= 256 * eps * gradient.abs().max(), name
    pieces = times(lora)
    assert list(pieces.values()) == [2, 1] and any("5 layers, layers.0 first" in title for title in pieces)

    first = lora(x)
    lora.add_adapter("other", {"r": 2, "target_modules": ["up", "down"], "init_lora_weights": False})
    lora.set_adapter("other")
    assert not torch.allclose(lora(x), first)
    lora.set_adapter("default")
    assert torch.equal(lora(x), first)
    assert times(lora) == pieces
    lora.delete_adapter("other")
    with torch.no_grad():
        lora.layers[3].up.weight.add_(1)
        plain.layers[3].up.weight.add_(1)
    torch.testing.assert_close(lora(x), plain(x))
    assert times(lora) == pieces


@pytest.mark.slow
def test_what_a_graph_defers_is_in_no_piece():
    """A compiler would compute it."""
    lora, _ = both(Own(shifted), ["inner", "head"], backend="aot_eager")
    ids = torch.randint(0, 13, (3, 8))
    loss, logits = lora(ids, ids)
    loss.backward()
    assert isinstance(logits, Deferred) and times_asked(lora) == "fused" and times(lora)


@pytest.mark.slow
def test_without_blocks_the_whole_graph_is_compiled():
    lora = deep(2, pipeline=lorafx.passes.default.without("outline_blocks", "checkpoint_blocks"))
    lora(torch.randn(6, 7, 4)).sum().backward()
    assert times(lora) == {"whole graph": 1}


@pytest.mark.slow
def test_a_budget_keeps_less():
    kept = []
    for budget in (1.0, None, 0.0):
        lora, numbers = deep(2, activation_budget=budget), []
        pack = torch.autograd.graph.saved_tensors_hooks(lambda t, n=numbers: (n.append(t.numel()), t)[1], lambda t: t)
        with pack:
            lora(torch.randn(16, 7, 4))
        kept.append(sum(numbers))
    assert kept[2] < kept[1] < kept[0]


@pytest.mark.slow
def test_modes_are_inductors(monkeypatch):
    asked = []
    monkeypatch.setattr(
        pieces, "lookup_backend", lambda name: lambda gm, inputs, **options: asked.append(options) or gm
    )
    lora = deep(backend="inductor", mode="reduce-overhead")
    lora(torch.randn(2, 5, 4))
    for options in asked:
        ((name, own),) = options["config_patches"].items()  # CUDA graphs are lorafx's own
        assert name == POST_PASS and isinstance(own, OurPasses)
    assert asked
    with pytest.raises(ConfigError, match=r"'fast' is none of .*max-autotune"):
        deep(backend="auto", mode="fast")
    with pytest.raises(ConfigError, match="aot_eager"):
        deep(backend="aot_eager", mode="max-autotune")


@pytest.mark.slow
def test_what_is_tuned_computes_the_same():
    x = torch.randn(2, 5, 4)
    expected = deep(1)(x)
    found = deep(1, backend="inductor", mode="max-autotune-no-cudagraphs")(x)
    assert (found - expected).abs().max() <= 64 * eps * expected.abs().max()


@pytest.mark.slow
def test_why_a_piece_was_compiled_again_is_explained():
    lora = deep(backend="aot_eager")
    lora(torch.randn(2, 5, 4))
    with torch.no_grad():
        lora(torch.randn(2, 5, 4))
    pieces = {title: (times, why) for title, times, why in lora.explain().compiled if title.startswith("5 layers")}
    ((times, why),) = pieces.values()
    assert times == 1 + len(why.splitlines()) > 1 and "grad" in why and why.splitlines()[0] in str(lora.explain())


@pytest.mark.slow
def test_recurrent_layers_are_in_no_piece():
    """A compiler would have the operators of each step. float32; a gradient sums over at most 16 x 8 places."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.layer, self.head = nn.Linear(5, 8), nn.LSTM(8, 6, num_layers=2), nn.Linear(6, 3)

        def forward(self, x):
            x = torch.tanh(torch.sigmoid(self.up(x)).square())
            return torch.tanh(torch.sigmoid(self.head(self.layer(x)[0])).square())

    x = torch.randn(8, 16, 5)
    lora = adapted(Recurrent(), target_modules=["up", "head"])
    loss, expected = gradients(lora, lambda: lora(x).square().sum())
    lora._lorafx.dispatcher.backend = Backend("aot_eager")
    lora._lorafx.dispatcher.clear()
    compiled_loss, found = gradients(lora, lambda: lora(x).square().sum())
    assert abs(loss - compiled_loss) <= 128 * eps * abs(loss)
    for name, gradient in expected.items():
        assert (gradient - found[name]).abs().max() <= 128 * eps * gradient.abs().max(), name
    pieces = lora._lorafx.dispatcher.graphs.lowering.pieces.values()
    code = lora.graph(x).code
    assert "aten.lstm.input" in code and [piece.compiled for piece in pieces] == [1, 1]

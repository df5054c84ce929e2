"""Early calls: a kind of call is served by the model's own Python until it has come often enough for a graph."""

import copy
import random
import re
import warnings
from pathlib import Path

import models
import pytest
import torch
import transformers
from graphs import Chain
from serving_models import Options, served
from torch import nn
from torch.nn.functional import linear

import lorafx
from lorafx.graph.blocks import checkpoint_block, offload_block
from lorafx.serving import early_calls

RANDOM = {"target_modules": "all-linear", "init_lora_weights": False, "r": 2}
pytestmark = pytest.mark.usefixtures("early")


def compiled(model, config=RANDOM, **options):
    return lorafx.compile(model, config, random_state=0, **options)


def captures(lora):
    return len(lora._lorafx.dispatcher.graphs.captures)


def test_the_default_number_of_repeats_outlasts_a_short_answer():
    """What `generate` does for 32 tokens is no reason to capture. Here it is another number, so we read the source."""
    (default,) = re.findall(r"^REPEATS = (\d+)$", Path(early_calls.__file__).read_text(), re.MULTILINE)
    assert 32 < int(default) < 200


def test_a_kind_of_call_that_repeats_is_given_a_graph():
    lora, x = compiled(Chain()), torch.randn(5, 4)
    found = [lora(x) for _ in range(3)]
    (call,) = lora.explain().calls
    assert (call.served_by, call.early, captures(lora)) == ("sites", 3, 0) and "when such calls" in call.reason
    found.append(lora(x))
    (call,) = lora.explain().calls
    assert (call.served_by, call.early, captures(lora)) == ("graph", 3, 1)
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-5, atol=1e-6)
    with lora.disable_adapter():
        assert not torch.allclose(lora(x), found[0])


def test_kinds_are_counted_apart():
    lora = compiled(Chain())
    for _ in range(2):
        lora(torch.randn(5, 4))
        lora.eval()(torch.randn(5, 4))
        with torch.no_grad():
            lora.train()(torch.randn(5, 4))
    assert served(lora) == ["sites"] * 3 and captures(lora) == 0


def test_layers_that_only_a_graph_checkpoints_have_one_from_the_first_call():
    lora = compiled(Chain(), gradient_checkpointing=True)
    lora(torch.randn(5, 4))
    assert served(lora) == ["graph"] and not lorafx.passes.CheckpointBlocks(every=True).exact


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is to go to the host does so in graphs alone")
@pytest.mark.parametrize("how", [True, "offload"])
@pytest.mark.filterwarnings("ignore:checkpoints stay where they are")
def test_layers_that_checkpoint_themselves_do_so_before_there_is_a_graph(how):
    lora, plain = (compiled(models.llama(), gradient_checkpointing=each) for each in (how, False))
    runs: list[str] = []
    hooks = [
        layer.mlp.act_fn.register_forward_hook(lambda *_, name=f"layer {number}": runs.append(name))
        for number, layer in enumerate(lora.model.layers)
    ]
    for calls in range(1, 4):
        losses = [model(**models.call(model)).loss for model in (lora, plain)]
        losses[0].backward()
        torch.testing.assert_close(*losses)
        assert runs == ["layer 0", "layer 1", "layer 1", "layer 0"] * calls and served(lora) == ["sites"]
    for hook in hooks:
        hook.remove()
    graph = lora.graph(**models.call(lora)).graph
    checkpointed = {True: checkpoint_block, "offload": offload_block}[how]
    assert len(graph.find_nodes(op="call_function", target=checkpointed)) == 2


def test_a_call_for_which_there_is_no_memory_gets_a_graph_that_needs_less(monkeypatch):
    def failing(*_):
        raise torch.OutOfMemoryError("none left")

    lora, x = compiled(Chain()), torch.randn(5, 4)
    monkeypatch.setattr("lorafx.serving.direct.evaluated", failing)
    lora(x)
    assert served(lora) == ["graph"]


def test_explain_says_what_was_served_early():
    lora, x = compiled(Chain()), torch.randn(5, 4)
    lora(x)
    assert "a graph is made when such calls have come more often" in str(lora.explain())
    assert "2 calls" in str(lora.explain()) and lora.explain().calls[0].loss == "the model's own"
    for _ in range(3):
        lora(x)
    (call,) = lora.explain().calls
    assert "more often" not in str(lora.explain()) and "graph in" not in str(lora.explain())
    assert (call.early, call.waits_for, call.loss) == (3, 0, "none to fuse")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_losses_do_not_depend_on_when_the_graph_takes_over(dropout, monkeypatch):
    losses = []
    for repeats in (0, 2, 100):
        monkeypatch.setattr(early_calls, "REPEATS", repeats)
        torch.manual_seed(0)
        lora, x = compiled(Chain(), RANDOM | {"lora_dropout": dropout}), torch.ones(50, 4)
        optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], 0.05)
        losses.append([])
        for _ in range(5):
            loss = lora(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0][0] > 1.01 * losses[0][-1], "it learns"


class ByHand(nn.Module):
    """Reads a weight in a way that a graph alone understands, after it has drawn a number and filled its argument."""

    def __init__(self, read):
        super().__init__()
        self.first, self.second, self.read = nn.Linear(4, 6), nn.Linear(6, 3), read

    def forward(self, x, seen):
        hidden = self.first(x) * torch.rand(())
        seen.append(hidden.detach())
        return self.read(torch.relu(hidden), self.second.weight)


# What reads the weight gives the weight itself.
READS = {"all of it": lambda x, weight: linear(x, weight[:]), "turned": lambda x, weight: x @ weight[:].T}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_no_equation_can_be_run_in_is_a_graph_at_once_as_though_nothing_had_run(read):
    found = []
    for how in ("auto", "graph"):
        torch.manual_seed(3)
        lora, seen = compiled(ByHand(read), capture=how), []
        found.append((lora(torch.ones(5, 4), seen), seen))
        assert served(lora) == ["graph"] and len(seen) == 1
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_a_model_with_modules_that_read_several_weights_at_once_does_not_wait():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    lora = compiled(Attending(), RANDOM | {"target_modules": ["attention"]})
    lora(torch.randn(5, 1, 8))
    assert served(lora) == ["graph"]


def test_a_counter_that_changes_each_time_is_free_after_some_calls():
    lora, x = compiled(Options()), torch.randn(5, 4)
    for shift in range(2, 8):
        expected = lora._lorafx.base
        y = lora(x, shift=shift)["y"]
        assert (y - shift).abs().max() < 100 and expected is not None
    assert captures(lora) == 1 and [call.served_by for call in lora.explain().calls] == ["graph"]


def test_a_constant_that_never_repeats_is_not_captured():
    lora, x = compiled(Options()), torch.randn(5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(7):
            lora(x, scale=random.random())
    assert captures(lora) == 0 and set(served(lora)) == {"sites"}


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 4)) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x):
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_stay_what_they_were_until_backward(reentrant):
    lora, found = compiled(Checkpointed(reentrant)), []
    for _ in range(6):
        lora.zero_grad()
        lora(torch.ones(5, 4, requires_grad=True)).square().sum().backward()
        found.append([p.grad.clone() for p in lora.parameters() if p.grad is not None])
    assert len(found[0]) == 8
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-5, atol=1e-6)


def test_a_part_that_is_called_alone_gets_a_graph_of_its_own():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Chain(), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.inner(x))

    lora, x = compiled(Outer()), torch.randn(5, 4)
    lora(x)
    for _ in range(4):
        lora.inner(x)
    assert served(lora) == ["sites", "graph"]


def test_generate_gives_the_same_tokens_before_and_after_the_graph():
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    lora = compiled(transformers.LlamaForCausalLM(config).eval())
    ids = torch.randint(0, 50, (1, 6))
    first, again = (lora.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0) for _ in range(2))
    plain = copy.deepcopy(lora).merge_and_unload()
    assert torch.equal(first, again)
    assert torch.equal(first, plain.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert "graph" in served(lora)


class Counting(nn.Module):
    """Its weight is read in a way that needs a graph, after buffers and an argument have been written to."""

    def __init__(self):
        super().__init__()
        self.rows, self.norm = nn.Embedding(9, 6), nn.BatchNorm1d(6)
        self.register_buffer("step", torch.zeros(()))

    def forward(self, ids, seen):
        self.step.add_(1)
        seen.index_add_(0, ids, torch.ones(len(ids)))
        return self.norm(self.rows(ids)) @ self.rows.weight.T * self.step * seen.sum()


def test_what_a_call_has_written_is_put_back_before_a_graph_serves_it(early):
    results = []
    for capture in ("auto", "graph"):
        torch.manual_seed(0)
        config = {"r": 2, "target_modules": ["rows"], "init_lora_weights": False}
        lora = lorafx.compile(Counting(), config, capture=capture, random_state=0)
        seen = torch.zeros(9)
        y = lora(torch.arange(5), seen)
        results.append((y.detach(), seen, lora.step, lora.norm.num_batches_tracked, lora.norm.running_mean))
    torch.testing.assert_close(*results, rtol=0, atol=0)


class Listed(nn.Module):
    """Layers in a dict, which the model itself goes through."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(4, 6), nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)})

    def forward(self, x):
        return sum(head(self.body(x)) for head in self.heads.values())


def test_copies_of_layers_are_not_taken_for_layers(early):
    config = {"r": 2, "target_modules": ["body"], "modules_to_save": ["heads"], "init_lora_weights": False}
    lora, x = lorafx.compile(Listed(), config, random_state=0), torch.randn(5, 4)
    with torch.no_grad():
        lora.heads.modules_to_save.default.a.bias.add_(1)
    graph = lorafx.compile(Listed(), config, capture="graph")
    graph.load_state_dict(lora.state_dict())
    torch.testing.assert_close(lora(x), graph(x), rtol=1e-6, atol=1e-6)
    assert captures(lora) == 0 and lora.explain().calls[0].early == 1

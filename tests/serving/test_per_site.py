"""By sites: where a call cannot be one graph, the model's own Python runs and every site is a graph."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from graphs import Chain
from modules import EveryForm, cases
from torch import nn

import lorafx
from lorafx.errors import CaptureError, ConfigError, UncoveredOperatorError

EVERY = ["embedding", "conv1d", "conv2d", "conv3d", "addmm", "linear"]
RANDOM = {"target_modules": "all-linear", "init_lora_weights": False, "r": 2}


def both_ways(model, config=RANDOM):
    """The same adapter served by one graph, and by sites."""
    return [lorafx.compile(copy.deepcopy(model), config, capture=how, random_state=0) for how in ("graph", "sites")]


def gradients(lora):
    return {name: p.grad for name, p in lora.named_parameters() if p.grad is not None}


def served(lora):
    return [call.served_by for call in lora.explain().calls]


@pytest.mark.slow
@pytest.mark.parametrize(
    "replaced",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"bias": "all"}, marks=pytest.mark.slow),
        {"modules_to_save": ["linear"], "bias": "lora_only"},
    ],
)
def test_both_ways_give_the_same(replaced):
    """To the bit where an operator is one that a graph has too; else a pass has regrouped the graph's sums."""
    targets = [name for name in EVERY if name not in replaced.get("modules_to_save", ())]
    graph, sites = both_ways(EveryForm(), RANDOM | {"target_modules": targets} | replaced)
    ids = torch.randint(0, 11, (2, 8))
    outputs = graph(ids), sites(ids)
    torch.testing.assert_close(*outputs)
    assert served(sites) == ["sites"]
    for output in outputs:
        output.square().sum().backward()
    assert gradients(graph).keys() == gradients(sites).keys() != set()
    torch.testing.assert_close(gradients(graph), gradients(sites))


class Odd(nn.Module):
    """What no graph of the whole would do again each time; `how` says which."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.how, self.calls = nn.Linear(4, 6), nn.Linear(6, 3), how, 0

    def forward(self, x):
        h = torch.relu(self.first(x))
        match self.how:
            case "prints":
                print("seen", tuple(x.shape))
            case "branches":
                h = -h if h.sum() > 1e9 else h
            case "numpy":
                h = h * torch.from_numpy(np.ones(h.detach().numpy().shape, dtype=np.float32))
            case "draws":
                h = h[:, np.random.permutation(6)] * random.random()
            case "counts":
                self.calls += 1
        return self.second(h)


@pytest.mark.parametrize("how", cases(["prints", "branches", "numpy", "draws", "counts"], quick=["prints", "counts"]))
def test_what_is_no_graph_runs_by_sites_and_says_why_once(how, capsys):
    lora, x = lorafx.compile(Odd(how), RANDOM, random_state=0), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="test_per_site.py|random numbers|it changes calls"):
        lora(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, again = lora(x), lora(torch.cat([x, x]))[:5]
    assert set(served(lora)) == {"sites"}
    if how == "draws":
        assert not torch.equal(first, again), "the numbers were frozen"
    else:
        torch.testing.assert_close(first, again)
        with lora.disable_adapter():
            assert not torch.allclose(lora(x), first)
    assert capsys.readouterr().out.count("seen") == (4 if how == "prints" else 0)
    assert lora.calls == (4 if how == "counts" else 0)


@pytest.mark.parametrize("how", ["prints", "branches", "numpy", "draws", "counts"])
def test_a_graph_that_is_asked_for_is_an_error_with_the_models_line(how):
    lora = lorafx.compile(Odd(how), RANDOM, capture="graph")
    state = random.getstate()
    with pytest.raises(CaptureError, match="Odd could not be captured") as caught:
        lora(torch.randn(5, 4))
    if how in ("prints", "branches", "numpy"):
        assert __file__ in str(caught.value)
    assert random.getstate() == state


def test_an_unknown_way_is_refused():
    with pytest.raises(ConfigError, match="auto, graph, sites"):
        lorafx.compile(Chain(), RANDOM, capture="eager")


@pytest.mark.slow
def test_a_tied_weight_is_adapted_wherever_it_is_read():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids)) + nn.functional.linear(self.embed(ids), self.embed.weight)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph, sites = both_ways(Tied(), RANDOM | {"target_modules": ["embed"]})
    ids = torch.randint(0, 9, (2, 5))
    assert torch.equal(graph(ids), sites(ids))


@pytest.mark.slow
def test_a_copy_of_a_tied_module_replaces_only_that_module():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.middle, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.middle(self.embed(ids)))

    graph, sites = both_ways(Tied(), RANDOM | {"target_modules": ["middle"], "modules_to_save": ["head"]})
    for lora in (graph, sites):
        with torch.no_grad():
            lora.head.modules_to_save.default.weight.mul_(2)
    ids = torch.randint(0, 9, (2, 5))
    assert torch.equal(graph(ids), sites(ids))


class Scored(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.score = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x):
        return self.score(self.body(x))


@pytest.mark.slow
def test_a_saved_module_of_several_layers_trains_as_a_whole():
    graph, sites = both_ways(Scored(), RANDOM | {"target_modules": ["body"], "modules_to_save": ["score"]})
    x = torch.randn(5, 4)
    for lora in (graph, sites):
        for _ in range(2):
            lora.zero_grad()
            lora(x).square().sum().backward()
    assert len(gradients(sites)) == 2 + 4 and gradients(graph).keys() == gradients(sites).keys()
    assert all(torch.equal(gradient, gradients(sites)[name]) for name, gradient in gradients(graph).items())


class ByHand(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.mark.slow
def test_a_layer_that_spells_its_product_out_is_a_graph_of_its_own():
    graph, sites = both_ways(nn.Sequential(ByHand(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    x = torch.randn(5, 4)
    assert torch.equal(graph(x), sites(x)) and torch.equal(graph(x), sites(x))
    assert not torch.allclose(sites(x), sites._lorafx.base(x))


@pytest.mark.slow
def test_an_uncovered_read_is_the_same_error():
    class Squared(Chain):
        def forward(self, x):
            return super().forward(x) @ self.second.weight

    lora = lorafx.compile(Squared(), RANDOM, capture="sites")
    with pytest.raises(UncoveredOperatorError, match=r"second: its weight is read by aten.matmul"):
        lora(torch.randn(5, 4))


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointed_layers_run_again_with_their_adapters(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 4)) for _ in range(2))
            self.again = False

        def forward(self, x):
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant) if self.again else layer(x)
            return x

    lora = lorafx.compile(Checkpointed(), RANDOM, capture="sites", random_state=0)
    found = []
    for again in (False, True):
        lora.again = again
        lora.zero_grad()
        lora(torch.ones(5, 4, requires_grad=True)).square().sum().backward()
        found.append({name: gradient.clone() for name, gradient in gradients(lora).items()})
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.slow
def test_merged_disabled_and_autocast_calls_go_by_sites_too():
    graph, sites = both_ways(Chain())
    x = torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        rounding = float(
            2**-7 * graph(x).abs().max()
        )  # of the base's result and of the update, by one of bfloat16 each
        torch.testing.assert_close(graph(x), sites(x), rtol=0, atol=rounding)
        assert sites(x).dtype == torch.bfloat16
    for lora in (graph, sites):
        lora.merge_adapter()
    assert torch.equal(graph(x), sites(x))
    with graph.disable_adapter(), sites.disable_adapter():
        assert torch.equal(graph(x), sites(x)) and torch.equal(sites(x), sites._lorafx.base(x))


@pytest.mark.slow
def test_dropout_and_two_adapters_are_the_same_both_ways():
    graph, sites = both_ways(Chain(), RANDOM | {"lora_dropout": 0.5})
    for lora in (graph, sites):
        lora.add_adapter("other", RANDOM | {"r": 3}, random_state=1)
        lora.set_adapter(["default", "other"])
    x, outputs = torch.randn(50, 4), []
    for lora in (graph, sites):
        torch.manual_seed(0)
        outputs.append(lora.train()(x))
    assert torch.equal(*outputs) and not torch.equal(outputs[1], sites.eval()(x))


class Yielding(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = yield self.first(x)
        try:
            yield self.second(hidden)
        except ValueError:
            yield -self.second(hidden)
        return "done"


def steps(model, x):
    """What a forward gives in each of its steps: taken, sent back to it, and after an error."""
    generator = model(x)
    first = next(generator)
    second, third = generator.send(first), generator.throw(ValueError())
    with pytest.raises(StopIteration, match="done"):
        next(generator)
    return first, second, third


def test_a_forward_that_yields_has_its_adapters_in_each_step():
    lora, x = lorafx.compile(Yielding(), RANDOM), torch.randn(2, 4)
    found = steps(lora, x)
    found[2].sum().backward()
    assert len(gradients(lora)) == 4
    torch.testing.assert_close(found, steps(lora.merge_and_unload(), x))

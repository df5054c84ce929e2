"""Direct: operators that read an adapted weight are computed in the adapters' equations, where they are called."""

import contextlib
import copy
import sys

import pytest
import torch
from graphs import Chain
from modules import EveryForm
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

import lorafx

RANDOM = {"target_modules": "all-linear", "init_lora_weights": False, "r": 2}
EVERY = ["embedding", "conv1d", "conv2d", "conv3d", "addmm", "linear"]


def pair(model, config=RANDOM):
    """The same adapter, by sites and in one graph; the former has no way but the equations."""
    sites, graph = (
        lorafx.compile(copy.deepcopy(model), config, capture=how, random_state=0) for how in ("sites", "graph")
    )
    return sites, graph


def captured(lora):
    return lora.explain().operators


def gradients(lora):
    return {name: p.grad for name, p in lora.named_parameters() if p.grad is not None}


def test_every_form_of_read_is_computed_without_a_graph():
    sites, graph = pair(EveryForm(), RANDOM | {"target_modules": EVERY, "bias": "all"})
    ids = torch.randint(0, 11, (2, 8))
    outputs = sites(ids), graph(ids)
    for output in outputs:
        output.square().sum().backward()
    assert captured(sites) == 0
    torch.testing.assert_close(*outputs)
    assert gradients(sites).keys() == gradients(graph).keys() != set()
    torch.testing.assert_close(gradients(sites), gradients(graph))


@pytest.mark.parametrize("layer", [nn.Linear(5, 7), Conv1D(7, 5)], ids=("linear", "conv1d"))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_linear_layer_gives_the_bits_of_the_graph(layer, dropout):
    sites, graph = pair(nn.Sequential(layer), RANDOM | {"target_modules": ["0"], "lora_dropout": dropout})
    outputs = []
    for lora in (sites, graph):
        torch.manual_seed(1)
        outputs.append(lora.train()(torch.ones(2, 9, 5)))
        outputs[-1].square().sum().backward()
    assert captured(sites) == 0 and torch.equal(*outputs)
    assert all(torch.equal(gradient, gradients(sites)[name]) for name, gradient in gradients(graph).items())


class Watched(nn.Module):
    """Counts how often its layer's own Python runs a product, by a mode around it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, mode):
        with mode:
            return self.second(self.first(x))


class Counting(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.linears = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.linears += func is F.linear
        return func(*args, **(kwargs or {}))


def test_a_module_that_only_reads_its_weight_is_not_run():
    """Its equation takes its place: no function of it is looked at, unless a mode of somebody's own is to see it."""
    lora, x = lorafx.compile(Chain(), RANDOM, capture="sites"), torch.randn(5, 4)
    seen = []
    lora.first.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with monitored(nn.Linear) as ran:
        expected = lora(x)
    assert not ran and seen == [(5, 6)]
    lora.set_scale("default", 0.5)
    assert not torch.allclose(lora(x), expected)
    mode, watched = Counting(), lorafx.compile(Watched(), RANDOM, capture="sites", random_state=0)
    expected = watched(x, contextlib.nullcontext())
    assert torch.equal(watched(x, mode), expected) and mode.linears == 2


@contextlib.contextmanager
def monitored(module):
    """The frames of a module class's forward that run meanwhile."""
    ran = []

    def profile(frame, event, arg):
        if event == "call" and frame.f_code is module.forward.__code__:
            ran.append(frame.f_locals["self"])

    sys.setprofile(profile)
    try:
        yield ran
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("how", ["of the class", "of the module"])
def test_a_forward_that_somebody_has_replaced_is_run(how, monkeypatch):
    model, x = Chain(), torch.randn(5, 4)
    if how == "of the module":
        model.first.forward = lambda x: F.linear(x, model.first.weight, model.first.bias) + 1
    lora = lorafx.compile(model, RANDOM | {"target_modules": ["first"]}, capture="sites", random_state=0)
    before = lora(x)
    if how == "of the class":
        forward = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) + 1)
    with torch.no_grad():
        lora.first.lora_B.default.weight.zero_()
        expected = model.second(torch.relu(F.linear(x, model.first.weight, model.first.bias) + 1))
    torch.testing.assert_close(lora(x), expected)
    assert not torch.allclose(before, expected)


def test_a_function_that_somebody_has_put_in_place_of_torchs_is_called(monkeypatch):
    model, x, plain = Chain(), torch.randn(5, 4), F.linear
    lora = lorafx.compile(model, RANDOM | {"target_modules": ["first"]}, capture="sites")
    before = lora(x)
    monkeypatch.setattr(F, "linear", lambda *args: plain(*args) + 1)
    with torch.no_grad():
        lora.first.lora_B.default.weight.zero_()
        hidden = plain(x, model.first.weight, model.first.bias) + 1
        expected = plain(torch.relu(hidden), model.second.weight, model.second.bias) + 1
    torch.testing.assert_close(lora(x), expected)
    assert not torch.allclose(before, expected)


def test_whether_a_module_trains_is_asked_in_each_call():
    sites, graph = pair(nn.Sequential(nn.Linear(5, 7)), RANDOM | {"target_modules": ["0"], "lora_dropout": 0.5})
    x, found = torch.ones(9, 5), []
    for lora in (sites, graph):
        torch.manual_seed(1)
        found.append((lora.train()(x), lora.eval()(x), lora.train()(x)))
    assert all(map(torch.equal, *found)) and not torch.equal(found[0][0], found[0][1])
    assert len(sites._lorafx.dispatcher.by_sites.tables._kept) == 1, "one table serves both"


def test_a_scale_that_changes_is_read_in_each_call():
    sites, graph = pair(Chain())
    x = torch.randn(5, 4)
    for scale in (0.5, 3.0):
        for lora in (sites, graph):
            lora.set_scale("default", scale)
        torch.testing.assert_close(sites(x), graph(x))
    assert captured(sites) == 0


@pytest.mark.parametrize("names", [["default", "other"], ["other", "default"]])
def test_adapters_wrap_each_other_in_their_order(names):
    sites, graph = pair(Chain())
    for lora in (sites, graph):
        lora.add_adapter("other", RANDOM | {"r": 3, "target_modules": ["second"]}, random_state=1)
        lora.set_adapter(names)
    x = torch.randn(5, 4)
    torch.testing.assert_close(sites(x), graph(x))
    assert captured(sites) == 0


def test_merged_adapters_are_not_added_again():
    sites, _ = pair(Chain())
    x = torch.randn(5, 4)
    before = sites(x)
    sites.merge_adapter()
    torch.testing.assert_close(sites(x), before)
    assert captured(sites) == 0


@pytest.mark.parametrize("adapter_dtype", ["float32", None])
def test_updates_are_computed_in_the_dtype_that_is_asked_for(adapter_dtype):
    sites, graph = (
        lorafx.compile(Chain().bfloat16(), RANDOM, capture=how, random_state=0, adapter_compute_dtype=adapter_dtype)
        for how in ("sites", "graph")
    )
    graph.load_state_dict(sites.state_dict())
    x = torch.randn(5, 4, dtype=torch.bfloat16)
    torch.testing.assert_close(sites(x), graph(x))
    assert captured(sites) == 0 and sites(x).dtype == torch.bfloat16


class Normed(nn.Module):
    """Has biases and modules that an adapter has copies of, away from its sites, and buffers that change."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.first(x)))


def test_copies_of_base_tensors_are_read_wherever_the_model_reads_these():
    config = RANDOM | {"target_modules": ["first"], "modules_to_save": ["norm", "head"], "bias": "all"}
    sites, graph = pair(Normed().train(), config)
    x = torch.randn(8, 4)
    for lora in (sites, graph):
        for parameter in (lora.head.modules_to_save.default.weight, lora.norm.modules_to_save.default.bias):
            parameter.data.add_(1.0)
    outputs = sites(x), graph(x)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(gradients(sites), gradients(graph), rtol=1e-4, atol=1e-5)
    means = [lora.norm.modules_to_save.default.running_mean for lora in (sites, graph)]
    torch.testing.assert_close(*means)
    assert captured(sites) == 0 and means[0].abs().max() > 0 and not sites.norm.running_mean.any()


def test_an_error_in_an_equation_names_the_weight_and_its_input():
    lora = lorafx.compile(nn.Sequential(nn.Linear(6, 10)), {"r": 2, "target_modules": ["0"]}, capture="sites")
    with pytest.raises(RuntimeError) as raised:
        lora(torch.randn(3, 5))
    assert raised.value.__notes__ == ["where 0.weight, (10, 6), is read with a tensor (3, 5)"]


def test_a_convolution_with_padding_in_words_is_another_operator():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 5, 3, padding="same")

        def forward(self, x):
            return self.conv(x)

    sites, graph = pair(Padded(), RANDOM | {"target_modules": ["conv"]})
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(sites(x), graph(x))
    assert captured(sites) == 0


class Functional(nn.Module):
    """Reads its weights by functions, in forms of a call that `how` names."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.conv1d, self.table, self.how = nn.Linear(4, 6), Conv1D(6, 4), nn.Embedding(9, 4), how

    def forward(self, x):
        ids = torch.arange(5).repeat(2, 1)
        match self.how:
            case "keywords":
                return F.linear(input=x, bias=self.linear.bias, weight=self.linear.weight)
            case "another's bias":
                return F.linear(x, self.linear.weight, torch.ones(6))
            case "padding":
                return F.embedding(ids, self.table.weight, padding_idx=-7)
            case "addmm":
                return torch.addmm(self.conv1d.bias, x[0], self.conv1d.weight, alpha=2)
            case "tied":
                return F.linear(F.embedding(ids, self.table.weight), self.table.weight)


@pytest.mark.parametrize("how", ["keywords", "another's bias", "padding", "tied"])
def test_calls_may_take_any_form(how):
    sites, graph = pair(Functional(how), RANDOM | {"target_modules": ["linear", "conv1d", "table"]})
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(sites(x), graph(x))
    assert captured(sites) == 0


def test_two_adapters_that_know_a_tied_weight_by_two_names_both_act():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    sites, graph = pair(Tied(), RANDOM | {"target_modules": ["table"]})
    ids, found = torch.randint(0, 11, (2, 5)), []
    for lora in (sites, graph):
        lora.add_adapter("second", RANDOM | {"target_modules": ["head"]}, random_state=1)
        lora.set_adapter(["default", "second"])
        y = lora(ids)
        y.square().sum().backward()
        found.append([y, lora.table(ids), *gradients(lora).values()])
    assert len(found[0]) == 6
    torch.testing.assert_close(*found)


READS = {
    "as what is multiplied": lambda w, x: F.linear(w, x[0, :4].contiguous()),
    "as what is added to": lambda w, x: torch.addmm(w, torch.ones(6, 2), torch.ones(2, 4)),
    "into another tensor": lambda w, x: F.linear(x, torch.zeros(6, 4).copy_(w)),
    "added to another in place": lambda w, x: F.linear(x, torch.zeros(6, 4).add_(w)),
    "into a part of another": lambda w, x: (other := torch.zeros(6, 4), other.__setitem__(slice(None), w))[0],
    "as Python's numbers": lambda w, x: torch.tensor(w.tolist()),
    "as one of Python's numbers": lambda w, x: x * float(w.sum()),
    "as an answer": lambda w, x: x if w.equal(torch.zeros(6, 4)) else -x,
}


@pytest.mark.parametrize("how", READS)
def test_a_weight_is_not_read_in_silence_where_no_adapter_can_act(how, monkeypatch):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.other = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x):
            return self.other(x).sum() + READS[how](self.linear.weight, x).sum()

    monkeypatch.setattr("lorafx.serving.early_calls.REPEATS", 10)
    for capture in ("auto", "sites"):
        lora = lorafx.compile(Reading(), RANDOM, capture=capture)
        with pytest.raises(lorafx.errors.UncoveredOperatorError, match="weight"):
            lora(torch.randn(2, 5, 4))


def test_copies_of_biases_are_read_by_methods_of_other_tensors():
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x):
            return F.linear(x, self.linear.weight).add_(self.linear.bias)

    sites, graph = pair(Adding(), RANDOM | {"bias": "lora_only"})
    for lora in (sites, graph):
        with torch.no_grad():
            next(p for name, p in lora.named_parameters() if "bias" in name and p.requires_grad).fill_(2.0)
    x = torch.randn(5, 4)
    torch.testing.assert_close(sites(x), graph(x))


def test_a_form_that_is_another_operator_is_captured_and_refused():
    sites, _ = pair(Functional("addmm"), RANDOM | {"target_modules": ["conv1d"]})
    with pytest.raises(lorafx.errors.UncoveredOperatorError, match=r"conv1d: its weight is read by aten\.addmm"):
        sites(torch.randn(2, 5, 4))

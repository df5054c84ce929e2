"""trace: one call as a graph of ATen operators that reads the live model."""

import gc
from types import SimpleNamespace

import pytest
import torch
from graphs import Chain, adapted
from modules import ids, tiny_llama
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import lorafx
from lorafx.errors import CaptureError


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=1)
    tokens = ids(2, 7)
    return model, lorafx.trace(model, input_ids=tokens, labels=tokens)


@pytest.mark.slow
def test_the_loss_is_bit_equal_at_other_sizes(llama):
    model, gm = llama
    for batch, length in ((2, 7), (3, 12), (5, 4)):
        tokens, labels = ids(batch, length), ids(batch, length)
        expected = model(input_ids=tokens, labels=labels)
        found = gm(input_ids=tokens, labels=labels)
        assert type(found) is type(expected)
        assert torch.equal(found.loss, expected.loss)


def test_one_tensor_passed_twice_is_two_inputs(llama):
    _, gm = llama
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == ["input_ids", "labels"]


def test_names_and_identity_of_parameters_are_kept(llama):
    model, gm = llama
    reads = {node.target for node in gm.graph.find_nodes(op="get_attr")}
    assert "model.layers.0.self_attn.q_proj.weight" in reads
    assert dict(gm.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(gm.get_parameter(name) is parameter for name, parameter in model.named_parameters())


def test_operators_are_training_aten(llama):
    _, gm = llama
    calls = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.linear.default in calls, "a linear layer stays one operator"
    dropout = lorafx.trace(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), torch.randn(2, 4))
    assert any(n.target is torch.ops.aten.dropout.default and n.args[1:] == (0.5, True) for n in dropout.graph.nodes)


def test_gradients_reach_the_models_own_parameters(llama):
    model, gm = llama
    tokens = ids(2, 5)
    gm(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()


def test_the_graph_sees_what_happens_to_the_model():
    model, x = Chain(), torch.randn(5, 4)
    gm = lorafx.trace(model, x)
    model.first.weight = nn.Parameter(torch.zeros(6, 4))
    assert torch.equal(gm(x), model(x))


@pytest.mark.slow
def test_trace_leaves_the_model_alone():
    model, x = tiny_llama(num_hidden_layers=1), ids(2, 7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    lorafx.trace(model, input_ids=x)
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "forward" not in vars(model)


@pytest.mark.slow
def test_meta_models_are_captured():
    with torch.device("meta"):
        model = tiny_llama(num_hidden_layers=1)
    tokens = torch.zeros(2, 7, dtype=torch.long, device="meta")
    lora = lorafx.compile(model, {"target_modules": ["q_proj"]}, example_inputs={"input_ids": tokens})
    graph = lora.graph(input_ids=tokens)
    assert "self_attn.q_proj.lora_A.default.weight" in str(graph)
    assert lora.model.layers[0].self_attn.q_proj.lora_A.default.weight.is_meta


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


def test_a_call_that_cannot_be_captured_says_why():
    with pytest.raises(CaptureError, match=r"DataDependent could not be captured: \w+"):
        lorafx.trace(DataDependent(), torch.randn(5, 4))


class Restless(nn.Module):
    """Its forward runs the second layer only for short inputs, a decision export makes once."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x)) if x.shape[0] < 8 else self.first(x)


def test_a_size_that_the_graph_does_not_fit_gets_a_graph_of_its_own():
    model = Restless()
    lora = adapted(model, target_modules=["first", "second"], r=1)
    short, long = torch.randn(5, 4), torch.randn(9, 4)
    lora.merge_adapter()
    for x in (short, long, short, long):
        torch.testing.assert_close(lora(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(lora.report().graphs) == 2


def test_sizes_of_one_are_told_apart():
    lora = adapted(Chain())
    for batch in (5, 1, 7, 1):
        assert lora(torch.randn(batch, 4)).shape == (batch, 3)
    assert len(lora.report().graphs) == 2


@pytest.mark.slow
def test_modes_dtypes_and_autocast_are_told_apart():
    lora, x = adapted(nn.Sequential(Chain(), nn.Dropout(0.5))), torch.randn(50, 4)
    assert (lora.train()(x) == 0).any() and not (lora.eval()(x) == 0).any()
    with torch.autocast("cpu", torch.bfloat16):
        assert lora(x).dtype == torch.bfloat16
    assert lora(x).dtype == torch.float32
    assert lora.double()(x.double()).dtype == torch.float64
    with torch.no_grad():
        assert not lora(x.double()).requires_grad


@pytest.mark.slow
def test_a_setting_of_the_models_config_is_told_apart():
    lora = lorafx.compile(tiny_llama(num_hidden_layers=1), {"target_modules": ["q_proj"]}).eval()
    with torch.no_grad():
        assert lora(input_ids=ids(2, 5)).past_key_values is not None
        lora.config.use_cache = False
        assert lora(input_ids=ids(2, 5)).past_key_values is None


@pytest.mark.slow
def test_captures_leave_nothing_behind():
    def sizes_known():
        gc.collect()
        return sum(type(each) is ShapeEnv for each in gc.get_objects())

    numbers = []
    for capture in ("auto", "sites", "auto", "sites", "sites"):
        lora = lorafx.compile(Chain(), {"r": 2, "target_modules": "all-linear"}, capture=capture)
        lora(torch.randn(5, 4))
        del lora
        numbers.append(sizes_known())
    assert numbers[-1] <= numbers[1], "of every graph, torch has something that knows its symbolic sizes"


class Noting(nn.Module):
    """Notes something in its config: the first time, or each time."""

    def __init__(self, each):
        super().__init__()
        self.up, self.each, self.config = nn.Linear(4, 6), each, SimpleNamespace(kind=None, calls=0)

    def forward(self, x):
        self.config.kind = self.config.kind or "found"
        self.config.calls += self.each
        return self.up(x)


def test_what_a_model_notes_in_its_config_for_good_is_no_obstacle():
    model, x = Noting(each=0), torch.randn(3, 4)
    assert torch.equal(lorafx.trace(model, x)(x), model(x)) and model.config.kind == "found"
    model = Noting(each=1)
    with pytest.raises(CaptureError, match="it changes config"):
        lorafx.trace(model, x)
    assert model.config == SimpleNamespace(kind=None, calls=0), "nothing is left of two tries"


def test_hidden_states_are_captured_before_the_model_has_ever_given_any():
    model, tokens = tiny_llama(num_hidden_layers=2), ids(2, 5)
    graph = lorafx.trace(model, input_ids=tokens, output_hidden_states=True)
    found = graph(input_ids=tokens, output_hidden_states=True).hidden_states
    expected = model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class Rounds(nn.Module):
    """A layer with numbered layers within."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x):
        for step in self.steps:
            x = x + torch.tanh(step(x))
        return x


def test_layers_within_a_shared_layer_are_named_from_the_root():
    """torch.export names them from the layer on, and whoever looked for `steps.0` at the root found none."""
    torch.manual_seed(0)
    shared, x = Rounds(), torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
    expected = model(x)
    torch.testing.assert_close(adapted(model, init_lora_weights=True).graph(x)(x), expected)
    stacks = [node.meta.get("nn_module_stack", {}) for node in lorafx.trace(model, x).graph.nodes]
    paths = {path.partition("@")[0] for stack in stacks for path, _ in stack.values()}
    assert paths <= {name for name, _ in model.named_modules(remove_duplicate=False)} and "1.steps.0" in paths


class Recurrent(nn.Module):
    """(batch, length, 5) -> (batch, length, 3)"""

    def __init__(self, layer, **how):
        super().__init__()
        self.up, self.layer = nn.Linear(5, 8), layer(8, 6, batch_first=True, **how)
        self.head = nn.Linear(self.layer(torch.zeros(1, 1, 8))[0].shape[-1], 3)

    def forward(self, x):
        return self.head(self.layer(self.up(x))[0])


@pytest.mark.parametrize(
    "layer, how",
    [(nn.LSTM, {"num_layers": 2, "bidirectional": True}), (nn.LSTM, {"proj_size": 4}), (nn.GRU, {}), (nn.RNN, {})],
)
def test_recurrent_layers_are_captured_and_read_the_weights_that_they_have(layer, how):
    """float64; results are below 10, and at most 8 numbers are summed up."""
    model, x = Recurrent(layer, **how).double(), torch.randn(4, 7, 5, dtype=torch.float64)
    plain, weights = list(vars(model.layer)["_flat_weights"]), dict(model.layer.named_parameters())
    gm = lorafx.trace(model, x)
    assert all(a is b for a, b in zip(plain, vars(model.layer)["_flat_weights"], strict=True))
    assert all(p is weights[name] for name, p in model.layer.named_parameters())
    longer = torch.randn(3, 7, 5, dtype=torch.float64)
    for given in (x, longer):
        torch.testing.assert_close(gm(given), model(given), rtol=0, atol=1e-12)
    with torch.no_grad():
        model.layer.weight_ih_l0.mul_(2)
    model.layer.weight_hh_l0 = nn.Parameter(torch.randn_like(model.layer.weight_hh_l0))
    torch.testing.assert_close(gm(x), model(x), rtol=0, atol=1e-12)
    config, found = {"r": 2, "target_modules": ["up", "head"], "init_lora_weights": False}, {}
    for capture in ("graph", "sites"):
        lora = lorafx.compile(model, config, capture=capture, random_state=0)
        lora(x).square().sum().backward()
        assert lora.explain().calls[0].served_by == capture
        found[capture] = [parameter.grad for parameter in lora.parameters() if parameter.requires_grad]
    torch.testing.assert_close(found["graph"], found["sites"], rtol=1e-12, atol=1e-12)

"""The scale of an adapter: a number until it changes, then a tensor that every graph reads."""

import warnings

import pytest
import torch
from graphs import Chain, adapted
from modules import Stack
from torch import nn

import lorafx
from lorafx.adapters.kinds import Kind
from lorafx.errors import AdapterError, ConfigError

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def scaled_outputs(lora, x):
    """What a `Chain` whose second layer is adapted with α / r = 3 gives, without and with the update alone."""
    hidden = torch.relu(lora.first(x))
    update = 3 * (hidden @ lora.second.lora_A.default.weight.T) @ lora.second.lora_B.default.weight.T
    return hidden @ lora.second.weight.T + lora.second.bias, update


@pytest.mark.parametrize("capture", ["graph", "sites"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_it_multiplies_the_update(capture, dropout):
    lora, x = (
        adapted(Chain().double(), target_modules=["second"], lora_dropout=dropout).eval(),
        torch.randn(5, 4).double(),
    )
    lora._lorafx.dispatcher.capture = capture
    lora._lorafx.dispatcher.clear()
    base, update = scaled_outputs(lora, x)
    for scale in (1.0, 0.5, -2.0, 0.0):
        lora.set_scale("default", scale)
        torch.testing.assert_close(lora(x), base + scale * update, **CLOSE)


@pytest.mark.slow
def test_a_schedule_captures_rewrites_and_compiles_nothing():
    lora = lorafx.compile(Stack().double(), {"target_modules": "all-linear", "r": 2}, backend="aot_eager")
    x = torch.randn(5, 4, dtype=torch.float64)
    lora.set_scale("default", 1.0)
    lora(x)
    graphs = lora._lorafx.dispatcher.graphs
    before = [program.gm for program in lora._lorafx.dispatcher], [p.compiled for p in graphs.lowering.pieces.values()]
    assert before[1] and all(before[1])
    outputs = []
    for step in range(3):
        lora.set_scale("default", step / 3)
        outputs.append(lora(x))
    now = [program.gm for program in lora._lorafx.dispatcher], [p.compiled for p in graphs.lowering.pieces.values()]
    assert now == before


def test_the_first_change_rewrites_what_was_captured_already(monkeypatch):
    lora, x = adapted(Chain()), torch.randn(5, 4)
    lora(x)
    monkeypatch.setattr("lorafx.serving.graph_builder.trace_part", lambda *a, **k: pytest.fail("captured again"))
    lora.set_scale("default", 0.5)
    lora(x)


def test_gradients_are_those_of_the_scaled_update():
    lora, x = adapted(Chain().double(), target_modules=["second"]), torch.randn(5, 4, dtype=torch.float64)
    lora.set_scale("default", 0.25)
    base, update = scaled_outputs(lora, x)
    tensors = lora.second.lora_A.default.weight, lora.second.lora_B.default.weight
    expected = torch.autograd.grad((base + 0.25 * update).square().sum(), tensors)
    for found, wanted in zip(torch.autograd.grad(lora(x).square().sum(), tensors), expected):
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_merging_takes_the_scale_along_and_unmerging_gives_every_bit_back():
    model, x = Chain(), torch.randn(5, 4)
    lora = adapted(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora.set_scale("default", 0.5)
    expected = lora(x)
    lora.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(AdapterError, match="is merged; unmerge it before changing its scale"):
        lora.set_scale("default", 1.0)
    with pytest.raises(AdapterError, match="is merged"), lora.rescale(2.0):
        pass
    lora.unmerge_adapter()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(lora(x), expected)


def test_rescaling_lasts_for_a_while():
    lora, x = adapted(Chain().double(), target_modules=["second"]), torch.randn(5, 4, dtype=torch.float64)
    base, update = scaled_outputs(lora, x)
    lora.set_scale("default", 0.5)
    with pytest.raises(RuntimeError), lora.rescale(4.0):
        torch.testing.assert_close(lora(x), base + 2 * update, **CLOSE)
        raise RuntimeError
    torch.testing.assert_close(lora(x), base + 0.5 * update, **CLOSE)


@pytest.mark.slow
def test_it_is_no_part_of_what_is_saved_and_goes_with_the_adapter(tmp_path):
    model, x = Chain(), torch.randn(5, 4)
    keys, lora = set(model.state_dict()), adapted(model)
    expected = lora(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.set_scale("default", 1.0)
        lora.save_pretrained(tmp_path)
    lora.set_scale("default", 0.5)
    with pytest.warns(UserWarning, match="'default' is saved without its scale"):
        lora.save_pretrained(tmp_path)
    assert not [key for key in lora.state_dict() if "scaling" in key]
    assert lora.unload() is model and set(model.state_dict()) == keys
    torch.testing.assert_close(lorafx.load(Chain_like(model), tmp_path)(x), expected)
    assert not list(lora.named_buffers())


def Chain_like(model):
    other = Chain()
    other.load_state_dict(model.state_dict())
    return other


def test_a_kind_without_scaling_says_so(monkeypatch):
    lora = adapted(Chain())
    monkeypatch.setattr(type(lora._lorafx.adapters["default"].kind), "numbers", Kind.numbers)
    with pytest.raises(AdapterError, match="type LORA have no scaling"):
        lora.set_scale("default", 0.5)
    assert not list(lora.named_buffers())
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        lora.set_scale("other", 0.5)


@pytest.mark.parametrize("scale", ["2", None, float("nan"), float("inf"), True])
def test_what_is_no_number_is_refused_and_nothing_changes(scale):
    lora = adapted(Chain())
    with pytest.raises(ConfigError, match="`scale` must be a finite number"):
        lora.set_scale("default", scale)
    assert not list(lora.named_buffers())


def test_a_tensor_counts_by_its_value():
    lora, x = adapted(Chain().double()), torch.randn(5, 4, dtype=torch.float64)
    lora.set_scale("default", 0.5)
    expected = lora(x)
    lora.set_scale("default", torch.tensor(0.5, requires_grad=True))
    for _ in range(2):
        lora(x).sum().backward()
    assert torch.equal(lora(x), expected)


def test_a_scale_that_changes_before_backward_is_not_that_of_the_call():
    lora, x = adapted(Chain().double(), target_modules=["second"]), torch.randn(5, 4, dtype=torch.float64)
    b = lora.second.lora_B.default.weight
    lora.set_scale("default", 0.5)
    (expected,) = torch.autograd.grad(lora(x).sum(), b)
    with lora.rescale(1.0):
        output = lora(x).sum()
    lora.set_scale("default", 3.0)
    assert torch.equal(torch.autograd.grad(output, b)[0], expected)


@pytest.mark.slow
def test_a_scale_set_in_inference_mode_serves_training_too():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    with torch.inference_mode():
        lora.set_scale("default", 0.5)
        with lora.rescale(2.0):
            lora(x)
    lora(x).sum().backward()


def test_rescaling_refuses_before_it_changes_anything():
    lora = adapted(Chain())
    lora.set_scale("default", 1.0)
    lora.merge_adapter()
    with pytest.raises(AdapterError, match="is merged"), lora.rescale(0.0):
        pass


def test_it_survives_the_meta_device():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    lora.set_scale("default", 0.25)
    expected, state = lora(x), {name: tensor.clone() for name, tensor in lora.state_dict().items()}
    lora.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(lora(x), expected)
    lora.to("meta")
    with pytest.raises(AdapterError, match="meta device"):
        lora.set_scale("default", 1.0)
    for path, tensor in state.items():  # one by one, which tells nobody when all are there
        lora.get_submodule(path.rpartition(".")[0])._parameters[path.rpartition(".")[2]] = nn.Parameter(tensor)
    with pytest.raises(AdapterError, match=r"adapter_scaling\.default is on the meta device"):
        lora(x[0])
    lora.load_state_dict(state, assign=True)
    assert torch.equal(lora(x), expected)


def two(**options):
    """A `Chain` in float64 with adapters a and b, and the change of each in what it gives for an input."""
    torch.manual_seed(0)
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["second"], "init_lora_weights": False}
    lora = lorafx.compile(Chain().double(), config, adapter_name="a", **options)
    lora.add_adapter("b", {**config, "r": 1})
    x = torch.randn(5, 4, dtype=torch.float64)
    base, changes = lora._lorafx.base(x), {}
    for name in "ab":
        lora.set_adapter(name)
        changes[name] = lora(x) - base
    return lora, x, base, changes


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_adapters_are_made_active_by_weights(capture, monkeypatch):
    lora, x, base, changes = two(capture=capture)
    lora.set_adapter({"a": 1.0, "b": 1.0})
    lora(x)
    monkeypatch.setattr("lorafx.serving.graph_builder.trace_part", lambda *a, **k: pytest.fail("captured again"))
    for a, b in ((0.7, 0.3), (-1.5, 2.0), (0.0, 1.0)):
        before = [id(program.gm) for program in lora._lorafx.dispatcher]
        lora.set_adapter({"a": a, "b": b})
        torch.testing.assert_close(lora(x), base + a * changes["a"] + b * changes["b"], **CLOSE)
        assert [id(program.gm) for program in lora._lorafx.dispatcher] == before
    assert lora.active_adapters == ["a", "b"] and lora.get_parameter("second.lora_A.b.weight").requires_grad
    lora.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged"):
        lora.set_adapter({"b": 0.5})
    torch.testing.assert_close(lora(x), base + 0.5 * changes["b"], **CLOSE)


@pytest.mark.parametrize(
    ("weights", "error"), [({"a": 1.0, "nobody": 1.0}, AdapterError), ({"a": 2.0, "b": float("nan")}, ConfigError)]
)
def test_weights_that_are_none_are_refused_and_nothing_changes(weights, error):
    lora, x, base, changes = two()
    lora.merge_adapter()
    with pytest.raises(error):
        lora.set_adapter(weights)
    assert lora.active_adapters == lora.merged_adapters == ["b"] and not list(lora.named_buffers())
    torch.testing.assert_close(lora(x), base + changes["b"], **CLOSE)

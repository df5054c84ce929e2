"""insert_adapters: the kind's equation wraps the base operator, which stays where it is."""

import math

import pytest
import torch
from graphs import INSERT, PREPARE, Chain, adapted, context, run, text
from modules import DeeperTied, EveryForm, Tied, cases
from torch import nn

import lorafx
from lorafx.errors import AdapterError, ConfigError
from lorafx.graph import made_by
from lorafx.passes import InsertAdapters


def test_the_equation_wraps_the_operator():
    lora = adapted(Chain(), target_modules=["second"], lora_dropout=0.1)
    assert text(run(lora, PREPARE, torch.randn(5, 4)))[2:] == [
        "relu = relu(linear)",
        "second_weight = second.weight",
        "second_bias = second.bias",
        "linear_1 = linear(relu, second_weight, second_bias)",
    ]
    assert text(run(lora, INSERT, torch.randn(5, 4)))[2:] == [
        "relu = relu(linear)",
        "second_weight = second.weight",
        "second_bias = second.bias",
        "linear_1 = linear(relu, second_weight, second_bias)",
        "second_lora_a_default_weight = second.lora_A.default.weight",
        "second_lora_b_default_weight = second.lora_B.default.weight",
        "to = to.dtype(relu, torch.float32)",
        "dropout = dropout(to, 0.1, True)",
        "linear_2 = linear(dropout, second_lora_a_default_weight)",
        "linear_3 = linear(linear_2, second_lora_b_default_weight)",
        "mul = mul.Tensor(linear_3, 3.0)",
        "add = add.Tensor(linear_1, mul)",
        "to_1 = to.dtype(add, torch.float32)",
    ]


def test_what_is_not_selected_stays():
    lora = adapted(Chain(), target_modules=["second"])
    assert text(run(lora, INSERT, torch.randn(5, 4)))[:2] == text(run(lora, PREPARE, torch.randn(5, 4)))[:2]


@pytest.mark.parametrize("asked", cases([None, "float32", torch.float32], quick=[None]))
def test_products_run_in_the_dtype_of_the_activations_or_in_the_one_asked_for(asked):
    lora, x = adapted(Chain().bfloat16(), asked, target_modules=["second"]), torch.randn(5, 4, dtype=torch.bfloat16)
    passes = lora._lorafx.dispatcher.pipeline[: len(INSERT)]
    a, b = (lora.get_parameter(f"second.lora_{m}.default.weight") for m in "AB")
    hidden = torch.relu(x @ lora.first.weight.T)
    base, dtype = torch.nn.functional.linear(hidden, lora.second.weight, lora.second.bias), asked and torch.float32
    update = 3.0 * (hidden.to(dtype or x.dtype) @ a.to(dtype or x.dtype).T) @ b.to(dtype or x.dtype).T
    output = run(lora, passes, x)(x)
    assert a.dtype == torch.float32 and output.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(
        output, (base + update).to(x.dtype), rtol=2 * eps, atol=2 * eps if asked is None else eps
    )
    values = {n.meta["val"].dtype for n in run(lora, passes, x).graph.nodes if n.name.startswith(("linear", "mul"))}
    assert values == ({torch.bfloat16} if asked is None else {torch.bfloat16, torch.float32})
    output.float().sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["int64", "flaot32"])
def test_a_dtype_that_nothing_is_computed_in(name):
    with pytest.raises(ConfigError, match=name):
        adapted(Chain(), name)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_numbers_are_those_of_the_equation(rslora):
    model, x = Chain().double(), torch.randn(5, 4, dtype=torch.float64)
    lora = adapted(model, target_modules=["second"], use_rslora=rslora)
    gm = run(lora, INSERT, x)
    a, b = (lora.get_parameter(f"second.lora_{m}.default.weight") for m in "AB")
    hidden = torch.relu(x @ model.first.weight.T)
    scaling = 6 / (math.sqrt(2) if rslora else 2)
    expected = hidden @ model.second.weight.T + model.second.bias + scaling * (hidden @ a.T) @ b.T
    torch.testing.assert_close(gm(x), expected, rtol=1e-14, atol=1e-14)


def test_every_form_computes_its_weight_change():
    """Inserted equals the base model with W + ΔW written into it, form by form (float64, at most 36 terms a sum)."""
    model, ids = EveryForm().double(), torch.randint(0, 11, (2, 8))
    for target in ("embedding", "conv2d", "conv3d", "addmm", "linear"):
        lora = adapted(model, target_modules=[target])
        inserted = run(lora, INSERT, ids)(ids)
        lora.merge_adapter()
        torch.testing.assert_close(inserted, model(ids), rtol=1e-13, atol=1e-13)
        lora.unload()


@pytest.mark.slow
def test_a_grouped_convolution_is_two_convolutions():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2)).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    lora = adapted(model, target_modules=["0"], r=4, lora_alpha=8)
    a, b = (lora.get_parameter(f"0.lora_{m}.default.weight") for m in "AB")
    hidden = nn.functional.conv2d(x, a, stride=2, padding=1, dilation=2)
    expected = model(x) + 2 * nn.functional.conv2d(hidden, b, groups=2)
    torch.testing.assert_close(run(lora, INSERT, x)(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.filterwarnings("ignore:.*one site")
@pytest.mark.parametrize("target", ["embed", "head"])
def test_a_tied_weight_changes_for_all_its_readers(target):
    model, ids = Tied().double(), torch.randint(0, 11, (2, 6))
    lora = adapted(model, target_modules=[target])
    inserted = run(lora, INSERT, ids)(ids)
    lora.merge_adapter()
    torch.testing.assert_close(inserted, model(ids), rtol=1e-13, atol=1e-13)


class ReadAgain(nn.Module):
    """An embedding that is the output head too, by a function: no module is tied to it."""

    def __init__(self, head):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), head

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)), self.embed.weight)


@pytest.mark.parametrize("head", cases([nn.functional.linear, lambda x, w: x @ w.t()], quick=[nn.functional.linear]))
def test_a_weight_that_a_function_reads_again_changes_there_too(head):
    model, ids = ReadAgain(head).double(), torch.randint(0, 11, (2, 6))
    lora = lorafx.compile(model, {"target_modules": ["embed"], "init_lora_weights": False, "r": 2})
    before, inserted = model(ids), lora(ids)
    lora.merge_adapter()
    assert not torch.allclose(inserted, before)
    torch.testing.assert_close(inserted, model(ids), rtol=1e-13, atol=1e-13)


def test_new_nodes_say_who_made_them_and_where():
    lora = adapted(Chain(), target_modules=["second"])
    old = set(run(lora, PREPARE, torch.randn(5, 4)).graph.nodes)
    gm = run(lora, INSERT, torch.randn(5, 4))
    new = [node for node in gm.graph.nodes if made_by(node)]
    assert len(new) == 9 and not old & set(new)
    for node in new:
        assert (made_by(node).made_by, made_by(node).site, made_by(node).adapter) == (
            "insert_adapters",
            "second",
            "default",
        )
        assert "graphs.py" in node.meta["stack_trace"]
        assert "second" in str(node.meta["nn_module_stack"])
        assert node.meta["val"] is not None


def test_several_adapters_add_up():
    model, x = Chain().double(), torch.randn(5, 4, dtype=torch.float64)
    lora = adapted(model, target_modules=["second"])
    lora.add_adapter("other", {"r": 3, "target_modules": ["first", "second"], "init_lora_weights": False})
    lora.set_adapter("other")
    alone = run(lora, INSERT, x)(x)
    lora.set_adapter(["default", "other"])
    both = run(lora, INSERT, x)(x)
    lora.merge_adapter()
    torch.testing.assert_close(both, model(x), rtol=1e-13, atol=1e-13)
    assert not torch.allclose(both, alone)


def test_trained_biases_and_saved_modules_are_read_from_the_adapters_copies():
    model, x = Chain(), torch.randn(5, 4)
    lora = adapted(model, target_modules=["first"], modules_to_save=["second"])
    gm = run(lora, INSERT, x)
    reads = {node.target for node in gm.graph.find_nodes(op="get_attr")}
    assert {"second.modules_to_save.default.weight", "second.modules_to_save.default.bias"} <= reads
    assert not {"second.weight", "second.bias"} & reads
    with torch.no_grad():
        lora.get_parameter("second.modules_to_save.default.weight").zero_()
        lora.get_parameter("second.modules_to_save.default.bias").fill_(2.0)
    assert torch.equal(gm(x), torch.full((5, 3), 2.0))
    assert not torch.equal(model(x), gm(x))


def test_two_adapters_that_replace_one_tensor_cannot_act_together():
    lora = adapted(Chain(), target_modules=["first"], modules_to_save=["second"])
    lora.add_adapter("other", {"target_modules": ["first"], "modules_to_save": ["second"]})
    with pytest.raises(AdapterError, match=r"second\.weight"):
        lora.set_adapter(["default", "other"])


def test_without_adapters_nothing_changes():
    lora = adapted(Chain())
    gm = run(lora, PREPARE, torch.randn(5, 4))
    before = text(gm)
    assert InsertAdapters().rewrite(gm, type(context(lora))()) == 0
    assert text(gm) == before


@pytest.mark.slow
def test_a_saved_twin_of_a_tied_weight_is_read_only_where_it_is_named():
    model, ids = DeeperTied(), torch.randint(0, 11, (2, 6))
    lora = adapted(model, target_modules=["middle"], modules_to_save=["head"])
    with torch.no_grad():
        lora.get_parameter("head.modules_to_save.default.weight").zero_()
    assert not lora(ids).any(), "the head reads its copy"
    assert not lora.head(torch.randn(2, 5)).any(), "also when it is called alone"
    lora.get_parameter("head.modules_to_save.default.weight").data.copy_(2 * model.head.weight)
    expected = nn.functional.linear(lora.middle(model.embed(ids)), 2 * model.head.weight)
    torch.testing.assert_close(lora(ids), expected, msg="its twin does not")


@pytest.mark.slow
def test_saved_twins_of_a_tied_weight_are_each_read_where_they_are_named():
    model, ids = DeeperTied(), torch.randint(0, 11, (2, 6))
    lora = adapted(model, target_modules=["middle"], modules_to_save=["embed", "head"])
    with torch.no_grad():
        lora.get_parameter("embed.modules_to_save.default.weight").mul_(3)
        lora.get_parameter("head.modules_to_save.default.weight").mul_(2)
    expected = nn.functional.linear(lora.middle(3 * model.embed(ids)), 2 * model.head.weight)
    torch.testing.assert_close(lora(ids), expected)


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_a_copy_that_trains_in_a_wider_dtype_is_read_in_that_of_the_base(capture):
    model, x = Chain().bfloat16(), torch.randn(5, 4, dtype=torch.bfloat16)
    settings = {"r": 2, "target_modules": ["first"], "modules_to_save": ["second"]}
    lora = lorafx.compile(model, settings, capture=capture)
    copies = [p for n, p in lora.named_parameters() if "modules_to_save" in n]
    for copy in copies:
        copy.data = copy.data.float()
    assert torch.equal(lora(x), model(x))
    lora(x).sum().backward()
    assert all(copy.grad is not None and copy.grad.dtype == torch.float32 for copy in copies)
    with torch.no_grad():
        copies[0].add_(1)
    y = lora(x)
    base = lora.merge_and_unload()
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16} and torch.equal(base(x), y)


@pytest.mark.filterwarnings("ignore:.*one site")
def test_a_twin_with_a_bias_of_its_own_gets_no_bias_of_the_adapters():
    model, x = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double(), torch.randn(3, 5, dtype=torch.float64)
    model[1].weight = model[0].weight
    lora = adapted(model, target_modules=["0"], lora_bias=True)
    a, b, bias = (
        lora.get_parameter(f"0.lora_{name}") for name in ("A.default.weight", "B.default.weight", "B.default.bias")
    )
    weight = model[0].weight + 3 * b @ a
    expected = nn.functional.linear(x @ weight.T + model[0].bias + 3 * bias, weight, model[1].bias)
    torch.testing.assert_close(lora(x), expected, rtol=1e-13, atol=1e-13)
    lora.merge_adapter()
    torch.testing.assert_close(lora(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.slow
def test_a_weight_that_another_module_borrows_is_replaced_there_too():
    class Borrower(Chain):
        def forward(self, x):
            return super().forward(x) + nn.functional.linear(self.first(x), self.second.weight)

    lora, x = adapted(Borrower(), target_modules=["first"], modules_to_save=["second"]), torch.randn(5, 4)
    with torch.no_grad():
        for path in ("second.modules_to_save.default.weight", "second.modules_to_save.default.bias"):
            lora.get_parameter(path).zero_()
    assert not lora(x).any()


def test_a_module_under_two_names_reads_its_own_copy_under_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.inner = nn.Linear(4, 4), nn.Module()
            self.inner.again = self.fc

        def forward(self, x):
            return self.fc(x) * self.inner.again(x)

    model, x = Twice().double(), torch.randn(5, 4, dtype=torch.float64)
    lora = adapted(model, target_modules=["fc"], bias="all", lora_bias=True)
    with torch.no_grad():
        lora.get_parameter("fc.trained_bias.default.bias").add_(1)
    before = lora(x)
    lora.merge_adapter()
    torch.testing.assert_close(lora(x), before, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(lora.merge_and_unload()(x), before, rtol=1e-13, atol=1e-13)

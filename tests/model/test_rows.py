"""Calls in which each row of the batch has its own adapter, on every way that serves calls."""

import pytest
import torch
from models import bert, convnet, gpt2, llama, mlp, t5, vit
from rows import BASE, assert_each_alone, each_alone, first, one_by_one, with_adapters
from torch import nn

import lorafx
from lorafx.errors import AdapterError, UncoveredOperatorError

NAMES = ["a", "b", BASE, "a", "c"]


def three(targets, *more, **options):
    """Configs that differ in rank, scaling and targets."""
    return {
        "a": {"r": 3, "lora_alpha": 12, "target_modules": targets, **options},
        "b": {"r": 5, "lora_alpha": 3, "target_modules": [*targets[1:], *more]},
        "c": {"r": 2, "lora_alpha": 9, "use_rslora": True, "target_modules": [targets[0], *more]},
    }


def ids(rows=5, tokens=7, seed=0):
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


MODELS = {
    "mlp": (mlp, three(["up", "down"]), {"input": numbers(5, 6)}),
    "mlp of sequences": (mlp, three(["up", "down"]), {"input": numbers(5, 4, 6)}),
    "llama": (llama, three(["q_proj", "down_proj"], "embed_tokens"), {"input_ids": ids()}),
    "gpt2": (gpt2, three(["c_attn", "c_proj"], "c_fc"), {"input_ids": ids()}),
    "bert": (bert, three(["query", "dense"], "value"), {"input_ids": ids()}),
    "t5": (t5, three(["q", "wo"], "k"), {"input_ids": ids(), "decoder_input_ids": ids(5, 4, 1)}),
    "vit": (vit, three(["projection", "q_proj"], "v_proj"), {"pixel_values": numbers(5, 3, 16, 16)}),
    "convnet": (convnet, three(["plane", "head"], "line"), {"x": numbers(5, 4, 6, 5)}),
}


def call_of(name):
    _, _, call = MODELS[name]
    return {"x" if key == "input" else key: value for key, value in call.items()}


def made(name, **options):
    make, configs, _ = MODELS[name]
    if name == "convnet":  # in groups
        configs = {key: {**config, "r": 4} for key, config in configs.items()}
    return with_adapters(make(), configs, **options).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_each_row_is_what_it_is_alone_by_one_graph(name):
    lora, call = made(name), call_of(name)
    assert_each_alone(lora, NAMES, call)
    assert_each_alone(lora, [BASE, "c", "c", "b", "a"], call)
    served = [each for each in lora.explain().calls if "rows" in each.title]
    assert [each.served_by for each in served] == ["graph"] and served[0].hits == 1


@pytest.mark.slow
@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("name", MODELS)
def test_early_calls_have_them_too(name):
    lora, call = made(name), call_of(name)
    assert_each_alone(lora, NAMES, call)
    served = [each for each in lora.explain().calls if "rows" in each.title]
    # Of a matrix in a call of sequences or images, as for a head, only a graph can tell that it has a row for each.
    assert served[-1].served_by == ("graph" if name in ("bert", "convnet") else "sites")


def pieces(loss_of, lora, names, call):
    """The gradients of a sum of losses, one a row, by parameter."""
    lora.zero_grad()
    loss_of(first(lora(**call, adapter_names=names))).sum().backward()
    return {name: p.grad.clone() for name, p in lora.named_parameters() if p.grad is not None}


def alone(loss_of, lora, names, call):
    """The same, each row given alone to its adapter."""
    lora.zero_grad()
    for result in each_alone(lora, names, call):
        if (loss := loss_of(result).sum()).requires_grad:
            loss.backward()
    return {name: p.grad.clone() for name, p in lora.named_parameters() if p.grad is not None}


def squares(output):
    return output.square().flatten(1).mean(1)


def assert_same_gradients(found, expected):
    eps, largest = torch.finfo(torch.float32).eps, max(g.abs().max() for g in expected.values())
    assert all(g.abs().max() > 0 for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=float(512 * eps * largest), msg=name)
    for name in found.keys() - expected.keys():  # an adapter that no row has
        assert not found[name].any(), name


TRAINED = [
    *(("mlp of sequences", way) for way in ("graph", "early", "aot_eager")),
    *(("llama", way) for way in ("graph", "aot_eager", "checkpoints", "early checkpoints")),
    *(("gpt2", way) for way in ("early", "checkpoints")),
    *(("convnet", way) for way in ("graph", "early")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), TRAINED)
def test_each_adapter_gets_the_gradient_of_its_rows(name, way, monkeypatch):
    if "early" in way:
        monkeypatch.setattr("lorafx.serving.early_calls.REPEATS", 3)
    lora = made(name, **{"backend": "aot_eager"} if way == "aot_eager" else {}).train()
    plain = made(name).train()  # with the same values
    if "checkpoints" in way:
        lora.gradient_checkpointing_enable()
        lora.config.use_cache = False
    for names in (NAMES, ["b", "b", BASE, "a", BASE]):
        found = pieces(squares, lora, names, call_of(name))
        assert_same_gradients(found, alone(squares, plain, names, call_of(name)))


@pytest.mark.parametrize("repeats", [0, 3])
def test_rows_drop_out_as_their_adapters_do(repeats, monkeypatch):
    monkeypatch.setattr("lorafx.serving.early_calls.REPEATS", repeats)
    linear = nn.Linear(400, 3, bias=False)
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["0"]}
    dropouts = {"some": 0.5, "none": 0.0, "most": 0.9}
    lora = with_adapters(nn.Sequential(linear), {n: config | {"lora_dropout": p} for n, p in dropouts.items()}).train()
    names, x = ["some", "none", BASE, "most", "some"], torch.ones(5, 1, 400)
    for name in dropouts:  # so that the first of each row's results counts what is left of it
        site = getattr(lora[0].lora_A, name).weight, getattr(lora[0].lora_B, name).weight
        site[0].data.fill_(1)
        site[1].data.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    with torch.no_grad():
        left = (lora(x, adapter_names=names) - linear(x))[:, 0, 0] / 400
    assert left[1] == pytest.approx(1, abs=1e-5) and left[2] == 0
    assert left[0] != left[4]
    for row, p in ((0, 0.5), (4, 0.5), (3, 0.9)):  # within 6 deviations of the mean of 400 zeros and 1 / (1 - p)
        assert abs(left[row] - 1) < 6 * (p / (1 - p) / 400) ** 0.5 and left[row] != 1
        assert (left[row] * 400 * (1 - p)).round().item() == pytest.approx((left[row] * 400 * (1 - p)).item(), abs=1e-2)


def test_an_adapter_that_has_diverged_harms_no_other_row():
    lora, call = made("mlp of sequences").train(), call_of("mlp of sequences")
    expected = one_by_one(lora, NAMES, call).detach()
    gradients = alone(squares, lora, NAMES[:4], {key: value[:4] for key, value in call.items()})
    for name, parameter in lora.named_parameters():
        if ".c." in name:
            parameter.data.fill_(float("nan"))
    lora.zero_grad()
    found = lora(**call, adapter_names=NAMES)
    squares(found).sum().backward()
    torch.testing.assert_close(found[:4], expected[:4])
    assert found[4].isnan().all()
    for name, parameter in lora.named_parameters():
        if ".a." in name or ".b." in name:
            torch.testing.assert_close(parameter.grad, gradients[name])


def test_a_scale_that_changes_is_the_rows_own():
    lora, call = made("mlp"), call_of("mlp")
    lora.set_scale("a", 3.0)
    assert_each_alone(lora, NAMES, call)
    lora.set_scale("a", 0.5)
    assert_each_alone(lora, NAMES, call)
    assert sum("rows" in each.title for each in lora.explain().calls) == 1


class Experts(nn.Module):
    """Each token goes to one of two experts: (rows, tokens, 6) -> (rows, tokens, 4)."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])

    def forward(self, x):
        tokens = x.reshape(-1, 6)
        order = tokens[:, 0].argsort()
        half = tokens.shape[0] // 2
        y = torch.cat([self.experts[0](tokens[order[:half]]), self.experts[1](tokens[order[half:]])])
        return y[order.argsort()].view(*x.shape[:-1], 4)


@pytest.mark.parametrize("repeats", [0, 3])
def test_experts_whose_tokens_are_of_any_rows_are_refused_by_name(repeats, monkeypatch):
    monkeypatch.setattr("lorafx.serving.early_calls.REPEATS", repeats)
    lora = with_adapters(Experts(), {"a": {"target_modules": ["0"]}, "b": {"target_modules": ["0"]}})
    with pytest.raises(UncoveredOperatorError, match=r"experts\.0 is given .* which rows of the batch"):
        lora(numbers(4, 2, 6), adapter_names=["a", "b", "a", BASE])  # four tokens of four rows each


@pytest.mark.parametrize(("repeats", "capture"), [(0, "auto"), (3, "auto"), (3, "sites")])
def test_rows_that_come_second_are_refused_however_many_they_are(repeats, capture, monkeypatch):
    class PatchesFirst(nn.Sequential):
        """As open_clip has it: as many patches as images, and nobody sees it in what the model is given."""

        def forward(self, image):
            patches = nn.functional.unfold(image, 2, stride=2)  # (rows, 12, patches)
            return super().forward(patches.permute(2, 0, 1)).transpose(0, 1)

    monkeypatch.setattr("lorafx.serving.early_calls.REPEATS", repeats)
    config = {"target_modules": ["0"]}
    lora = with_adapters(PatchesFirst(nn.Linear(12, 5)), {"a": config, "b": config}, capture=capture)
    with pytest.raises(UncoveredOperatorError, match="which rows of the batch"):
        lora(numbers(4, 3, 4, 4), adapter_names=["a", "b", "a", BASE])


@pytest.mark.usefixtures("early")
def test_as_many_tokens_as_rows_are_served_early_if_others_were_before():
    lora = made("mlp of sequences")
    lora(numbers(4, 4, 6), adapter_names=["a", "b", "a", BASE])  # a graph tells rows and tokens apart
    lora = made("mlp of sequences")
    for tokens in (3, 4):
        lora(numbers(4, tokens, 6), adapter_names=["a", "b", "a", BASE])
    assert [each.served_by for each in lora.explain().calls] == ["sites"]
    lora = made("mlp of sequences", capture="sites")  # no graph tells them apart
    with pytest.raises(UncoveredOperatorError, match="begin with a call in which no other size is 4"):
        lora(numbers(4, 4, 6), adapter_names=["a", "b", "a", BASE])
    for tokens in (3, 4):
        lora(numbers(4, tokens, 6), adapter_names=["a", "b", "a", BASE])


@pytest.mark.parametrize("repeats", [0, 3])
def test_the_rows_are_those_of_what_the_forward_has_first(repeats, monkeypatch):
    class Shifted(nn.Sequential):
        def forward(self, x, shift):
            return super().forward(x) + shift

    monkeypatch.setattr("lorafx.serving.early_calls.REPEATS", repeats)
    config = {"target_modules": ["0"]}
    lora = with_adapters(Shifted(nn.Linear(6, 4)), {"a": config, "b": config})
    x, shift, names = numbers(3, 5, 6), torch.ones(1, 5, 4), ["a", "b", BASE]
    assert torch.equal(lora(shift=shift, x=x, adapter_names=names), lora(x, shift, adapter_names=names))


WRONG = {
    "no adapter 'z'": ["a", "z", "a", "a", "a"],
    "has 4 names, and the batch has 5 rows": ["a"] * 4,
    "has 6 names": ["a"] * 6,
    "has 0 names": [],
    "a list with the name": "aaaaa",
    r"a list with the name .* not \[3": [3, "a", "a", "a", "a"],
}


@pytest.mark.parametrize("reason", WRONG)
def test_names_that_do_not_fit_are_refused_and_nothing_is_changed(reason):
    lora, x = made("mlp"), call_of("mlp")["x"]
    expected = lora(x)
    for call in (lora, lora.up):
        with pytest.raises(AdapterError, match=reason):
            call(x, adapter_names=WRONG[reason])
    assert torch.equal(lora(x), expected)


def test_merged_and_whole_copies_are_refused():
    lora, x = made("mlp"), call_of("mlp")["x"]
    lora.merge_adapter(["a"])
    with pytest.raises(AdapterError, match=r"'a' merged .*unmerge_adapter"):
        lora(x, adapter_names=NAMES)
    lora.unmerge_adapter()
    assert_each_alone(lora, NAMES, {"x": x})
    each = lora(x, adapter_names=NAMES)
    lora.add_adapter("whole", {"target_modules": ["up"], "modules_to_save": ["down"]})
    with pytest.raises(AdapterError, match=r"'whole' has a down.weight of its own"):
        lora(x, adapter_names=["a", "whole", "a", "a", "a"])
    whole = lora(x, adapter_names=["whole"] * 5)
    assert torch.equal(lora(x, adapter_names=NAMES), each)
    lora.set_adapter("whole")
    assert torch.equal(lora(x), whole)


def test_disabled_adapters_act_on_no_row():
    lora, x = made("mlp"), call_of("mlp")["x"]
    with lora.disable_adapter():
        assert torch.equal(lora(x, adapter_names=NAMES), lora(x))


def test_of_many_adapters_those_that_are_named_are_in_the_graph():
    configs = {f"a{number}": {"r": 2, "target_modules": ["up"]} for number in range(20)}
    lora, x = with_adapters(mlp(), configs).eval(), call_of("mlp")["x"]
    assert_each_alone(lora, ["a3", "a3", "a19", BASE, "a7"], {"x": x})
    assert_each_alone(lora, ["a5", "a0", "a11", "a0", BASE], {"x": x})


@pytest.mark.slow
@pytest.mark.parametrize(("make", "way"), [(llama, "graph"), (t5, "early")])
def test_each_beam_has_the_adapter_of_its_row(make, way, monkeypatch):
    monkeypatch.setattr("lorafx.serving.early_calls.REPEATS", 100 if way == "early" else 0)
    name = "llama" if make is llama else "t5"
    lora = with_adapters(make(), MODELS[name][1]).eval()
    for parameter in lora.parameters():
        parameter.data.mul_(2)  # so that adapters write different things
    prompt, names = ids(4, 6), ["a", BASE, "c", "b"]
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    together = lora.generate(prompt, adapter_names=names, **options)
    monkeypatch.setattr("lorafx.serving.early_calls.REPEATS", 1000)  # each alone needs no graph
    written = []
    for row, name in enumerate(names):
        if name == BASE:
            with lora.disable_adapter():
                written.append(lora.generate(prompt[row : row + 1], **options))
        else:
            lora.set_adapter(name)
            written.append(lora.generate(prompt[row : row + 1], **options))
    length = max(together.shape[1], *(each.shape[1] for each in written))
    padded = torch.cat([nn.functional.pad(each, (0, length - each.shape[1])) for each in written])
    assert torch.equal(nn.functional.pad(together, (0, length - together.shape[1])), padded)
    with pytest.raises(AdapterError, match="has 3 names, and the batch has 4 rows"):
        lora.generate(prompt, adapter_names=names[:3], **options)


@pytest.mark.parametrize("repeats", [0, 3])
def test_quantised_layers_have_rows(repeats, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("lorafx.serving.early_calls.REPEATS", repeats)
    torch.manual_seed(0)
    base = nn.Sequential(*(bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False) for _ in range(2))).to("cpu")
    lora = with_adapters(base, {"a": {"r": 2, "target_modules": ["0", "1"]}, "b": {"r": 3, "target_modules": ["1"]}})
    x, names = torch.randn(3, 4, 16), ["b", BASE, "a"]
    expected = one_by_one(lora, names, {"input": x})
    found = lora(x, adapter_names=names)
    scale = torch.finfo(torch.bfloat16).eps  # the layers' own results are rounded so, and a row's with those of others
    torch.testing.assert_close(found, expected, rtol=0, atol=float(scale * expected.detach().abs().max()))
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in lora.named_parameters() if "lora_" in n)


def test_losses_by_adapter():
    losses = torch.tensor([1.0, 5.0, 3.0, 7.0], requires_grad=True)
    found = lorafx.loss_by_adapter(losses, ["b", "a", "b", BASE])
    assert found == {"b": 2.0, "a": 5.0}
    sum(found.values()).backward()
    assert losses.grad.tolist() == [0.5, 1.0, 0.5, 0.0]
    with pytest.raises(AdapterError, match="3 names and losses of shape"):
        lorafx.loss_by_adapter(losses, ["a", "b", "a"])

"""Weights that stack experts: each way in which a model reads one, beside the formula, and what cannot be served."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorafx
from lorafx.errors import ConfigError, SelectionError, UncoveredOperatorError
from lorafx.ops.by_expert import factors_in, factors_out, grouped_mm


class Stack(nn.Module):
    """Three experts, (in 5, out 7) in memory as `shape` says; `read` is how forward reads them."""

    def __init__(self, read, shape, is_transposed=False):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape) / 2)
        self.read, self.is_transposed = read, is_transposed

    def forward(self, x):
        return self.read(self.w, x)


class Model(nn.Sequential):
    pass


def one_each(w, x):
    """(tokens, 5) -> (tokens, 7): token t goes to expert t % 3."""
    return torch.einsum("ti,toi->to", x, w[torch.arange(len(x)) % 3])


def loop(w, x):
    return sum(F.linear(x, w[e]) * (e + 1) for e in range(3))


def batched(w, x):
    return torch.bmm(x.expand(3, *x.shape), w)


def whole(w, x):
    return torch.einsum("ti,eoi->to", x, w) + (x @ w.mT).tanh().sum(0)


def one_by_one(w, x):
    return sum(x @ each.T for each in w)


def among_others(w, x):
    return x @ torch.cat([w, torch.ones_like(w), w.detach().square()]).sum(0).T


CONFIG = {"r": 2, "lora_alpha": 6, "target_modules": [], "target_parameters": ["0.w"], "init_lora_weights": False}
READ = {
    "by number, of each token": (one_each, (3, 7, 5), False),
    "by number, in a loop": (loop, (3, 7, 5), False),
    "whole, twice": (whole, (3, 7, 5), False),
    "whole, and said to be transposed": (lambda w, x: whole(w.mT, x), (3, 5, 7), True),
    "one by one": (one_by_one, (3, 7, 5), False),
    "among others": (among_others, (3, 7, 5), False),
    "in a batch": (batched, (3, 5, 7), True),
    "in a batch, and not said to be transposed": (batched, (3, 5, 7), False),
}


@pytest.mark.parametrize("capture", ["sites", "auto", "graph"])
@pytest.mark.parametrize("name", READ)
def test_each_way_of_reading_is_that_of_the_weight_with_the_update(name, capture):
    torch.manual_seed(0)
    base = Model(Stack(*READ[name])).double()
    lora, x = lorafx.compile(base, lorafx.LoraConfig(**CONFIG), capture=capture), torch.randn(4, 5).double()
    a, b = (getattr(lora[0], f"w_lora_{one}").default.weight for one in "AB")
    delta = 3 * torch.einsum("eri,ore->eoi", a.unflatten(0, (3, 2)), b.unflatten(1, (2, 3)))
    weight = (lora[0].w + (delta.mT if READ[name][2] else delta)).detach()
    expected = READ[name][0](weight.requires_grad_(), x)
    torch.testing.assert_close(lora(x), expected, rtol=1e-12, atol=1e-12)
    expected.square().sum().backward()
    lora(x).square().sum().backward()
    inside = 3 * torch.einsum("eoi,ore->eri", weight.grad.mT if READ[name][2] else weight.grad, b.unflatten(1, (2, 3)))
    torch.testing.assert_close(a.grad, inside.flatten(0, 1).detach(), rtol=1e-12, atol=1e-12)
    lora.merge_adapter()
    torch.testing.assert_close(base(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_grouped_products_take_ranks_that_no_kernel_is_aligned_to(dtype, tolerance):
    torch.manual_seed(0)
    x, offs = torch.randn(9, 12, dtype=dtype), torch.tensor([2, 2, 9], dtype=torch.int32)
    a = torch.randn(9, 12, dtype=dtype, requires_grad=True)
    b = torch.randn(20, 9, dtype=dtype, requires_grad=True)
    found = grouped_mm(grouped_mm(x, factors_in(a, offs), offs), factors_out(b, offs), offs)
    of_rows = torch.tensor([0] * 2 + [2] * 7)
    exact = torch.einsum(
        "ti,tri,tor->to",
        x.double(),
        a.unflatten(0, (3, 3))[of_rows].double(),
        b.double().unflatten(1, (3, 3))[:, :, of_rows].permute(2, 0, 1),
    )
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))
    wanted, got = (torch.autograd.grad(y.square().sum(), (a, b)) for y in (exact, found))
    for one, other in zip(wanted, got):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance * float(one.abs().max()))


def test_rows_of_a_batch_cannot_choose_for_experts_even_where_there_are_as_many_tokens():
    lora = lorafx.compile(Model(Stack(*READ["by number, of each token"])), lorafx.LoraConfig(**CONFIG))
    lora.add_adapter("b", lorafx.LoraConfig(**CONFIG))
    with pytest.raises(UncoveredOperatorError, match=r"0\.w .*which rows of the batch"):
        lora(torch.randn(3, 5), adapter_names=["b", "default", "b"])


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"lora_dropout": 0.1},
            ConfigError,
            r"0\.w is one of `target_parameters`, for which there is no `lora_dropout`",
        ),
        ({"use_dora": True}, ConfigError, r"0\.w .* no `use_dora`"),
        ({"target_parameters": ["0.v"]}, SelectionError, r"names 0\.v, which the model does not have; .*: 0\.w"),
        ({"target_parameters": ["1.weight"]}, SelectionError, r"1\.weight, the weight of a Conv1d: .*`target_modules`"),
        ({"target_parameters": ["2.bias"]}, SelectionError, r"2\.bias of 1 dimensions"),
        ({"target_parameters": ["2.weight"], "target_modules": ["2"]}, SelectionError, r"2\.weight is .*one of them"),
        ({"init_lora_weights": "olora"}, ConfigError, r"0\.w: .* is for linear layers"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(changes, error, message):
    model = Model(Stack(*READ["in a batch"]), nn.Conv1d(4, 6, 3), nn.Linear(6, 4))
    before = dict(model.state_dict())
    with pytest.raises(error, match=message):
        lorafx.compile(model, lorafx.LoraConfig(**CONFIG | changes))
    assert dict(model.state_dict()).keys() == before.keys()

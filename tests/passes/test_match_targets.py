"""match_targets: every read of a selected weight is marked, or refused by name."""

import pytest
import torch
from graphs import PREPARE, Chain, adapted, run
from modules import EveryForm, Tied
from torch import nn

from lorafx.errors import UncoveredOperatorError

SITE = "site"


def marks(gm) -> list[tuple[str, str]]:
    return [(str(node.target), node.meta[SITE].name) for node in gm.graph.nodes if SITE in node.meta]


def test_every_form_is_found():
    lora = adapted(EveryForm(), target_modules=["embedding", "conv1d", "conv2d", "conv3d", "addmm", "linear"])
    assert marks(run(lora, PREPARE, torch.randint(0, 11, (2, 8)))) == [
        ("aten.embedding.default", "embedding"),
        ("aten.conv1d.padding", "conv1d"),
        ("aten.conv2d.default", "conv2d"),
        ("aten.conv3d.default", "conv3d"),
        ("aten.linear.default", "addmm"),
        ("aten.linear.default", "linear"),
    ]


def test_what_is_not_selected_is_not_marked():
    lora = adapted(Chain(), target_modules=["second"])
    assert marks(run(lora, PREPARE, torch.randn(5, 4))) == [("aten.linear.default", "second")]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.shared(torch.relu(self.shared(x))))


def test_a_module_that_runs_twice_is_one_site_marked_twice():
    lora = adapted(Twice(), target_modules=["shared"])
    assert len(lora.sites) == 1
    assert len(marks(run(lora, PREPARE, torch.randn(5, 4)))) == 2


@pytest.mark.parametrize("target", ["embed", "head"])
def test_a_tied_weight_is_marked_wherever_it_is_read(target):
    with pytest.warns(UserWarning, match="one site"):
        lora = adapted(Tied(), target_modules=[target])
    found = marks(run(lora, PREPARE, torch.randint(0, 11, (2, 6))))
    assert found == [("aten.embedding.default", target), ("aten.linear.default", target)]


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = nn.Linear(4, 3)

    def forward(self, x):
        return x @ self.odd.weight.exp().t() + self.odd.bias


def test_an_operator_that_no_form_covers_is_refused_with_site_operator_and_line():
    lora = adapted(Odd(), target_modules=["odd"])
    with pytest.raises(UncoveredOperatorError) as caught:
        lora(torch.randn(5, 4))
    for part in ("site odd", "aten.exp.default", "test_match_targets.py", "self.odd.weight.exp().t()"):
        assert part in str(caught.value)


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.odd.weight, x)


def test_a_weight_read_as_an_operators_input_is_refused():
    lora = adapted(Square(), target_modules=["odd"])
    with pytest.raises(UncoveredOperatorError, match="site odd"):
        lora(torch.randn(5, 4))


def test_a_weight_that_an_operator_reads_as_its_input_too_is_refused():
    class Itself(Square):
        def forward(self, x):
            return x @ nn.functional.linear(self.odd.weight, self.odd.weight)

    lora = adapted(Itself(), target_modules=["odd"])
    with pytest.raises(UncoveredOperatorError, match="site odd"):
        lora(torch.randn(5, 4))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, which="left"):
        return self.left(x) if which == "left" else self.right(x)


def test_a_site_that_the_call_does_not_run_is_no_error():
    lora = adapted(Branch(), target_modules=["left", "right"])
    assert marks(run(lora, PREPARE, torch.randn(5, 4), which="right")) == [("aten.linear.default", "right")]


def test_reading_only_the_size_of_a_weight_is_no_read():
    class Sized(Chain):
        def forward(self, x):
            return super().forward(x) * self.second.weight.shape[0]

    lora = adapted(Sized(), target_modules=["second"])
    assert marks(run(lora, PREPARE, torch.randn(5, 4))) == [("aten.linear.default", "second")]


@pytest.mark.slow
def test_a_site_within_a_vmap_is_served_by_sites():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            return torch.vmap(self.inner)(x)

    model, x = Mapped(), torch.randn(5, 2, 4)
    lora = adapted(model)
    plain = adapted(nn.ModuleDict({"inner": model.inner}))
    torch.testing.assert_close(lora(x), plain["inner"](x))
    assert "within a vmap" in str(lora.explain())

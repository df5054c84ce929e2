"""gemm_update: `fuse_lora{gemm='triton'}` as text and in graphs; the kernel itself in processes with Triton."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from graphs import INSERT, Chain, adapted, run, text
from torch import nn
from torch.nn import functional as F

import lorafx
from lorafx.bench import contestants
from lorafx.bench.cases import CUDA, SMOKE
from lorafx.bench.models import build
from lorafx.errors import ConfigError, PipelineError
from lorafx.passes import ElideCasts, ElideDropout, FuseLora, ShareInput

module = importlib.import_module("lorafx.ops.gemm_update")
update, linear, linears = torch.ops.lorafx.gemm_update, torch.ops.lorafx.lora_linear, torch.ops.lorafx.lora_linears
BEFORE = (*INSERT, ElideCasts(), ElideDropout())
PASSES = lorafx.Pipeline(*(FuseLora("triton") if p.name == "fuse_lora" else p for p in lorafx.passes.default))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("how", ["interpreted", "compiled"])
def test_the_kernel(how):
    """TRITON_INTERPRET counts when Triton is imported, which other tests of this process may have done."""
    file = Path(__file__).parents[1] / "kernels" / f"{how}_gemm_update.py"
    environment = os.environ | {"TRITON_INTERPRET": str(int(how == "interpreted"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_the_option_prints_and_parses():
    assert str(FuseLora()) == "fuse_lora" and str(FuseLora("triton")) == "fuse_lora{gemm='triton'}"
    assert lorafx.Pipeline.parse(str(PASSES)) == PASSES != lorafx.passes.default


def test_another_value_is_an_error_that_names_the_choices():
    with pytest.raises(ConfigError, match="gemm='cutlass' is none of 'library', 'triton'"):
        FuseLora(gemm="cutlass")
    with pytest.raises(PipelineError, match="'library', 'triton'"):
        lorafx.Pipeline.parse("fuse_lora{gemm='cutlass'}")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_before_and_after(dropout):
    lora = adapted(Chain(), target_modules=["second"], lora_dropout=dropout)
    line = text(run(lora, (*BEFORE, FuseLora("triton")), torch.randn(5, 4)))[-1]
    assert line.startswith("lora_linear = lorafx.lora_linear(") and line.endswith("3.0, triton)")


class Fork(nn.Module):
    """(…, 4) -> (…, 3): three linear layers of one value."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 3, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        x = x.sin()
        return self.a(x) + self.b(x) * self.c(x)


def test_shared_inputs_keep_it():
    gm = run(adapted(Fork()), (*BEFORE, FuseLora("triton"), ShareInput()), torch.randn(5, 4))
    (joint,) = gm.graph.find_nodes(op="call_function", target=linears.default)
    assert len(joint.args[1]) == 3 and joint.args[6] == "triton"


def test_only_what_one_computes_is_shared():
    lora, x = adapted(Fork()), torch.randn(5, 4)
    gm = run(lora, (*BEFORE, FuseLora("triton")), x)
    expected = gm(x)
    middle = gm.graph.find_nodes(op="call_function", target=linear.default)[1]
    middle.args = middle.args[:-1]
    assert ShareInput().rewrite(gm, lora._lorafx.context) == 1
    gm.recompile()
    (joint,) = gm.graph.find_nodes(op="call_function", target=linears.default)
    assert len(joint.args[1]) == 2 and joint.args[6] == "triton" and not middle._erased
    torch.testing.assert_close(gm(x), expected)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 9)

    def forward(self, x, labels):
        return F.cross_entropy(self.head(self.body(x)), labels)


def test_the_loss_of_an_adapted_head_is_still_fused():
    x, labels = torch.randn(5, 4), torch.arange(5)
    losses = []
    for passes in (PASSES, lorafx.passes.default):
        config = {"target_modules": "all-linear", "r": 2, "init_lora_weights": False}
        torch.manual_seed(0)
        lora = lorafx.compile(Head(), config, random_state=0, pipeline=passes)
        names = [str(node.target) for node in lora.graph(x, labels).graph.nodes]
        assert "lorafx.linear_cross_entropy.default" in names
        losses.append(lora(x, labels))
    torch.testing.assert_close(*losses)


def arguments(dtype):
    torch.manual_seed(0)
    shapes = (5, 8), (8, 6), (6,), (5, 3), (3, 6)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("without", [False, True], ids=["on a CPU", "without Triton"])
def test_elsewhere_products_are_the_librarys(without, monkeypatch):
    if without:
        monkeypatch.setattr(module, "kernel", lambda: None)
    monkeypatch.setattr(module, "_is_interpreted", lambda: False)
    x, weight, bias, *_ = arguments(torch.float32)
    given = x, weight.t(), bias, None, torch.randn(2, 8), torch.randn(6, 2), 1.7
    outcomes = []
    for rest in ((), ("triton",)):
        y = linear(*given, *rest)
        outcomes.append([y, *torch.autograd.grad(y.sin().sum(), (x, weight, bias))])
    assert all(map(torch.equal, *outcomes))


def test_the_operator_has_derivatives_of_its_own():
    given = arguments(torch.float64)
    assert torch.autograd.gradcheck(update, (*given, 1.7), fast_mode=True)
    assert torch.autograd.gradgradcheck(update, (*given, 1.7), fast_mode=True)
    torch.testing.assert_close(update(*given, 1.7), given[0] @ given[1] + given[2] + 1.7 * given[3] @ given[4])


def test_sizes_that_do_not_fit_are_an_error():
    x, weight, bias, hidden, low = arguments(torch.float32)
    for wrong in ((x, weight[1:], bias, hidden, low), (x, weight, bias[1:], hidden, low), (x, weight, None, x, low)):
        with pytest.raises(ValueError, match=r"gemm_update: .* and not"):
            update(*wrong, 1.0)


def test_importing_lorafx_does_not_import_triton():
    script = "import sys, lorafx\nprint('lorafx.ops.gemm_update' in sys.modules)\n"
    script += "module = sys.modules['lorafx.ops.gemm_update']; print(module.kernel.cache_info().currsize, module.tl)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0", "None"]


def test_the_bench_has_a_contestant_that_needs_cuda():
    assert {case.name for case in CUDA if "lorafx-triton" in case.contestants} == {"8b-linear", "8b-linears"}
    with pytest.raises(contestants.Missing, match="CUDA"):
        contestants.MAKERS["lorafx-triton"](SMOKE[0], build(SMOKE[0], "cpu"))

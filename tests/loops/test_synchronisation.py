"""Training steps on a GPU in which the host waits for nothing, so that it can launch what comes next meanwhile."""

from __future__ import annotations

import models
import pytest
import torch

import lorafx

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
DROPOUTS = [0.0, 0.5]


def stepping(backend, dropout, mode=None):
    """A function that makes one training step, after those in which things are captured and compiled."""
    config = {"r": 4, "target_modules": "all-linear", "lora_dropout": dropout}
    model = lorafx.compile(
        models.llama().cuda().bfloat16(), config, backend=backend, mode=mode, capture="graph"
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(0, models.VOCABULARY, (2, 9), device="cuda")

    def step():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for _ in range(3):
        step()
    return step


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_does_not_wait(backend, dropout, mode):
    step = stepping(backend, dropout, mode)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step() for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.isfinite, losses))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_loss_can_be_captured_in_a_cuda_graph(dtype):
    """Replayed with other labels, of which some do not count; float64 is what no kernel is for. Sums of at most 40."""
    x = torch.randn(7, 16, device="cuda", dtype=dtype, requires_grad=True)
    weight, labels = torch.randn(40, 16, device="cuda", dtype=dtype), torch.randint(0, 40, (7,), device="cuda")

    def step():
        loss = torch.ops.lorafx.linear_cross_entropy(x, weight, None, None, None, 0.0, labels)
        return loss, *torch.autograd.grad(loss, x)

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    labels.copy_(labels.flip(0)), labels[2:4].fill_(-100)
    graph.replay()
    for replayed, again in zip(captured, step()):
        assert (replayed - again).abs().max() <= 40 * torch.finfo(dtype).eps * again.abs().max()

"""What records kernels, on a GPU; and the tape that stands in for it, which must do what a CUDA graph does."""

import pytest
import torch
from replays import DEVICE, Recorder

device = Recorder(torch.device(DEVICE, 0 if DEVICE == "cuda" else None))


def test_what_is_recorded_runs_when_it_is_launched():
    """On what lies in its inputs then; recording changes nothing that was there."""
    x, total = torch.arange(3.0, device=DEVICE), torch.zeros(3, device=DEVICE)
    with device.turn():
        result, launch = device.record(lambda: total.add_(x) * 2)
        assert total.tolist() == [0, 0, 0]
        for n in range(1, 4):
            x.fill_(n)
            launch()
            assert result.tolist() == [2 * sum(range(1, n + 1))] * 3


def test_random_numbers_go_on_as_if_there_were_no_recording():
    torch.manual_seed(3)
    expected = [torch.rand(5, device=DEVICE) for _ in range(3)]
    torch.manual_seed(3)
    result, launch = device.record(lambda: torch.rand(5, device=DEVICE))
    found = []
    for _ in range(3):
        launch()
        found.append(result.clone())
    assert all(map(torch.equal, found, expected))
    before = device.random_state()
    with device.with_random_state(before):
        torch.rand(5, device=DEVICE)
    assert torch.equal(before, device.random_state())


def test_memory_is_taken_back_with_the_last_recording():
    """torch forgets a pool with the last recording in it; the next one begins another."""
    x = torch.ones(3, device=DEVICE)
    for n in range(3):
        result, launch = device.record(lambda n=n: x * n)
        launch()
        assert result.tolist() == [n] * 3
        del result, launch


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_recording_that_fails_leaves_nothing_behind():
    """torch itself would draw no random number after one, nor free memory that streams share."""
    x = torch.ones(3, device=DEVICE)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="captur"):
            device.record(lambda: (x * 2).sum().item())
    with pytest.raises(ZeroDivisionError):
        device.record(lambda: 1 / 0)
    assert torch.rand(3, device=DEVICE).shape == (3,)
    result, launch = device.record(lambda: x + 1)
    launch()
    assert result.tolist() == [2, 2, 2]
    shared = torch.ones(2**20, device=DEVICE)
    shared.record_stream(torch.cuda.Stream())
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    del shared
    torch.ones(1, device=DEVICE)
    assert torch.cuda.memory_allocated() < held

"""Where the kernel of the cross entropy is used."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lorafx.ops.cuda import cross_entropy


def test_the_kernel_is_for_plain_tensors_of_three_dtypes_on_a_gpu(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_works", lambda device, dtype: True)
    with FakeTensorMode():
        labels = torch.zeros(3, dtype=torch.int64, device="cuda")
        given = [torch.zeros(3, 5, dtype=dtype, device="cuda") for dtype in (torch.float32, torch.float64)]
    assert not cross_entropy.has_cross_entropy_for(given[0], labels)  # a compiler's
    monkeypatch.setattr(cross_entropy, "is_plain", lambda tensor: True)
    assert [cross_entropy.has_cross_entropy_for(each, labels) for each in given] == [True, False]
    assert not cross_entropy.has_cross_entropy_for(given[0], torch.zeros(3, dtype=torch.int64))
    assert not cross_entropy.has_cross_entropy_for(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    "capability, module, worked", [((9, 0), "re", True), ((7, 5), "re", False), ((9, 0), "no", False)]
)
def test_where_it_works(monkeypatch, capability, module, worked):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cross_entropy.importlib.util, "find_spec", lambda name: None if module == "no" else module)
    monkeypatch.setattr(cross_entropy, "cross_entropy_in_place", lambda *given: None)
    assert cross_entropy._works.__wrapped__(torch.device("cpu"), torch.float32) == worked


def test_where_triton_fails_there_is_a_warning_and_torchs_operators(monkeypatch):
    """Compiled code does not run on a CPU."""
    pytest.importorskip("triton", reason="Triton is not for this platform")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(UserWarning, match="Triton does not work here, so a fused loss takes longer: .*Error"):
        assert not cross_entropy._works.__wrapped__(torch.device("cpu"), torch.float32)

"""offload: what waits in the host's memory comes back one layer before backward needs it."""

from __future__ import annotations

import torch

from lorafx.ops import offload


def test_an_input_comes_back_while_backward_is_at_the_layer_after_it(monkeypatch):
    events = []
    monkeypatch.setattr(offload, "_can_move", lambda value: isinstance(value, torch.Tensor))
    monkeypatch.setattr(offload, "to_host", lambda t: t.detach().clone())
    monkeypatch.setattr(offload, "to_device", lambda host, device: (events.append("comes"), (host, None))[1])
    monkeypatch.setattr(offload, "arrived", lambda tensor, ready: (events.append("is used"), tensor)[1])
    waiting = [offload.Waiting(torch.randn(3)) for _ in range(3)]
    offload.Waiting.last = None
    for one in waiting:
        one.leave()
    for one in reversed(waiting):
        one.get()
    assert events == ["comes", "comes", "is used", "comes", "is used", "is used"]

"""traced: torch.export, torch.jit.trace and make_fx record an adapted model in ATen's operators alone."""

import io

import pytest
import torch
from graphs import Chain, adapted
from torch import nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from lorafx.serving import traced

x = torch.linspace(-1, 1, 12).view(3, 4)


class Mixed(nn.Module):
    """A site of each reading, a part that is served as a graph of its own, and a module to save that has buffers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.attention = nn.Embedding(11, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv, self.norm, self.out = nn.Conv1d(8, 6, 3, padding=1), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, ids):
        hidden = self.embedding(ids)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return self.out(self.norm(torch.tanh(self.conv(hidden.transpose(1, 2)))).transpose(1, 2))


def mixed():
    targets = ["embedding", "attention", "conv", "out"]
    lora = adapted(Mixed(), target_modules=targets, bias="all", modules_to_save=["norm"]).eval()
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1 if parameter.requires_grad else 0)
    return lora


@pytest.mark.slow
def test_an_exported_model_is_dynamic_in_sizes_and_survives_a_file():
    lora, ids = mixed(), torch.arange(33).view(3, 11) % 11
    program = torch.export.export(lora, (ids[:, :5].clone(),), dynamic_shapes=({0: Dim("rows"), 1: Dim("tokens")},))
    assert not [node for node in program.graph.nodes if "lorafx" in str(node.target)]
    names = {name for name, _ in lora.named_parameters()}
    assert (
        {"out.lora_A.default.weight", "attention.lora_B.default.weight"}
        <= set(program.state_dict)
        <= {
            *names,
            *dict(lora.named_buffers()),
        }
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    result = torch.export.load(file).module()(ids)
    assert torch.allclose(result, lora(ids), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("record", [torch.jit.trace, lambda lora, x: make_fx(lora)(x)])
def test_other_recorders(record):
    lora, ids = mixed(), torch.arange(15).view(3, 5) % 11
    assert torch.allclose(record(lora, ids)(ids), lora(ids), atol=1e-5)


def test_what_acts_is_what_is_recorded():
    lora = adapted(Chain())
    lora.add_adapter("other", {"r": 3, "target_modules": ["second"], "init_lora_weights": False})

    def check():
        assert torch.allclose(torch.export.export(lora, (x,)).module()(x), lora(x), atol=1e-5)

    lora.set_adapter(["default", "other"])
    check()
    lora.set_scale("other", 0.5)
    lora.merge_adapter(["default"])
    check()
    lora.unmerge_adapter()
    with lora.disable_adapter():
        check()


def test_a_model_that_shares_a_module_is_exported():
    """torch.export then has all modules there are give stand-ins for others, which no capture within may meet."""
    shared = nn.Linear(4, 4)
    lora, rows = adapted(nn.Sequential(shared, nn.Linear(4, 4), shared, nn.Linear(4, 3))), torch.randn(2, 4)
    calls = nn.Module.__call__, nn.Module.__getattr__
    assert torch.allclose(torch.export.export(lora, (rows,)).module()(rows), lora(rows), atol=1e-5)
    assert (nn.Module.__call__, nn.Module.__getattr__) == calls


def test_an_exported_model_trains():
    lora = adapted(Chain(), lora_dropout=0.5).train()
    program = torch.export.export(lora, (x,))
    assert sum("dropout" in str(node.target) for node in program.graph.nodes) == 2
    module = program.module()
    module(x).sum().backward()
    assert {n for n, p in module.named_parameters() if p.grad is not None} == {
        n for n, p in lora.named_parameters() if p.requires_grad
    }


def test_a_recorded_size_is_the_models_own():
    """Neither batch nor width is baked in, and nothing that was captured for the recorder serves a call."""
    lora = adapted(Chain())
    program = torch.export.export(lora, (x,), dynamic_shapes=({0: Dim("rows")},))
    assert not list(lora._lorafx.dispatcher) and program.module()(torch.cat([x, x])).shape == (6, 3)


def test_aside_nobody_records_and_modes_are_the_same():
    seen = []

    def look():
        seen.append((traced.is_traced(), torch.is_grad_enabled(), torch.get_autocast_dtype("cpu")))
        return torch.is_autocast_enabled("cpu")

    def run(x):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert traced.is_traced() and traced.aside(look)
        return x * 2

    make_fx(run)(x)
    assert seen == [(False, False, torch.bfloat16)] and not traced.is_traced()
    with pytest.raises(ZeroDivisionError):
        traced.aside(lambda: 1 / 0)

"""Which calls are replayed, which are not, and what is said of them."""

import threading
from contextlib import contextmanager

import pytest
import torch
from replays import (
    DEVICE,
    Recorder,
    Tiny,
    assert_same,
    both,
    decoded,
    gradients,
    ids,
    launched,
    layers,
    loss_of,
    made,
    trained,
)
from transformers import DynamicCache

from lorafx.errors import ConfigError
from lorafx.lowering import lower
from lorafx.lowering.backend import Backend
from lorafx.lowering.cuda_graphs.recording import ModelTensors


@pytest.mark.slow
def test_two_calls_before_a_backward():
    """The second runs as it is, for the first one's backward needs what it kept."""
    plain, graphs = both()

    def losses(lora, n):
        return 2 * lora(input_ids=ids(n), labels=ids(n))["loss"] + lora(input_ids=ids(n), labels=ids(n + 9))["loss"]

    assert_same(*(trained(each, losses) for each in (plain, graphs)))
    assert launched(graphs) == "4 replayed"  # of ten calls


@pytest.mark.slow
def test_a_call_whose_backward_never_comes_keeps_nobody_waiting():
    _, graphs = both()
    for n in range(3):
        graphs(input_ids=ids(n), labels=ids(n))["loss"].backward()
    for n in range(3):
        graphs(input_ids=ids(n), labels=ids(n))
    assert launched(graphs) == "5 replayed"


@pytest.mark.slow
def test_checkpointed_layers_are_replayed_unless_they_draw():
    plain, graphs = both(model=layers, gradient_checkpointing=True)
    assert_same(*(trained(each, loss_of) for each in (plain, graphs)))
    assert launched(graphs) == "4 replayed"
    drawing = made("reduce-overhead", model=layers, gradient_checkpointing=True, dropout=0.3)
    trained(drawing, loss_of)
    assert "draw random numbers" in launched(drawing)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*offload")
def test_what_waits_on_the_host_is_not_recorded():
    lora = made("reduce-overhead", model=layers, gradient_checkpointing="offload")
    for n in range(3):
        lora(input_ids=ids(n), labels=ids(n))["loss"].backward()
    assert launched(lora) == "not recorded: layers' inputs wait in the host's memory"


@pytest.mark.slow
def test_sizes_that_keep_changing_are_not_recorded(monkeypatch):
    monkeypatch.setattr("lorafx.lowering.cuda_graphs.replayed._TRIES", 3)
    plain, graphs = (lora.eval() for lora in both(model=layers))
    with torch.no_grad():
        assert_same(decoded(plain, DynamicCache(), 6), decoded(graphs, DynamicCache(), 6))
    assert launched(graphs) == "not recorded: 3 calls had 3 different sizes"


@pytest.mark.slow
def test_parameters_that_keep_moving_are_not_recorded(monkeypatch):
    """A recording would serve one call: each takes longer to make than it saves."""
    monkeypatch.setattr("lorafx.lowering.cuda_graphs.replayed._TRIES", 8)
    plain, graphs = both()

    def losses(lora, n):
        for parameter in lora.parameters():
            parameter.data = parameter.data.clone()
        return loss_of(lora, n)

    assert_same(*(trained(each, losses, steps=8) for each in (plain, graphs)))
    assert "keep being replaced" in launched(graphs)


@pytest.mark.slow
def test_sizes_that_come_again_have_recordings_each():
    plain, graphs = both()
    lengths = [5, 9, 5, 9, 7, 9, 5]

    def losses(lora, n):
        tokens = ids(n, lengths[n])
        return lora(input_ids=tokens, labels=tokens)["loss"]

    assert_same(*(trained(each, losses, steps=len(lengths)) for each in (plain, graphs)))
    assert launched(graphs) == "4 replayed"


@pytest.mark.slow
def test_threads_take_turns():
    plain, graphs = (lora.eval() for lora in both())
    found = {}

    def work(n):
        with torch.no_grad():
            found[n] = [graphs(input_ids=ids(n + step))["logits"] for step in range(6)]

    with torch.no_grad():
        for _ in range(2):
            graphs(input_ids=ids(0))
        expected = {n: [plain(input_ids=ids(n + step))["logits"] for step in range(6)] for n in range(3)}
    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(3):
        assert_same(expected[n], found[n])


@pytest.mark.slow
def test_who_trains_while_another_thread_records_gets_his_gradients(monkeypatch):
    """While a call is recorded, other parameters stand in the place of the model's."""
    graphs, expected = made("reduce-overhead"), made(None)
    values = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def embedded(lora):
        return lora(inputs_embeds=values, labels=ids(2))["loss"]

    embedded(graphs).backward()
    next(iter(graphs._lorafx.dispatcher)).lowered.run.reason = "not recorded, as such a call may be"
    loss_of(graphs, 0).backward()
    graphs.zero_grad()
    (loss_of(expected, 1) + embedded(expected)).backward()

    def other():
        embedded(graphs).backward()

    thread, replaced = threading.Thread(target=other), ModelTensors.replaced

    @contextmanager
    def slowly(self, others):
        with replaced(self, others):
            thread.start()
            thread.join(0.5)  # it waits, until this is recorded
            yield

    monkeypatch.setattr(ModelTensors, "replaced", slowly)
    loss = loss_of(graphs, 1)
    monkeypatch.undo()
    thread.join()
    loss.backward()
    for found, right in zip(gradients(graphs), gradients(expected)):
        assert (found - right).abs().max() <= 96 * torch.finfo(torch.float32).eps * right.abs().max()


class Scaled(Tiny):
    """With a number that is a tensor on the CPU, as torch lets kernels read it."""

    def __init__(self):
        super().__init__()
        self.temperature = torch.tensor(2.0)

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        return outputs | {"logits": outputs["logits"] / self.temperature}


@pytest.mark.slow
def test_a_tensor_on_another_device_is_not_taken_for_a_constant(monkeypatch):
    monkeypatch.setattr(Recorder, "holds", lambda self, tensor: tensor.ndim > 0)
    plain, graphs = (lora.eval() for lora in both(model=Scaled))
    with torch.no_grad():
        for n in range(4):
            plain.temperature.fill_(n + 1), graphs.temperature.fill_(n + 1)
            assert_same([plain(input_ids=ids(n))["logits"]], [graphs(input_ids=ids(n))["logits"]])
    assert "would be taken for a constant" in launched(graphs)


@pytest.mark.slow
def test_a_model_elsewhere_is_told_that_nothing_is_recorded(monkeypatch):
    monkeypatch.setattr(lower, "device_of", lambda gm: None)
    graphs = made("reduce-overhead")
    loss_of(graphs, 0)
    assert launched(graphs) == "not recorded: the parameters are not all on one CUDA device"


@pytest.mark.slow
def test_what_fails_to_record_runs_as_it_is(monkeypatch):
    plain, graphs = both()
    monkeypatch.setattr(Recorder, "record", lambda self, body: 1 / 0)
    assert_same(*(trained(each, loss_of) for each in (plain, graphs)))
    assert launched(graphs) == "not recorded: ZeroDivisionError: division by zero"


@pytest.mark.slow
def test_a_backward_that_fails_to_record_runs_as_it_is(monkeypatch):
    plain, graphs = both(dropout=0.3)
    record, calls = Recorder.record, []

    def forward_alone(self, body):
        calls.append(body)
        return record(self, body) if len(calls) == 1 else 1 / 0

    monkeypatch.setattr(Recorder, "record", forward_alone)
    assert_same(*(trained(each, loss_of) for each in (plain, graphs)))
    assert launched(graphs) == "not recorded: ZeroDivisionError: division by zero"


@pytest.mark.slow
def test_nothing_is_compiled_while_recording(monkeypatch):
    """What is compiled is tried out on the device, and that cannot be recorded."""
    monkeypatch.setattr(Backend, "records", True)
    monkeypatch.setattr(Recorder, "record", lambda self, body: (body(), lambda: None))
    lora = made(None, model=layers, backend="aot_eager")
    for n in range(3):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = lora(input_ids=ids(n), labels=ids(n))["loss"]
        loss.backward()
        if n == 0:
            compiled = lora.explain().compiled
    assert launched(lora) == "2 replayed" and lora.explain().compiled == compiled


def test_modes():
    """CUDA graphs are lorafx's own: Inductor is told the rest of a mode, and an eager graph needs no Inductor."""
    assert Backend("eager", "reduce-overhead").records and Backend("eager", "reduce-overhead").settings == {}
    tuned = Backend("inductor", "max-autotune")
    assert tuned.records and tuned.settings["max_autotune"] and "triton.cudagraphs" not in tuned.settings
    assert not Backend("inductor", "max-autotune-no-cudagraphs").records and not Backend().records
    with pytest.raises(ConfigError, match="backend='eager' has none"):
        Backend("eager", "max-autotune")

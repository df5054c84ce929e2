"""CUDA graphs: a replayed call is the call, and what cannot be replayed is not.

By tapes on a CPU, where it is the same bits; on a GPU, where there is one, by CUDA graphs. There rounding differs with
dropout, whose mask is kept by a recording and drawn again by a call that runs as it is: sums of at most 96 products.
"""

import threading

import pytest
import torch
from models import llama
from tape import TapeDevice
from transformers import DynamicCache, StaticCache

import lorafx
from lorafx.errors import ConfigError
from lorafx.lowering import lower
from lorafx.lowering.backend import Backend
from lorafx.lowering.cuda_graphs import Cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Recorder = Cuda if DEVICE == "cuda" else TapeDevice


@pytest.fixture(autouse=True)
def taped(monkeypatch):
    """Without a GPU every graph can be recorded, on a tape."""
    if DEVICE == "cpu":
        monkeypatch.setattr(lower, "device_of", lambda gm: torch.device("cpu"))
        monkeypatch.setattr(lower, "Cuda", TapeDevice)


def made(mode, dropout=0.0, **options):
    """An adapted model with values in B, the same each time."""
    config = {"r": 2, "target_modules": ["q_proj", "down_proj"], "lora_dropout": dropout, "init_lora_weights": False}
    options = {"backend": "eager", "mode": mode, "random_state": 0, **options}
    return lorafx.compile(llama().to(DEVICE), config, **options).train()


def both(**options):
    """The model without and with CUDA graphs."""
    return made(None, **options), made("reduce-overhead", **options)


def launched(lora) -> str:
    """What is said of the kind of call that came last."""
    return lora.explain().calls[-1].cuda_graph


def ids(seed: int, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 90, (2, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def gradients(lora) -> list[torch.Tensor]:
    return [p.grad for p in lora.parameters() if p.requires_grad]


def assert_same(one: list, other: list) -> None:
    assert len(one) == len(other) > 0
    limit = 0 if DEVICE == "cpu" else 96 * torch.finfo(torch.float32).eps
    for a, b in zip(one, other):
        assert (a - b).abs().max() <= limit * a.abs().max()


def trained(lora, losses, steps: int = 5) -> list[torch.Tensor]:
    """What some steps give: `losses(lora, step)` is what is trained on; gradients add up over two steps."""
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.1)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = losses(lora, step)
        loss.backward()
        found += [loss.detach(), *(g.clone() for g in gradients(lora) if g is not None)]
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_the_same_bits(dropout):
    """With gradients that add up over steps, an optimizer that writes to parameters, and dropout's own numbers."""
    plain, graphs = both(dropout=dropout)
    found = [trained(each, lambda lora, n: lora(input_ids=ids(n), labels=ids(n)).loss) for each in (plain, graphs)]
    assert_same(*found)
    assert launched(graphs) == "4 replayed" and launched(plain) == ""


def test_logits_that_nobody_asked_for_wait_as_they_do_without():
    plain, graphs = both()
    for n in range(4):
        outputs = [lora(input_ids=ids(n), labels=ids(n)) for lora in (plain, graphs)]
        for output in outputs:
            output.loss.backward()
        assert_same(*([output.logits + 0] for output in outputs))
        if n == 2:
            for lora in (plain, graphs):
                lora.merge_adapter()
                lora.unmerge_adapter()


def test_outputs_are_the_callers_own():
    """A later replay writes over nothing that an earlier one has given: outputs, gradients, logits that wait."""
    _, graphs = both()
    for n in range(3):
        output = graphs(input_ids=ids(n), labels=ids(n))
        output.loss.backward()
    loss, grads = output.loss.detach().clone(), [g.clone() for g in gradients(graphs)]
    held = gradients(graphs)
    graphs.zero_grad()
    other = graphs(input_ids=ids(7), labels=ids(7))
    other.loss.backward()
    assert output.loss == loss != other.loss
    assert_same(held, grads)
    assert_same([output.logits + 0], [made(None)(input_ids=ids(2)).logits])


def test_two_calls_before_a_backward():
    """The second runs as it is, for the first one's backward needs what it kept."""
    plain, graphs = both()

    def losses(lora, n):
        return 2 * lora(input_ids=ids(n), labels=ids(n)).loss + lora(input_ids=ids(n), labels=ids(n + 9)).loss

    assert_same(*(trained(each, losses) for each in (plain, graphs)))
    assert launched(graphs) == "4 replayed"  # of ten calls


def test_a_call_whose_backward_never_comes_keeps_nobody_waiting():
    _, graphs = both()
    for n in range(3):
        graphs(input_ids=ids(n), labels=ids(n)).loss.backward()
    for n in range(3):
        graphs(input_ids=ids(n), labels=ids(n))
    assert launched(graphs) == "5 replayed"


def test_gradients_of_other_outputs_than_before():
    """Backward is recorded for the loss; where logits have a gradient too, the call is computed again."""
    plain, graphs = both(dropout=0.3)

    def losses(lora, n):
        output = lora(input_ids=ids(n), labels=ids(n))
        return output.loss + output.logits.square().mean() if n == 3 else output.loss

    assert_same(*(trained(each, losses) for each in (plain, graphs)))


def test_gradients_of_inputs():
    plain, graphs = both()
    for n in range(4):
        values = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(n)).to(DEVICE)
        embeds = [values.clone().requires_grad_() for _ in range(2)]
        for lora, each in zip((plain, graphs), embeds):
            lora(inputs_embeds=each).logits.square().mean().backward()
        assert_same(*([each.grad, *gradients(lora)] for lora, each in zip((plain, graphs), embeds)))
    assert launched(graphs) == "3 replayed"


def test_what_is_frozen_or_moved_is_recorded_again():
    plain, graphs = both()

    def losses(lora, n):
        first = next(p for p in lora.parameters() if p.requires_grad or p.ndim == 7)
        if n == 3:
            first.requires_grad_(False)
        if n == 6:
            with torch.no_grad():
                weight = lora.get_parameter("model.layers.0.self_attn.k_proj.weight")
                weight.data = weight.data * 1.5
        return lora(input_ids=ids(n), labels=ids(n)).loss

    assert_same(*(trained(each, losses, steps=9) for each in (plain, graphs)))


def test_a_second_backward_is_refused():
    _, graphs = both()
    for n in range(3):
        loss = graphs(input_ids=ids(n), labels=ids(n)).loss
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time through a call that was replayed"):
        loss.backward()


def test_checkpointed_layers_are_replayed_unless_they_draw():
    plain, graphs = both(gradient_checkpointing=True)
    assert_same(
        *(trained(each, lambda lora, n: lora(input_ids=ids(n), labels=ids(n)).loss) for each in (plain, graphs))
    )
    assert launched(graphs) == "4 replayed"
    drawing = both(gradient_checkpointing=True, dropout=0.3)
    assert_same(*(trained(each, lambda lora, n: lora(input_ids=ids(n), labels=ids(n)).loss) for each in drawing))
    assert "draw random numbers" in launched(drawing[1])


@pytest.mark.filterwarnings("ignore:.*offload")
def test_what_waits_on_the_host_is_not_recorded():
    lora = made("reduce-overhead", gradient_checkpointing="offload")
    for n in range(3):
        lora(input_ids=ids(n), labels=ids(n)).loss.backward()
    assert launched(lora) == "not recorded: layers' inputs wait in the host's memory"


def decoded(lora, cache, tokens: int) -> list[torch.Tensor]:
    """Logits of tokens one by one, after a prefix of four."""
    lora(input_ids=torch.arange(4, device=DEVICE)[None], past_key_values=cache, use_cache=True)
    found = []
    for at in range(4, 4 + tokens):
        one = torch.tensor([[at]], device=DEVICE)
        output = lora(input_ids=one, position_ids=one, past_key_values=cache, use_cache=True)
        assert output.past_key_values is cache
        found.append(output.logits)
    return found


@pytest.mark.parametrize("modes", [torch.no_grad, torch.inference_mode])
def test_static_caches_are_filled_where_they_are(modes):
    """A second cache is recorded anew, and the first one stays as it was."""
    plain, graphs = (lora.eval() for lora in both())
    with modes():
        caches = [StaticCache(config=plain.config, max_cache_len=12) for _ in range(3)]
        expected = decoded(plain, caches[0], 5)
        assert_same(expected, decoded(graphs, caches[1], 5))
        kept = caches[1].layers[0].keys.clone()
        assert_same(expected, decoded(graphs, caches[2], 5))
    assert torch.equal(kept, caches[1].layers[0].keys) and torch.equal(kept, caches[0].layers[0].keys)
    assert launched(graphs) == "8 replayed"


def test_sizes_that_keep_changing_are_not_recorded(monkeypatch):
    monkeypatch.setattr("lorafx.lowering.cuda_graphs.replayed._TRIES", 3)
    plain, graphs = (lora.eval() for lora in both())
    with torch.no_grad():
        assert_same(decoded(plain, DynamicCache(), 6), decoded(graphs, DynamicCache(), 6))
    assert launched(graphs) == "not recorded: 3 calls had 3 different sizes"


def test_sizes_that_come_again_have_recordings_each():
    plain, graphs = both()
    lengths = [5, 9, 5, 9, 7, 9, 5]

    def losses(lora, n):
        tokens = ids(n, lengths[n])
        return lora(input_ids=tokens, labels=tokens).loss

    assert_same(*(trained(each, losses, steps=len(lengths)) for each in (plain, graphs)))
    assert launched(graphs) == "4 replayed"


def test_threads_take_turns():
    plain, graphs = (lora.eval() for lora in both())
    found = {}

    def work(n):
        with torch.no_grad():
            found[n] = [graphs(input_ids=ids(n + step)).logits for step in range(6)]

    with torch.no_grad():
        for _ in range(2):
            graphs(input_ids=ids(0))
        expected = {n: [plain(input_ids=ids(n + step)).logits for step in range(6)] for n in range(3)}
    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(3):
        assert_same(expected[n], found[n])


def test_what_fails_to_record_runs_as_it_is(monkeypatch):
    plain, graphs = both()
    monkeypatch.setattr(Recorder, "record", lambda self, body: 1 / 0)
    assert_same(
        *(trained(each, lambda lora, n: lora(input_ids=ids(n), labels=ids(n)).loss) for each in (plain, graphs))
    )
    assert launched(graphs) == "not recorded: ZeroDivisionError: division by zero"


def test_a_backward_that_fails_to_record_runs_as_it_is(monkeypatch):
    plain, graphs = both(dropout=0.3)
    record, calls = Recorder.record, []

    def forward_alone(self, body):
        calls.append(body)
        return record(self, body) if len(calls) == 1 else 1 / 0

    monkeypatch.setattr(Recorder, "record", forward_alone)
    assert_same(
        *(trained(each, lambda lora, n: lora(input_ids=ids(n), labels=ids(n)).loss) for each in (plain, graphs))
    )
    assert launched(graphs) == "not recorded: ZeroDivisionError: division by zero"


def test_under_autocast():
    plain, graphs = both()

    def losses(lora, n):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return lora(input_ids=ids(n), labels=ids(n)).loss

    assert_same(*(trained(each, losses) for each in (plain, graphs)))
    assert launched(graphs) == "4 replayed"


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_compiled_while_recording(monkeypatch, autocast):
    """What is compiled is tried out on the device, and that cannot be recorded."""
    monkeypatch.setattr(Backend, "records", True)
    monkeypatch.setattr(Recorder, "record", lambda self, body: (body(), lambda: None))
    lora = made(None, backend="aot_eager")
    for n in range(3):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            loss = lora(input_ids=ids(n), labels=ids(n)).loss
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


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_memory_is_taken_back_with_the_last_recording():
    """torch forgets a pool with the last recording in it; the next one begins another."""
    device = Cuda(torch.device("cuda", 0))
    x = torch.ones(3, device="cuda")
    for n in range(3):
        result, launch = device.record(lambda n=n: x * n)
        launch()
        assert result.tolist() == [n] * 3
        del result, launch

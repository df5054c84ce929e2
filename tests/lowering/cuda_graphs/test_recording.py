"""Recordings: what a replayed call gives is what the call gives, and the caller's own."""

import pytest
import torch
from modules import cases
from replays import DEVICE, Tiny, assert_same, both, decoded, gradients, ids, launched, layers, loss_of, made, trained
from torch import nn
from transformers import StaticCache

import lorafx
from lorafx.ops.cpu import half_precision


@pytest.mark.parametrize("dropout", cases([0.0, 0.3], quick=[0.3]))
def test_training_is_the_same_bits(dropout):
    """With gradients that add up over steps, an optimizer that writes to parameters, and dropout's own numbers."""
    plain, graphs = both(dropout=dropout)
    found = [trained(each, loss_of) for each in (plain, graphs)]
    assert_same(*found)
    assert launched(graphs) == "4 replayed" and launched(plain) == ""


@pytest.mark.slow
def test_logits_that_nobody_asked_for_wait_as_they_do_without():
    plain, graphs = both()
    for n in range(4):
        outputs = [lora(input_ids=ids(n), labels=ids(n)) for lora in (plain, graphs)]
        for output in outputs:
            output["loss"].backward()
        assert_same(*([output["logits"] + 0] for output in outputs))
        if n == 2:
            for lora in (plain, graphs):
                lora.merge_adapter()
                lora.unmerge_adapter()


@pytest.mark.slow
def test_outputs_are_the_callers_own():
    """A later replay writes over nothing that an earlier one has given: outputs, gradients, logits that wait."""
    _, graphs = both()
    for n in range(3):
        output = graphs(input_ids=ids(n), labels=ids(n))
        output["loss"].backward()
    loss, grads = output["loss"].detach().clone(), [g.clone() for g in gradients(graphs)]
    held = gradients(graphs)
    graphs.zero_grad()
    other = graphs(input_ids=ids(7), labels=ids(7))
    other["loss"].backward()
    assert output["loss"] == loss != other["loss"]
    assert_same(held, grads)
    assert_same([output["logits"] + 0], [made(None)(input_ids=ids(2))["logits"]])


@pytest.mark.slow
def test_gradients_of_other_outputs_than_before():
    """Backward is recorded for the loss; where logits have a gradient too, the call is computed again."""
    plain, graphs = both(dropout=0.3)

    def losses(lora, n):
        output = lora(input_ids=ids(n), labels=ids(n))
        return output["loss"] + output["logits"].square().mean() if n == 3 else output["loss"]

    assert_same(*(trained(each, losses) for each in (plain, graphs)))


@pytest.mark.slow
def test_gradients_of_inputs():
    plain, graphs = both()
    for n in range(4):
        values = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(n)).to(DEVICE)
        embeds = [values.clone().requires_grad_() for _ in range(2)]
        for lora, each in zip((plain, graphs), embeds):
            lora(inputs_embeds=each)["logits"].square().mean().backward()
        assert_same(*([each.grad, *gradients(lora)] for lora, each in zip((plain, graphs), embeds)))
    assert launched(graphs) == "3 replayed"


@pytest.mark.slow
def test_what_is_frozen_or_moved_is_recorded_again():
    plain, graphs = both()

    def losses(lora, n):
        first = next(p for p in lora.parameters() if p.requires_grad or p.ndim == 7)
        if n == 3:
            first.requires_grad_(False)
        if n == 6:
            with torch.no_grad():
                weight = lora.get_parameter("head.weight")
                weight.data = weight.data * 1.5
        return lora(input_ids=ids(n), labels=ids(n))["loss"]

    assert_same(*(trained(each, losses, steps=9) for each in (plain, graphs)))


@pytest.mark.slow
def test_a_second_backward_is_refused():
    _, graphs = both()
    for n in range(3):
        loss = graphs(input_ids=ids(n), labels=ids(n))["loss"]
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time through a call that was replayed"):
        loss.backward()


@pytest.mark.slow
@torch.inference_mode()
def test_static_caches_are_filled_where_they_are():
    """A second cache is recorded anew, and the first one stays as it was."""
    plain, graphs = (lora.eval() for lora in both(model=layers))
    caches = [StaticCache(config=plain.config, max_cache_len=12) for _ in range(3)]
    expected = decoded(plain, caches[0], 5)
    assert_same(expected, decoded(graphs, caches[1], 5))
    kept = caches[1].layers[0].keys.clone()
    assert_same(expected, decoded(graphs, caches[2], 5))
    assert torch.equal(kept, caches[1].layers[0].keys) and torch.equal(kept, caches[0].layers[0].keys)
    assert launched(graphs) == "8 replayed"


@pytest.mark.slow
def test_under_autocast(monkeypatch):
    # A recording on a CPU cannot go by way of float32 where half precision is slow, so that nothing may here.
    monkeypatch.setattr(half_precision, "multiplies", lambda dtype: True)
    plain, graphs = both()

    def losses(lora, n):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return lora(input_ids=ids(n), labels=ids(n))["loss"]

    assert_same(*(trained(each, losses) for each in (plain, graphs)))
    assert launched(graphs) == "4 replayed"


class Normed(Tiny):
    """With a batch norm, and a plain tensor below the root that scales the logits."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(48), nn.Module()
        self.inner.factor = torch.tensor(2.0, device=DEVICE)

    def forward(self, input_ids, labels=None):
        x = self.norm(self.embedding(input_ids).mT).mT
        return super().forward(inputs_embeds=x * self.inner.factor, labels=labels)


@pytest.mark.slow
def test_statistics_are_written_once_a_call():
    """Also where gradients of other outputs have the call computed again."""
    plain, graphs = both(model=Normed)

    def losses(lora, n):
        output = lora(input_ids=ids(n), labels=ids(n))
        return output["loss"] + output["logits"].square().mean() if n == 3 else output["loss"]

    assert_same(*(trained(each, losses) for each in (plain, graphs)))
    assert_same(*([buffer.float() for buffer in each.buffers()] for each in (plain, graphs)))
    assert launched(graphs) == "4 replayed"


@pytest.mark.slow
def test_a_plain_attribute_is_read_as_it_is_now():
    plain, graphs = both(model=Normed)

    def losses(lora, n):
        if n == 3:
            lora.inner.factor = torch.tensor(5.0, device=DEVICE)
        return loss_of(lora, n)

    assert_same(*(trained(each, losses) for each in (plain, graphs)))


@pytest.mark.slow
def test_a_tied_parameter_has_its_gradient_once():
    plain, graphs = both(model=Squares)
    for lora in (plain, graphs):
        lora.down_proj.lora_A.default.weight = lora.q_proj.lora_A.default.weight
    assert_same(*(trained(each) for each in (plain, graphs)))
    assert launched(graphs) == "4 replayed"


class Squares(Tiny):
    def __init__(self):
        super().__init__()
        self.q_proj, self.down_proj = nn.Linear(48, 48), nn.Linear(48, 48)


def change_an_adapter(lora):
    lora.q_proj.lora_A.default.weight.mul_(2)


WRITES = [change_an_adapter, lorafx.AdaptedModel.merge_adapter]


@pytest.mark.slow
@pytest.mark.parametrize("write", cases(WRITES, quick=[change_an_adapter]))
def test_backward_after_a_parameter_was_written_to_is_refused(write):
    """Autograd refuses it, too: gradients would be those of other values than forward had."""
    for lora in both():
        for n in range(3):
            loss = loss_of(lora, n)
            if n == 2:
                with torch.no_grad():
                    write(lora)
                with pytest.raises(RuntimeError, match=r"modified by an inplace|were written to since"):
                    loss.backward()
            else:
                loss.backward()


@pytest.mark.slow
def test_a_second_derivative_is_refused():
    """It would count as zero, and a penalty on gradients have no effect."""
    _, graphs = both()
    trained(graphs, steps=3)
    found = torch.autograd.grad(loss_of(graphs, 3), trainable(graphs), create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in found)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (loss_of(graphs, 4) + penalty).backward()


@pytest.mark.slow
def test_several_gradients_at_once():
    plain, graphs = both()
    for n in range(3):
        sums = [lora(input_ids=ids(n))["logits"].sum((0, 1)) for lora in (plain, graphs)]
        each = torch.eye(90, device=DEVICE)
        found = [
            torch.autograd.grad(total, trainable(lora), each, is_grads_batched=True)
            for total, lora in zip(sums, (plain, graphs))
        ]
        assert_same(*map(list, found))


def trainable(lora) -> list[nn.Parameter]:
    return [p for p in lora.parameters() if p.requires_grad]


class Counting(Tiny):
    """Counts its calls in a tensor that it is given, and reads the count from another."""

    def forward(self, input_ids, count, total):
        count.add_(1)
        return super().forward(input_ids)["logits"] + total.sum()


@pytest.mark.slow
def test_an_argument_that_shares_memory_with_a_written_one():
    plain, graphs = (lora.eval() for lora in both(model=Counting))
    results = []
    for lora in (plain, graphs):
        memory = torch.zeros(6, device=DEVICE)
        with torch.no_grad():
            found = [lora(ids(n), memory[:4], memory[2:]) for n in range(4)]
            results.append(found + [lora(ids(n), memory[:4], memory[2:].clone()) for n in range(4)])
    assert_same(*results)
    assert launched(graphs) == "6 replayed"

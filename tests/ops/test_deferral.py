"""deferral: logits that a fused loss does without wait until somebody asks for them."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from losses import EPS, Own, assert_equal, both, outcome, shifted, times_asked
from modules import cases

from lorafx.errors import DeferredError
from lorafx.ops.deferral import Deferred


def made():
    """A model whose logits wait, a call of it, and the logits of the same model without the pass."""
    lora, plain = both(Own(shifted), ["inner", "head"])
    ids = torch.randint(0, 13, (3, 8))
    return lora, ids, plain(ids, ids)[1].detach()


@pytest.fixture(scope="module")
def shared():
    return made()


@pytest.fixture
def waiting(shared):
    """What all tests use that count no calls: its graphs are captured once, and its values put back."""
    lora, ids, expected = shared
    before = {name: value.clone() for name, value in lora.state_dict().items()}
    yield lora.train(), ids, expected
    lora.unmerge_adapter()
    lora.load_state_dict(before)
    lora.zero_grad()


@pytest.mark.slow
def test_what_is_known_without_computing():
    lora, ids, expected = made()
    logits = lora(ids, ids)[1]
    assert isinstance(logits, torch.Tensor) and logits.requires_grad and not logits.is_leaf
    cast = logits.float().to(torch.bfloat16).detach()
    assert (cast.dtype, cast.requires_grad, type(cast)) == (torch.bfloat16, False, Deferred)
    for known in (logits, cast):
        assert (known.shape, known.size(-1), known.dim(), len(known)) == (expected.shape, 13, 3, 3)
        assert known.device == expected.device and known.numel() == expected.numel() and known in {known: 1}
    assert times_asked(lora) == "fused"
    assert torch.equal(logits, expected)
    assert torch.equal(cast, expected.bfloat16()) and logits.argmax(-1).shape == (3, 8)
    assert times_asked(lora) == "fused; logits asked for 1 time"
    lora(ids, ids)[1].sum()
    assert "asked for 2 times" in str(lora.explain())


@pytest.mark.slow
def test_all_that_is_done_with_tensors(tmp_path, waiting):
    lora, ids, expected = waiting

    def logits():
        with torch.no_grad():
            return lora(ids, ids)[1]

    assert (logits().numpy() == expected.numpy()).all() and logits().tolist() == expected.tolist()
    assert type(copy.deepcopy(logits())) is torch.Tensor
    torch.save({"logits": logits()}, tmp_path / "saved")
    assert torch.equal(torch.load(tmp_path / "saved")["logits"], expected)
    assert str(logits()) == str(expected) and torch.equal(logits()[0, :, 1], expected[0, :, 1])
    assert (logits() == expected).all() and torch.equal(torch.cat([logits()] * 2), torch.cat([expected] * 2))
    assert torch.equal(logits().type(torch.float64), expected.double()) and logits().data_ptr()
    changed = logits()
    changed /= 2.0
    assert torch.equal(changed, expected / 2)
    changed = logits()
    changed[0] = 0
    assert not changed[0].any() and torch.equal(changed[1:], expected[1:])


@pytest.mark.slow
def test_gradients_through_logits():
    lora, plain = both(Own(shifted), ["inner", "head"])
    ids = torch.randint(0, 13, (3, 8))
    ours, theirs = (outcome(each, ids, ids, through_logits=True) for each in (lora, plain))
    assert_equal(ours, theirs, EPS)


class Sink(torch.autograd.Function):
    """What takes gradients below torch's functions, as DistributedDataParallel does."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda t: t, lambda t: t.double()], ids=["itself", "cast"])
def test_gradients_of_who_does_not_ask_torch(change, waiting):
    lora, ids, _ = waiting
    parameters = [p for p in lora.parameters() if p.requires_grad]
    through, direct = lora(ids, ids)[1], lora(ids, ids)[1]
    found = torch.autograd.grad(Sink.apply(change(through)).sum(), parameters)
    wanted = torch.autograd.grad(direct.sum(), parameters)
    assert all(torch.allclose(f, w, rtol=1e-5) for f, w in zip(found, wanted, strict=True))


@pytest.mark.slow
def test_logits_after_a_step_are_an_error(waiting):
    lora, ids, before = waiting
    logits, read = lora(ids, ids)[1], lora(ids, ids)[1]
    assert torch.equal(read, before)
    with torch.no_grad():
        lora.head.lora_B.default.weight.mul_(2)
    with pytest.raises(DeferredError, match="written to since"):
        logits.sum()
    assert torch.equal(read, before)


@pytest.mark.slow
@pytest.mark.parametrize("detach", [False, True])
def test_merging_computes_what_waits_first(detach, waiting):
    lora, ids, before = waiting
    logits = lora(ids, ids)[1]
    logits = logits.detach() if detach else logits
    lora.merge_adapter()
    assert torch.equal(logits, before)


def test_merging_leaves_what_is_too_late_for(waiting):
    """As a training loop leaves it behind, whose last outputs are still there."""
    lora, ids, _ = waiting
    logits = lora(ids, ids)[1]
    with torch.no_grad():
        lora.head.lora_B.default.weight.mul_(2)
    lora.merge_adapter()
    lora.unmerge_adapter()
    with pytest.raises(DeferredError):
        logits.sum()


@pytest.mark.parametrize("ask", [lambda t: t.retain_grad(), lambda t: t.register_hook(print)])
def test_no_gradient_flows_through_logits_that_the_loss_did_without(ask, waiting):
    lora, ids, _ = waiting
    with pytest.raises(DeferredError, match="without logits"):
        ask(lora(ids, ids)[1])


@pytest.mark.parametrize("read", [False, True])
def test_detached_logits_keep_no_history(read, waiting):
    lora, ids, expected = waiting
    loss, logits = lora(ids, ids)
    graph = weakref.ref(logits.grad_fn)
    kept = logits.detach()
    assert not read or torch.equal(kept, expected)
    del loss, logits
    gc.collect()
    assert graph() is None and torch.equal(kept, expected)


@pytest.mark.slow
@pytest.mark.parametrize("off", cases([torch.no_grad, torch.inference_mode], quick=[torch.no_grad]))
def test_evaluation(off, waiting):
    lora, ids, expected = waiting
    with off():
        loss, logits = lora.eval()(ids, ids)
    assert not loss.requires_grad and not logits.requires_grad
    assert (logits - expected).abs().max() <= 1e-6 and not (logits + 0).requires_grad


@pytest.mark.slow
def test_under_autocast_logits_wait_in_its_dtype(waiting):
    lora, ids, _ = waiting
    plain = both(Own(shifted), ["inner", "head"])[1]
    plain.load_state_dict(lora.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logits = lora(ids, ids)
        expected_loss, expected = plain(ids, ids)
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, expected)
    assert abs(loss - expected_loss) <= 2**-7 * abs(expected_loss)


@pytest.mark.slow
def test_copies_and_merging():
    lora, ids, expected = made()
    lora(ids, ids)
    assert torch.equal(copy.deepcopy(lora)(ids, ids)[1], expected)
    before = lora(ids, ids)[1]
    lora.merge_adapter()
    assert torch.equal(before, expected)  # and not the update twice
    logits = lora(ids, ids)[1]
    assert (logits - expected).abs().max() <= 1e-5 and len(lora.explain().calls) == 2
    merged = lora(ids, ids)[1]
    lora.unmerge_adapter()
    assert torch.equal(merged, logits)
    with lora.disable_adapter():
        assert (lora(ids, ids)[1] - expected).abs().max() > 1e-3

"""fuse_loss: a head and its loss are one operator without logits; those that the graph gives wait until asked for."""

from __future__ import annotations

import copy
import gc
import sys
import weakref

import models
import peft
import pytest
import torch
import transformers
from graphs import adapted, text
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lorafx
from lorafx.errors import DeferredError
from lorafx.graph.printing import graph_lines
from lorafx.lowering.backend import Backend
from lorafx.ops.cpu import products
from lorafx.ops.deferred import Deferred

fused = torch.ops.lorafx.linear_cross_entropy
module = sys.modules["lorafx.ops.linear_cross_entropy"]  # the package has the function under this name
V, EPS = models.VOCABULARY, torch.finfo(torch.float32).eps


class Largest(TorchDispatchMode):
    """The most elements that a tensor had which an operator gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


# --- the pass --------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """(…, tokens) ids -> loss and logits, with a loss of one's own."""

    def __init__(self, loss, bias=True):
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(13, 4), nn.Linear(4, 6), nn.Linear(6, 13, bias=bias)
        self.loss = loss

    def forward(self, ids, labels):
        logits = self.head(torch.tanh(self.inner(self.embedding(ids))))
        return self.loss(logits, labels)


def shifted(logits, labels):
    return F.cross_entropy(logits[:, :-1].reshape(-1, 13), labels[:, 1:].reshape(-1)), logits


FUSED = {
    "flat": lambda logits, labels: (F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1)), logits),
    "shifted": shifted,
    "shifted in float64": lambda logits, labels: shifted(logits.double(), labels),
    "every second": lambda logits, labels: F.cross_entropy(
        logits[1:, ::2].contiguous().flatten(0, 1).view(-1, 13), labels[1:, ::2].reshape(-1), reduction="sum"
    ),
    "classes second": lambda logits, labels: F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=3),
    "capped": lambda logits, labels: shifted(torch.tanh(logits / 2.0) * 2.0, labels),
    "scaled, capped": lambda logits, labels: shifted(torch.tanh(logits * 3.0 / 2.0) * 2.0, labels),
    "smoothed": lambda logits, labels: F.cross_entropy(logits.view(-1, 13), labels.view(-1), label_smoothing=0.1),
}
LEFT = {
    "not reduced": lambda logits, labels: F.cross_entropy(logits.view(-1, 13), labels.view(-1), reduction="none"),
    "class weights": lambda logits, labels: F.cross_entropy(logits.view(-1, 13), labels.view(-1), torch.ones(13)),
    "no class numbers": lambda logits, labels: F.cross_entropy(
        logits.view(-1, 13), F.one_hot(labels.view(-1), 13).float()
    ),
    "also used by": lambda logits, labels: shifted(logits, labels)[0] + logits.square().mean(),
    "another shape": lambda logits, labels: (F.cross_entropy(flat := logits.view(-1, 13), labels.view(-1)), flat),
    "come from aten.select": lambda logits, labels: F.cross_entropy(logits[0], labels[0]),
    "come from aten.relu": lambda logits, labels: F.cross_entropy(logits.relu().view(-1, 13), labels.view(-1)),
    "come from aten.to": lambda logits, labels: shifted(logits.bfloat16().float(), labels),
}


def both(model, targets, **options):
    """The model with and without the pass, the same adapter on it."""
    pipeline = lorafx.passes.default
    return [
        lorafx.compile(
            copy.deepcopy(model),
            {"r": 2, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False},
            pipeline=chosen,
            random_state=0,
            **options,
        ).train()
        for chosen in (pipeline, pipeline.without("fuse_loss"))
    ]


def outcome(lora, *args, through_logits=False, **kwargs):
    """Loss, logits (or None), gradients of what trains."""
    lora.zero_grad()
    result = lora(*args, **kwargs)
    loss, logits = (result, None) if torch.is_tensor(result) else (result[0], result[1])
    (loss + (logits.float().square().mean() if through_logits else 0)).backward()
    return loss.detach(), logits, {n: p.grad.clone() for n, p in lora.named_parameters() if p.grad is not None}


def assert_equal(ours, theirs, eps, factor=64):
    assert abs(ours[0] - theirs[0]) <= factor * eps * abs(theirs[0])
    assert ours[2].keys() == theirs[2].keys() and ours[2]
    for name, gradient in theirs[2].items():
        assert (ours[2][name] - gradient).abs().max() <= factor * eps * gradient.abs().max(), name
    if theirs[1] is not None:
        assert (ours[1] - theirs[1]).abs().max() <= factor * eps * theirs[1].abs().max()


@pytest.mark.parametrize("targets", [["inner"], ["inner", "head"]], ids=["frozen head", "adapted head"])
@pytest.mark.parametrize("name", FUSED)
def test_losses_that_are_fused(name, targets):
    """float32; sums over at most 24 rows."""
    ids, labels = torch.randint(0, 13, (3, 8)), torch.randint(0, 13, (3, 8))
    ours, theirs = both(Own(FUSED[name]), targets)
    assert "linear_cross_entropy" in str(ours.graph(ids, labels))
    assert "linear_cross_entropy" not in str(theirs.graph(ids, labels))
    assert_equal(outcome(ours, ids, labels), outcome(theirs, ids, labels), EPS)


@pytest.mark.parametrize("name", LEFT)
def test_losses_that_stay(name):
    ids, labels = torch.randint(0, 13, (3, 8)), torch.randint(0, 13, (3, 8))
    ours, theirs = both(Own(LEFT[name]), ["inner", "head"])
    graph, before = (graph_lines(lora.graph(ids, labels)) for lora in (ours, theirs))
    assert graph == before
    (call,) = ours.explain().calls
    assert call.loss.startswith("not fused: ") and name in call.loss


def test_before_and_after(monkeypatch):
    monkeypatch.setattr(products, "mkl_leaves_avx512", lambda: False)  # or linear layers are lorafx's
    lora = adapted(Own(shifted), target_modules=["head"])
    ids = torch.randint(0, 13, (3, 8))
    lines = text(lora.graph(ids, ids.clone()))
    assert lines[lines.index("head_weight = head.weight") :] == [
        "head_weight = head.weight",
        "head_bias = head.bias",
        "head_lora_a_default_weight = head.lora_A.default.weight",
        "head_lora_b_default_weight = head.lora_B.default.weight",
        "slice_4 = slice.Tensor(labels, 1, 1, 9223372036854775807)",
        "reshape_1 = reshape(slice_4, [-1])",
        "slice_tensor = slice.Tensor(tanh, 1, 0, -1)",
        "linear_default = linear(slice_tensor, head_lora_a_default_weight)",
        "linear_cross_entropy = lorafx.linear_cross_entropy(slice_tensor, head_weight, head_bias, linear_default, "
        "head_lora_b_default_weight, 3.0, reshape_1)",
        "captured_head_0 = captured.head_0",
        "defer = defer(captured_head_0, torch.float32, tanh, head_weight, head_bias, head_lora_a_default_weight, "
        "head_lora_b_default_weight)",
        "captured.head_0, when asked for:",
        "    lora_linear = lorafx.lora_linear(tanh, head_weight, head_bias, None, head_lora_a_default_weight, "
        "head_lora_b_default_weight, 3.0)",
    ]


def test_no_tensor_is_as_large_as_the_logits(small_chunks):
    """Forward, backward and what waits: nothing of rows x classes elements is ever made."""
    lora, plain = both(Own(shifted), ["inner", "head"])
    ids = torch.randint(0, 13, (8, 9))  # 64 rows count
    for model, large in ((lora, False), (plain, True)):
        model(ids, ids)
        with Largest() as seen:
            model(ids, ids)[0].backward()
        assert (seen.elements >= 64 * 13) == large, seen.elements


# --- logits that wait ------------------------------------------------------------------------------------------------


def waiting(**kwargs):
    lora, plain = both(Own(shifted), ["inner", "head"], **kwargs)
    ids = torch.randint(0, 13, (3, 8))
    return lora, ids, plain(ids, ids)[1]


def times_asked(lora):
    (call,) = lora.explain().calls
    return call.loss


def test_what_is_known_without_computing():
    lora, ids, expected = waiting()
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


def test_all_that_is_done_with_tensors(tmp_path):
    lora, ids, expected = waiting()
    expected = expected.detach()

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


@pytest.mark.parametrize("change", [lambda t: t, lambda t: t.double()], ids=["itself", "cast"])
def test_gradients_of_who_does_not_ask_torch(change):
    lora, ids, _ = waiting()
    parameters = [p for p in lora.parameters() if p.requires_grad]
    through, direct = lora(ids, ids)[1], lora(ids, ids)[1]
    found = torch.autograd.grad(Sink.apply(change(through)).sum(), parameters)
    wanted = torch.autograd.grad(direct.sum(), parameters)
    assert all(torch.allclose(f, w, rtol=1e-5) for f, w in zip(found, wanted, strict=True))


def test_logits_after_a_step_are_an_error():
    lora, ids, before = waiting()
    logits, read = lora(ids, ids)[1], lora(ids, ids)[1]
    assert torch.equal(read, before)
    with torch.no_grad():
        lora.head.lora_B.default.weight.mul_(2)
    with pytest.raises(DeferredError, match="written to since"):
        logits.sum()
    assert torch.equal(read, before)


@pytest.mark.parametrize("detach", [False, True])
def test_merging_computes_what_waits_first(detach):
    lora, ids, before = waiting()
    logits = lora(ids, ids)[1]
    logits = logits.detach() if detach else logits
    lora.merge_adapter()
    assert torch.equal(logits, before)


def test_merging_leaves_what_is_too_late_for():
    """As a training loop leaves it behind, whose last outputs are still there."""
    lora, ids, _ = waiting()
    logits = lora(ids, ids)[1]
    with torch.no_grad():
        lora.head.lora_B.default.weight.mul_(2)
    lora.merge_adapter()
    lora.unmerge_adapter()
    with pytest.raises(DeferredError):
        logits.sum()


@pytest.mark.parametrize("ask", [lambda t: t.retain_grad(), lambda t: t.register_hook(print)])
def test_no_gradient_flows_through_logits_that_the_loss_did_without(ask):
    lora, ids, _ = waiting()
    with pytest.raises(DeferredError, match="without logits"):
        ask(lora(ids, ids)[1])


@pytest.mark.parametrize("read", [False, True])
def test_detached_logits_keep_no_history(read):
    lora, ids, expected = waiting()
    loss, logits = lora(ids, ids)
    graph = weakref.ref(logits.grad_fn)
    kept = logits.detach()
    assert not read or torch.equal(kept, expected)
    del loss, logits
    gc.collect()
    assert graph() is None and torch.equal(kept, expected)


def test_a_hidden_state_that_is_written_to_is_not_one_to_wait_with():
    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 13)

        def forward(self, x, labels):
            hidden = self.body(x)
            logits = self.head(hidden)
            loss = F.cross_entropy(logits, labels)
            hidden.zero_()
            return loss, logits

    model, x, labels = Reusing(), torch.randn(5, 4), torch.arange(5)
    lora = lorafx.compile(copy.deepcopy(model), {"target_modules": ["body"]})
    with torch.no_grad():
        for found, expected in zip(lora(x, labels), model(x, labels)):
            torch.testing.assert_close(torch.as_tensor(found), expected)
    assert "written in place" in str(lora.explain())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_evaluation(off):
    lora, ids, expected = waiting()
    with off():
        loss, logits = lora.eval()(ids, ids)
    assert not loss.requires_grad and not logits.requires_grad
    assert (logits - expected).abs().max() <= 1e-6 and not (logits + 0).requires_grad


def test_under_autocast_logits_wait_in_its_dtype():
    lora, ids, _ = waiting()
    plain = both(Own(shifted), ["inner", "head"])[1]
    plain.load_state_dict(lora.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logits = lora(ids, ids)
        expected_loss, expected = plain(ids, ids)
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, expected)
    assert abs(loss - expected_loss) <= 2**-7 * abs(expected_loss)


def test_copies_and_merging():
    lora, ids, expected = waiting()
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


# --- models, against PEFT --------------------------------------------------------------------------------------------

CAUSAL = {"vocab_size": V, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def causal(family, **overrides):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**CAUSAL, **HEADS, **overrides)
    return getattr(transformers, f"{family}ForCausalLM")(config)


MODELS = {
    "llama": models.llama,
    "gpt2": models.gpt2,
    "t5": models.t5,
    "gemma2": lambda: causal("Gemma2", head_dim=16, final_logit_softcapping=0.5),
    "granite": lambda: causal("Granite", logits_scaling=3.0),
    "cohere": lambda: causal("Cohere", logit_scale=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "tied": lambda: models.llama(tie_word_embeddings=True),
}


def against_peft(model, **config):
    """One adapter on two equal models."""
    settings = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear", "init_lora_weights": False, **config}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    ours = lorafx.compile(model, settings)
    state = {name.replace("base_model.model.", ""): value for name, value in theirs.state_dict().items()}
    own = ours.state_dict()
    missing = [name for name in own if name not in state and "base_layer" not in name]
    by_name = {name.replace(".base_layer", ""): value for name, value in state.items()}
    ours.load_state_dict({name: by_name.get(name, value) for name, value in own.items()})
    assert not [name for name in missing if "lora" in name]
    return ours.train(), theirs.train()


def named(outcome):
    loss, logits, found = outcome
    return loss, logits, {name.replace("base_model.model.", ""): gradient for name, gradient in found.items()}


def assert_as_peft(ours, theirs, factor=512, **call):
    """Two layers deep, sums over 18 rows and 90 classes, each rounded apart."""
    for through_logits in (False, True):
        mine = outcome(ours, **call, through_logits=through_logits)
        assert_equal(mine, named(outcome(theirs, **call, through_logits=through_logits)), EPS, factor)
    assert any("fused; logits asked for" in each.loss for each in ours.explain().calls)


def batch(rows=2, length=9):
    ids = torch.randint(3, V, (rows, length))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    ours, theirs = against_peft(MODELS[name]())
    assert_as_peft(ours, theirs, **batch())


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["adapted head", "trained head"],
)
def test_heads_that_train(config):
    ours, theirs = against_peft(models.llama(), **config)
    assert_as_peft(ours, theirs, **batch())


def test_number_of_items():
    ours, theirs = against_peft(models.llama())
    assert_as_peft(ours, theirs, **batch(), num_items_in_batch=7)
    assert_as_peft(ours, theirs, **batch(), num_items_in_batch=torch.tensor(11))


def test_dropout_before_an_adapted_head_is_that_of_the_logits():
    ours, _ = against_peft(models.llama(), target_modules=["lm_head"], lora_dropout=0.5)
    call = batch()
    loss, logits, *_ = ours(**call).to_tuple()
    again = F.cross_entropy(logits[:, :-1].reshape(-1, V), call["labels"][:, 1:].reshape(-1))
    assert torch.allclose(loss, again, rtol=1e-6)


def test_bfloat16():
    """Loss and logits agree to the dtype; gradients pass two layers of roundings of eps = 2⁻⁷."""
    ours, theirs = against_peft(models.llama().bfloat16(), target_modules=["q_proj", "v_proj"])
    call = batch()
    mine, other = outcome(ours, **call), named(outcome(theirs, **call))
    assert mine[0].dtype == other[0].dtype and abs(mine[0] - other[0]) <= 2**-7 * other[0]
    for name, gradient in other[2].items():
        assert (mine[2][name] - gradient).norm() <= 2**-5 * gradient.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("without", [(), ("outline_blocks", "checkpoint_blocks")], ids=["pieces", "whole"])
def test_lowered(backend, without):
    model, call = models.llama(), batch()
    ours = lorafx.compile(model, {"r": 4, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False})
    expected = outcome(ours, **call, through_logits=True)
    ours._lorafx.dispatcher.backend = Backend(backend)
    ours._lorafx.dispatcher.pipeline = lorafx.passes.default.without(*without)
    ours._lorafx.dispatcher.clear()
    found = outcome(ours, **call, through_logits=True)
    assert_equal(found, expected, EPS, 512)
    with torch.no_grad():
        before = times_asked(ours)
    lora_loss = ours(**batch(3, 7)).loss
    assert lora_loss.isfinite() and times_asked(ours) == before


@pytest.mark.slow
def test_trainer_never_asks_and_evaluation_does(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, V, (12, 9)).tolist()]
    lora = lorafx.compile(models.llama(), {"r": 4, "target_modules": "all-linear"})
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=True
    )
    trainer = transformers.Trainer(lora, arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    assert {call.loss for call in lora.explain().calls} == {"fused"}
    trainer.evaluate()
    assert {call.loss for call in lora.explain().calls} == {"fused"}
    predicted = trainer.predict(rows[:4])
    assert predicted.predictions.shape == (4, 9, V)
    assert any("asked for" in call.loss for call in lora.explain().calls)

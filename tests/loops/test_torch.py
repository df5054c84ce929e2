"""Plain PyTorch around an adapted model: loops, copies, pickles, dtypes, modes and transformers' own methods."""

import copy
import io
import pickle

import models
import pytest
import torch
from transformers.cache_utils import DynamicCache
from twins import trained, twins

import lorafx
from lorafx.capture.caches import is_cache

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated")


def adapted(family="mlp", **config):
    lora = lorafx.compile(
        getattr(models, family)(), {"r": 3, "target_modules": "all-linear", "init_lora_weights": False, **config}
    )
    return lora, models.call(lora)


def loss_of(model, inputs):
    output = models.run(model, inputs)
    return output.square().mean() if isinstance(output, torch.Tensor) else output.loss


def steps(model, inputs, *, count=4, dtype=None) -> list[float]:
    """Losses of a loop with a gradient scaler, with autocast if there is a dtype for it."""
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is not None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(count):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = loss_of(model, inputs)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 2e-5), (torch.float16, 5e-3)])
def test_a_plain_loop_trains_as_with_peft(tmp_path, dtype, tolerance):
    ours, theirs = twins(tmp_path)
    inputs = models.call("llama")
    frozen = {name: p.detach().clone() for name, p in ours.named_parameters() if not p.requires_grad}
    mine, other = steps(ours, inputs, dtype=dtype), steps(theirs, inputs, dtype=dtype)
    assert mine == pytest.approx(other, rel=tolerance) and mine[-1] < 0.97 * mine[0]
    assert trained(ours).keys() == trained(theirs).keys() and all(".default." in name for name in trained(ours))
    assert all(torch.equal(ours.get_parameter(name), value) for name, value in frozen.items())
    assert len(ours.explain().calls) == 1


@pytest.mark.slow
def test_a_state_dict_moves_all_that_there_is():
    lora, x = adapted()
    expected = lora(*x)
    file = io.BytesIO()
    torch.save(lora.state_dict(), file)
    file.seek(0)
    other, _ = adapted()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert not torch.equal(other(*x), expected)
    assert other.load_state_dict(
        torch.load(file, weights_only=True), strict=True
    ) == torch.nn.modules.module._IncompatibleKeys([], [])
    assert torch.equal(other(*x), expected)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(models.mlp().state_dict())
    assert {name for name in lora.state_dict() if "lora_" not in name} == set(models.mlp().state_dict())


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_process_that_has_only_loaded_a_model_knows_its_caches():
    file = pickle.dumps(lorafx.compile(models.mlp(), {"r": 2, "target_modules": "all-linear"}))

    class OfLater(DynamicCache):
        pass

    assert not is_cache(OfLater())
    pickle.loads(file)
    assert is_cache(OfLater())


def test_the_default_device_is_for_what_the_user_makes(tmp_path):
    """Not for what lorafx makes, which would have no values on the meta device."""

    def merged(base, device):
        torch.set_default_device(device)
        try:
            lora = lorafx.compile(base, config, random_state=0, capture="sites")
            lora.add_weighted_adapter(["default"] * 2, [0.5, 0.7], "b", "dare_linear", density=0.5, random_state=0)
            lora.save_pretrained(tmp_path)
            lora.load_adapter(tmp_path / "b", "c")
            lora.set_adapter(["default", "b", "c"])
            lora.merge_adapter()
            weights = {name: value.clone() for name, value in lora.state_dict().items()}
            lora.unmerge_adapter()
        finally:
            torch.set_default_device(None)
        return weights

    config = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False}
    expected, found = merged(models.mlp(), None), merged(models.mlp(), "meta")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved_and_loaded}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "how"), [*(("mlp", how) for how in COPIES), ("bert", "pickle")])
def test_a_copy_of_the_whole_model_computes_the_same_and_is_another(family, how):
    lora, x = adapted(family, bias="lora_only")
    lora.add_adapter("other", {"r": 2, "target_modules": "all-linear"})
    before = loss_of(lora, x).item()
    twin = COPIES[how](lora)
    assert type(twin) is type(lora) and loss_of(twin, x).item() == before
    assert str(twin.sites) == str(lora.sites) and list(twin.peft_config) == ["default", "other"]
    shared = {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in lora.parameters()}
    assert not shared and steps(twin, x) == pytest.approx(steps(copy.deepcopy(lora), x), rel=1e-6)
    assert loss_of(lora, x).item() == before != loss_of(twin, x).item()
    twin.merge_adapter()
    twin.unmerge_adapter()
    base = twin.unload()
    assert type(base) is type(models.FACTORIES[family]()) and not any("lora_" in name for name in base.state_dict())
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in lora.state_dict().items() if k in base.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float16, torch.float64))]
)
def test_dtypes_change_for_base_and_adapter_at_once(dtype):
    lora, (x,) = adapted()
    exact = lora(x)
    methods = {torch.bfloat16: lora.bfloat16, torch.float16: lora.half, torch.float64: lora.double}
    assert methods[dtype]() is lora and {p.dtype for p in lora.parameters()} == {dtype}
    low = lora(x.to(dtype))
    assert low.dtype is dtype
    torch.testing.assert_close(low.to(exact.dtype), exact, rtol=0, atol=20 * torch.finfo(torch.bfloat16).eps)
    low.sum().backward()
    assert all(p.grad is not None and p.grad.dtype is dtype for p in lora.parameters() if p.requires_grad)
    back = copy.deepcopy(lora).to(torch.float32)
    assert back(x).dtype is torch.float32
    torch.testing.assert_close(back(x), exact, rtol=0, atol=20 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.slow
def test_modes_of_the_model_and_of_one_part_are_followed():
    lora = lorafx.compile(models.mlp(dropout=0.5), {"r": 3, "target_modules": "all-linear", "lora_dropout": 0.5})
    x = torch.randn(64, 6)
    with torch.no_grad():
        plain = lora.eval()(x)
        assert torch.equal(lora(x), plain)
        lora.train()
        assert not torch.equal(lora(x), lora(x))
        assert lora.dropout.training and lora.train() is lora
        lora.dropout.eval()
        lora.get_submodule("up").eval()
        lora.get_submodule("down").eval()
        assert torch.equal(lora(x), plain)
        lora.dropout.train()
        assert not torch.equal(lora(x), plain)


@pytest.mark.slow
def test_transformers_own_methods():
    base = models.llama(num_hidden_layers=1)
    names, count = [name for name, _ in base.named_parameters()], base.num_parameters()
    lora = lorafx.compile(base, {"r": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False})
    own = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert [name for name, _ in lora.named_parameters() if "lora_" not in name] == names
    assert lora.num_parameters() == count + own and lora.num_parameters(only_trainable=True) == own
    assert lora.get_input_embeddings().weight is base.get_input_embeddings().weight
    assert lora.get_output_embeddings().weight is base.lm_head.weight
    assert lora.get_decoder() is lora.model and lora.base_model == lora.model and lora.base_model.model is lora
    assert isinstance(lora.base_model, type(base.model)) and lora.base_model.layers is lora.model.layers
    inputs = models.call(lora, labels=False)
    cached, before = lora(**inputs), lora(**inputs).logits
    lora.config.use_cache = False
    output = lora(**inputs)
    assert cached.past_key_values is not None and output.past_key_values is None
    torch.testing.assert_close(output.logits, before)
    lora.resize_token_embeddings(models.VOCABULARY + 5)
    assert lora.config.vocab_size == models.VOCABULARY + 5
    wider = lora(**inputs).logits
    torch.testing.assert_close(wider[..., : models.VOCABULARY], before)
    assert (
        wider.shape[-1] == models.VOCABULARY + 5 and sum(p.numel() for p in lora.parameters() if p.requires_grad) == own
    )
    lora.gradient_checkpointing_enable()
    assert lora.is_gradient_checkpointing
    lora.train()
    torch.testing.assert_close(lora(**inputs).logits, wider)

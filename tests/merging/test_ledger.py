"""The ledger: W + ΔW into the base weights, rounded once, and exactly out again or not at all."""

import copy

import pytest
import torch
from graphs import Chain, adapted, change
from merged_weights import bits, rescale, wide
from modules import DeeperTied, Tied
from torch import nn

import lorafx
from lorafx.errors import AdapterError, MergeError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.01, 0.05, 1.0, 30.0])
def test_unmerge_restores_every_bit(dtype, scale):
    model, lora = wide(dtype, scale)
    before = bits(model)
    for _ in range(3):
        lora.merge_adapter()
        assert bits(model) != before
        lora.unmerge_adapter()
        assert bits(model) == before


def test_what_subtracting_would_not_restore_is_restored():
    """The reason for the ledger: at 5 % of W's scale a few in a hundred of bfloat16 weights would come back wrong."""
    model, lora = wide(torch.bfloat16)
    before, weight = bits(model), model[0].weight.detach().clone()
    added = change(lora, "default", lora.sites[0])["weight"].float()
    lora.merge_adapter()
    wrong = (model[0].weight.float() - added).bfloat16() != weight
    assert 0.02 < wrong.float().mean() < 0.1
    lora.unmerge_adapter()
    assert bits(model) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_rounded_once(dtype):
    model, lora = wide(dtype)
    weight = model[0].weight.detach().clone()
    added = change(lora, "default", lora.sites[0])["weight"]
    lora.merge_adapter()
    exact = weight.double() + added
    once = (exact.to(dtype).double() - exact).abs()
    # Besides that one rounding, ΔW is one in float32, of 8 terms that are off by 2 · 2^-25 of their largest.
    inner = 0 if dtype == torch.float64 else 2**-24 * (exact.abs() + 16 * added.abs().max())
    assert ((model[0].weight.double() - exact).abs() <= once + inner).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "share"), [(0.01, 0.25), (0.05, 0.25), (1.0, 1.0), (100.0, 1.0), (1e6, 1.0)])
def test_memory_stays_in_bounds(dtype, scale, share):
    _, lora = wide(dtype, min(scale, 1e3) if dtype == torch.float16 else scale)
    lora.merge_adapter()
    sizes = lora.report().merged
    assert len(sizes) == 2
    for path, (kept, size) in sizes.items():  # besides the adapter's own tensors there, and fingerprints of 1 / 64
        own = sum(p.nbytes for name, p in lora.named_parameters() if name.startswith(f"{path[0]}.lora_"))
        assert kept <= (share + 1 / 64) * size + own + 64
    assert sum(kept for kept, _ in sizes.values()) > 0
    assert "bytes kept" in str(lora.report()) and "in all" in str(lora.report())


def test_several_adapters_in_any_order_give_the_same_weights_and_leave_exactly():
    model, lora = wide(torch.bfloat16)
    before = bits(model)
    for name, rank in (("b", 4), ("c", 2)):
        config = {"r": rank, "target_modules": ["0", "2"], "init_lora_weights": False}
        lora.add_adapter(name, config, random_state=rank)
        rescale(lora, name, 0.05)
    results = set()
    for order in (["default", "b", "c"], ["c", "default", "b"], ["b", "c", "default"]):
        for name in order:
            lora.merge_adapter([name])
        assert lora.merged_adapters == order
        results.add(str(sorted(bits(model).items())))
        lora.unmerge_adapter()
        assert bits(model) == before and lora.merged_adapters == []
    lora.merge_adapter(["default", "b", "c"])
    results.add(str(sorted(bits(model).items())))
    assert len(results) == 1
    own = sum(p.nbytes for name, p in lora.named_parameters() if ".lora_" in name)
    total = [sum(sizes) for sizes in zip(*lora.report().merged.values())]
    assert total[0] <= 0.25 * total[1] + own, "one residual, not three"


def test_zeros_infinities_and_subnormals_come_back():
    model = nn.Sequential(nn.Linear(64, 40))
    with torch.no_grad():
        rows = [0.0, -0.0, 1e-45, -1e-40, 3.4e38, float("inf"), float("-inf"), float("nan")]
        for index, value in enumerate(rows):
            model[0].weight[index] = value
    before, lora = bits(model), adapted(model)
    lora.merge_adapter()
    lora.unmerge_adapter()
    assert bits(model) == before


def test_the_adapters_bias_is_merged_too():
    model, x = Chain().double(), torch.randn(5, 4, dtype=torch.float64)
    lora = adapted(model, target_modules=["second"], lora_bias=True)
    before, expected = bits(model), lora(x)
    lora.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-13, atol=1e-13)
    lora.unmerge_adapter()
    assert bits(model) == before


def test_a_bias_that_the_base_lacks_is_refused():
    model = Chain()
    lora, before = adapted(model, lora_bias=True), bits(model)
    with pytest.raises(MergeError, match=r"first\.bias, which the base does not have"):
        lora.merge_adapter()
    assert bits(model) == before and lora.merged_adapters == []


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_safe_merge_refuses_what_is_not_finite(bad):
    model, lora = wide()
    before = bits(model)
    with torch.no_grad():
        lora.get_parameter("2.lora_B.default.weight")[3, 1] = bad
    with pytest.raises(MergeError, match=r"2\.weight that are not finite"):
        lora.merge_adapter(safe_merge=True)
    assert bits(model) == before and lora.merged_adapters == []
    lora.merge_adapter()
    assert not model[2].weight.isfinite().all()
    lora.unmerge_adapter()
    assert bits(model) == before


@pytest.mark.parametrize("small", [False, True])
def test_a_changed_adapter_still_leaves_exactly(small):
    """However large its factors are beside the weight."""
    model = Chain() if small else wide(torch.bfloat16)[0]
    lora, before = adapted(model), bits(model)
    lora.merge_adapter()
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.add_(1)
    lora.unmerge_adapter()
    assert bits(model) == before


def test_what_was_merged_stays_what_it_was_when_others_are_merged_on_top():
    model, lora = wide()
    weight, added = model[0].weight.detach().double(), change(lora, "default", lora.sites[0])["weight"]
    lora.merge_adapter()
    with torch.no_grad():
        lora.get_parameter("0.lora_B.default.weight").add_(1)
    lora.add_adapter("b", {"r": 2, "target_modules": ["0"], "init_lora_weights": False})
    added = added + change(lora, "b", lora.sites[0])["weight"]
    lora.merge_adapter(["b"])
    torch.testing.assert_close(model[0].weight.detach().double(), weight + added, rtol=1e-6, atol=1e-6)


def test_a_changed_weight_is_refused():
    model, lora = wide()
    lora.merge_adapter()
    with torch.no_grad():
        model[2].weight[0, 0] += 1
    changed = bits(model)
    with pytest.raises(MergeError, match=r"2\.weight cannot be restored exactly: it has been changed since the merge"):
        lora.unmerge_adapter()
    with pytest.raises(MergeError, match="changed since"):
        lora.add_adapter("b", {"target_modules": ["2"]})
        lora.merge_adapter(["b"])
    assert bits(model) == changed


def test_a_changed_dtype_is_refused():
    _, lora = wide()
    lora.merge_adapter()
    lora.bfloat16()
    changed = bits(lora)
    with pytest.raises(MergeError, match=r"torch\.float32 and is torch\.bfloat16 now"):
        lora.unmerge_adapter()
    assert bits(lora) == changed


def test_a_ΔW_that_comes_out_differently_is_refused(monkeypatch):
    model, lora = wide()
    lora.merge_adapter()
    merged = bits(model)
    kind = type(lora._lorafx.adapters["default"].kind)
    real = kind.delta
    monkeypatch.setattr(kind, "delta", lambda *args: real(*args) * (1 + 1e-5))
    with pytest.raises(MergeError, match=r"comes out differently now than on cpu"):
        lora.unmerge_adapter()
    assert bits(model) == merged


def test_meta_weights_are_refused():
    with torch.device("meta"):
        lora = lorafx.compile(Chain(), {"target_modules": ["first"]})
    with pytest.raises(MergeError, match="meta"):
        lora.merge_adapter()


def test_merge_and_unload_is_the_base_object_with_the_adapter_in_it():
    model, x = Chain(), torch.randn(5, 4)
    keys, lora = set(model.state_dict()), adapted(model, target_modules=["first"], modules_to_save=["second"])
    with torch.no_grad():
        lora.get_parameter("second.modules_to_save.default.weight").mul_(2)
    expected = lora(x)
    base = lora.merge_and_unload()
    assert base is model and type(base) is Chain and set(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x), expected)
    assert lora.peft_config == {}


def test_unload_is_the_base_object_as_it_was():
    model = Chain()
    before, lora = bits(model), adapted(model, bias="all", modules_to_save=["second"])
    lora.merge_adapter()
    assert lora.unload() is model and bits(model) == before


def test_unloading_a_saved_module_unties_rather_than_changes_its_twin():
    model, ids = DeeperTied(), torch.randint(0, 11, (2, 6))
    lora = adapted(model, target_modules=["middle"], modules_to_save=["head"])
    with torch.no_grad():
        lora.get_parameter("head.modules_to_save.default.weight").mul_(3)
    expected, embedding = lora(ids), model.embed.weight.detach().clone()
    lora.merge_and_unload()
    assert torch.equal(model.embed.weight, embedding)
    torch.testing.assert_close(model(ids), expected)


def test_a_merged_adapter_cannot_be_deleted():
    _, lora = wide()
    lora.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge it"):
        lora.delete_adapter("default")


def test_merging_twice_or_nothing_warns():
    model, lora = wide()
    lora.merge_adapter()
    merged = bits(model)
    with pytest.warns(UserWarning, match="merged already"):
        lora.merge_adapter()
    assert bits(model) == merged and lora.merged_adapters == ["default"]
    lora.unmerge_adapter()
    with lora.disable_adapter(), pytest.warns(UserWarning, match="no active adapter"):
        lora.merge_adapter()
    assert lora.merged_adapters == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*one site")
def test_adapters_that_know_a_tied_weight_by_different_names_act_and_merge_together():
    model, ids = Tied().double(), torch.randint(0, 11, (2, 6))
    before = bits(model)
    lora = adapted(model, target_modules=["embed"])
    one = lora(ids)
    lora.add_adapter("other", {"r": 3, "target_modules": ["head"], "init_lora_weights": False})
    lora.set_adapter(["default", "other"])
    both = lora(ids)
    assert not torch.allclose(one, both)
    lora.merge_adapter(["default"])
    torch.testing.assert_close(lora(ids), both, rtol=1e-13, atol=1e-13)
    lora.merge_adapter(["other"])
    torch.testing.assert_close(model(ids), both, rtol=1e-13, atol=1e-13)
    lora.unmerge_adapter()
    assert bits(model) == before


def test_a_trained_bias_takes_the_adapters_bias_and_gives_it_back(tmp_path):
    model, x = Chain().double(), torch.randn(5, 4, dtype=torch.float64)
    lora = adapted(model, target_modules=["second"], bias="all", lora_bias=True)
    before, own = lora(x), lora.get_parameter("second.trained_bias.default.bias").detach().clone()
    lora.merge_adapter()
    torch.testing.assert_close(lora(x), before, rtol=1e-13, atol=1e-13)
    lora.save_pretrained(tmp_path)
    torch.testing.assert_close(lorafx.load(copy.deepcopy(lora._lorafx.base), tmp_path).second.bias, model.second.bias)
    lora.unmerge_adapter()
    assert torch.equal(lora.get_parameter("second.trained_bias.default.bias"), own)
    lora.save_pretrained(tmp_path / "again")
    files = [(tmp_path / part / "adapter_model.safetensors").read_bytes() for part in ("", "again")]
    assert files[0] == files[1]
    torch.testing.assert_close(lora.merge_and_unload()(x), before, rtol=1e-13, atol=1e-13)


def test_a_weight_by_another_name_is_merged():
    model, ids = nn.Sequential(nn.Embedding(9, 4)), torch.arange(9)
    model.table = model[0].weight  # its first name, which is no module's own
    lora = adapted(model, target_modules=["0"])
    before, expected = bits(model), lora(ids)
    lora.merge_adapter()
    torch.testing.assert_close(model(ids), expected)
    lora.unmerge_adapter()
    assert bits(model) == before


@pytest.mark.filterwarnings("ignore:.*one site")
def test_the_original_is_known_by_each_of_its_names():
    model = Tied()
    before = model.embed.weight.clone()
    lora = adapted(model, target_modules=["embed"])
    lora.merge_adapter()
    assert not torch.equal(model.embed.weight, before)
    for name in ("embed.weight", "head.weight"):
        assert torch.equal(lora._lorafx.ledger.original(lora, name), before)


def test_copies_of_an_adapters_tensors_count_once():
    lora = adapted(nn.Sequential(nn.Linear(300, 260)), r=1, lora_bias=True)
    lora.merge_adapter()
    (weight, _), (bias, size) = (lora.report().merged[f"0.{name}"] for name in ("weight", "bias"))
    copied = sum(p.numel() * p.element_size() for name, p in lora.named_parameters() if "lora_" in name)
    assert bias < copied <= weight and bias < 2 * size


def test_a_dtype_without_an_order_of_its_bits_is_refused():
    lora = adapted(nn.Sequential(nn.Linear(4, 3, bias=False).to(torch.complex64)))
    with pytest.raises(MergeError, match=r"0.weight is torch.complex64, which cannot be merged into exactly"):
        lora.merge_adapter()

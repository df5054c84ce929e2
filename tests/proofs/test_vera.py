"""VeRA: its equation, and the pair of projections that all sites share."""

import copy

import pytest
import torch
from torch import nn
from uses import Layers, Pair, bits, hold, of_layers

import lorafx
from lorafx.errors import ConfigError

CONFIG = lorafx.VeraConfig(r=3, target_modules=["up", "down"])


def adapted(layer, x):
    a, b = layer.vera_A.default.shared[:, : x.shape[-1]], layer.vera_B.default.shared[: layer.weight.shape[0]]
    hidden = (x @ a.T) * layer.vera_lambda_d.default
    return x @ layer.weight.T + layer.bias + (hidden @ b.T) * layer.vera_lambda_b.default


@pytest.mark.slow
def test_its_equation_holds_in_every_use(tmp_path):
    hold(lambda: Layers(Pair).double(), CONFIG, torch.randn(4, 6, 5, dtype=torch.float64), of_layers(adapted), tmp_path)


def projections(lora, name="default"):
    sites = [site for layer in lora.layers for site in (layer.up, layer.down)]
    return [(getattr(site.vera_A, name).shared, getattr(site.vera_B, name).shared) for site in sites]


def require_one_pair(lora, name="default"):
    (a, b), *others = projections(lora, name)
    assert all(other[0] is a and other[1] is b for other in others)
    return a, b


def test_all_sites_share_one_pair_whatever_becomes_of_the_model():
    lora = lorafx.compile(Layers(Pair), CONFIG)
    a, b = require_one_pair(lora)
    assert a.shape == (3, 7) and b.shape == (7, 3), "large enough for each site"
    before = a.clone()
    for moved in (copy.deepcopy(lora), lora.double(), lora.to("meta").to_empty(device="cpu")):
        a, b = require_one_pair(moved)
        assert torch.equal(a.float(), before)
    assert a.dtype == torch.float64 and not any("vera_A" in name for name in lora.state_dict())
    assert not any(a is parameter or b is parameter for parameter in lora.parameters())


def test_what_is_shared_goes_with_the_last_site_that_has_it():
    base = Layers(Pair)
    before = bits(base)
    lora = lorafx.compile(base, CONFIG)
    lora.add_adapter("other", lorafx.VeraConfig(r=2, projection_prng_key=7, target_modules=["up"]))
    assert lora.layers[0].up.vera_A.other.shared.shape == (2, 5) and not hasattr(lora.layers[0].down.vera_A, "other")
    lora.delete_adapter("default")
    assert not hasattr(lora.layers[0].down, "vera_A") and hasattr(lora.layers[1].up, "vera_A")
    lora.delete_adapter("other")
    assert bits(lora) == before and not any("vera" in name for name, _ in lora.named_modules())


def test_a_merge_keeps_no_copies_of_what_is_shared():
    lora = lorafx.compile(Layers(Pair), CONFIG)
    lora.merge_adapter()
    kept = [source for entry in lora._lorafx.ledger.entries.values() for source in entry.sources]
    a, _ = require_one_pair(lora)
    assert len(kept) == 4 and all(each.tensors["vera_A"].data_ptr() == a.data_ptr() for each in kept)
    assert all(each.nbytes == 4 * (3 + each.site.out_features) for each in kept)


@pytest.mark.parametrize("saved", [True, False])
def test_a_file_has_the_projections_once_or_not_at_all(saved, tmp_path):
    base, x = Layers(Pair), torch.randn(4, 5)
    lora = lorafx.compile(base, CONFIG.replace(save_projection=saved, init_weights=False))
    if saved:
        require_one_pair(lora)[0].mul_(2)  # other numbers than the seed gives
    expected = lora(x)
    lora.save_pretrained(tmp_path)
    keys = lora.adapter_state_dict().keys()
    assert [key for key in keys if "vera_A" in key] == (["base_model.vera_A"] if saved else [])
    loaded = lorafx.load(lora.unload(), tmp_path)
    require_one_pair(loaded)
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)


def test_other_layers_than_linear_ones_are_refused():
    with pytest.raises(ConfigError, match="0 is read by embedding, and VERA is for linear layers"):
        lorafx.compile(nn.Sequential(nn.Embedding(11, 4)), lorafx.VeraConfig(target_modules=["0"]))


@pytest.mark.parametrize(("field", "value"), [("r", 0), ("vera_dropout", 1.0), ("bias", "lora_only")])
def test_fields_that_make_no_sense_are_named(field, value):
    with pytest.raises(ConfigError, match=field):
        lorafx.VeraConfig(**{field: value})

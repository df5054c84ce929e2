"""FourierFT: its equation, and the places of its frequencies."""

import pytest
import torch
from torch import nn
from uses import Layers, Pair, hold, of_layers

import lorafx
from lorafx.errors import ConfigError


def adapted(layer, x):
    rows, columns = layer.fourierft_places.default
    spectrum = torch.zeros_like(layer.weight).index_put((rows, columns), layer.fourierft_spectrum.default)
    return x @ (layer.weight + 9 * torch.fft.ifft2(spectrum).real).T + layer.bias


@pytest.mark.slow
def test_its_equation_holds_in_every_use(tmp_path):
    config = lorafx.FourierFTConfig(n_frequency=12, scaling=9, target_modules=["up", "down"])
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    hold(lambda: Layers(Pair).double(), config, x, of_layers(adapted), tmp_path)


def test_places_are_in_no_file_and_drawn_again(tmp_path):
    base, x = Layers(Pair), torch.randn(4, 5)
    config = lorafx.FourierFTConfig(n_frequency=12, random_loc_seed=3, target_modules=["up", "down"])
    lora = lorafx.compile(base, config, random_state=0)
    expected, places = lora(x), lora.layers[0].up.fourierft_places.default
    assert places.dtype == torch.int64 and not any("places" in name for name in lora.state_dict())
    assert not any("places" in key for key in lora.adapter_state_dict())
    lora.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = lorafx.load(lora.unload(), tmp_path)
    assert torch.equal(torch.get_rng_state(), before), "loading draws nothing from torch's own generator"
    assert torch.equal(loaded.layers[0].up.fourierft_places.default, places)
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)


def test_half_precision_is_transformed_in_float32():
    model, x = nn.Sequential(nn.Linear(5, 7)).bfloat16(), torch.randn(4, 5).bfloat16()
    lora = lorafx.compile(model, lorafx.FourierFTConfig(n_frequency=12, target_modules=["0"]))
    exact = adapted_in_float64(lora, x)
    torch.testing.assert_close(lora(x).double(), exact, rtol=2**-7, atol=2**-7)  # y is rounded to 8 bits, twice


def adapted_in_float64(lora, x):
    layer = lora[0]
    rows, columns = layer.fourierft_places.default
    spectrum = torch.zeros(7, 5, dtype=torch.float64).index_put(
        (rows, columns), layer.fourierft_spectrum.default.double()
    )
    weight = layer.weight.double() + 150 * torch.fft.ifft2(spectrum).real
    return x.double() @ weight.T + layer.bias.double()


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="`n_frequency`=1000 is more than the 35 that 0 has"):
        lorafx.compile(nn.Sequential(nn.Linear(5, 7)), lorafx.FourierFTConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match="random_loc_seed"):
        lorafx.FourierFTConfig(random_loc_seed=None)

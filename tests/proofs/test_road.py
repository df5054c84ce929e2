"""RoAd: the equations of its variants, and which features are pairs."""

import pytest
import torch
from torch import nn
from uses import Layers, Pair, hold, of_layers, randomize

import lorafx
from lorafx.errors import ConfigError


def pairs(width, group):
    """The features that are turned together, with the number of each in its group."""
    return [(g * group + i, g * group + i + group // 2, g, i) for g in range(width // group) for i in range(group // 2)]


def adapted_by(variant, group):
    def adapted(layer, x):
        y, theta, alpha = x @ layer.weight.T + layer.bias, layer.road_theta.default, layer.road_alpha.default
        result = torch.zeros_like(y)
        for p, q, g, i in pairs(y.shape[-1], group):
            if variant == "road_1":
                numbers = [g * group // 2 + i] * 4
            elif variant == "road_2":
                numbers = [p, p, q, q]
            else:
                first = 2 * g * group + i
                numbers = [first, first + group, first + group // 2, first + group + group // 2]
            fp, sp, fq, sq = (
                alpha[number] * turn(theta[number])
                for number, turn in zip(numbers, [torch.cos, torch.sin, torch.cos, torch.sin])
            )
            result[..., p] = y[..., p] * fp - y[..., q] * sp
            result[..., q] = y[..., q] * fq + y[..., p] * sq
        return result

    return adapted


def even(inputs, outputs):
    return nn.Linear(4 if inputs == 5 else 8, 4 if outputs == 5 else 8)


X = torch.randn(4, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def config(variant):
    return lorafx.RoadConfig(variant=variant, group_size=4, target_modules=["up", "down"])


def layers():
    return Layers(lambda: Pair(even)).double()


@pytest.mark.slow
def test_its_equation_holds_in_every_use(tmp_path):
    hold(layers, config("road_4"), X, of_layers(adapted_by("road_4", 4)), tmp_path)


@pytest.mark.parametrize("variant", ["road_1", "road_2"])
def test_variants_with_fewer_numbers_repeat_them(variant):
    lora = lorafx.compile(layers(), config(variant), capture="sites")
    randomize(lora)
    torch.testing.assert_close(lora(X), of_layers(adapted_by(variant, 4))(lora, X), rtol=1e-12, atol=1e-12)


def test_it_turns_what_a_quantised_layer_gives():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32)).to("cpu")
    x = torch.randn(4, 64)
    lora = lorafx.compile(model, lorafx.RoadConfig(group_size=2, target_modules=["0"]))
    torch.testing.assert_close(lora(x), model(x))
    with torch.no_grad():
        lora[0].road_theta.default.fill_(torch.pi / 2)
    y = model(x).unflatten(-1, (-1, 2))
    torch.testing.assert_close(lora(x).unflatten(-1, (-1, 2)), torch.stack([-y[..., 1], y[..., 0]], -1))


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="0 gives 7 features, which are no groups of `group_size`=64"):
        lorafx.compile(nn.Sequential(nn.Linear(5, 7)), lorafx.RoadConfig(target_modules=["0"]))
    for fields in ({"variant": "road_3"}, {"group_size": 3}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            lorafx.RoadConfig(**fields)

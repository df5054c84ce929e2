"""Fifty training steps give PEFT's losses: lorafx is no farther from PEFT than PEFT is from itself."""

import dataclasses

import pytest
from bench import loss_curves
from bench.loss_curves import SETTINGS, curve, curves, distances, noises, verdicts, with_lorafx

DEFAULT = "bfloat16, adapters in float32"


@pytest.fixture(scope="module")
def task():
    sizes = {"vocab_size": 61, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2}
    return loss_curves.llama(sizes, rows=4, tokens=12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting, within, noise",
    [
        ("float32", {"lorafx": "order"}, 1e-2),
        (DEFAULT, {"lorafx": "dtype", "lorafx, rounding alike": "order"}, 3e-2),
    ],
)
def test_losses_are_as_near_to_peft_as_peft_to_itself(task, setting, within, noise):
    found = dict(curves(task, setting, list(within)))
    assert len(found["PEFT"]) == 50 and found["PEFT"][-1] < 0.8 * found["PEFT"][0]
    own = noises(distances(found))
    assert all(0 < each.largest < noise for each in own.values())  # or it would hide what it is to show
    for name, what in within.items():
        assert what in verdicts(found)[name], (name, distances(found)[name], own)


@pytest.mark.slow
def test_a_scaling_that_is_off_by_a_hundredth_is_far(task):
    found = dict(curves(task, "float32", []))
    off = dataclasses.replace(task, config=task.config | {"lora_alpha": 16.16})
    found["lorafx"] = curve(with_lorafx(off, *SETTINGS["float32"][:2]), task.batches, task.lr)
    assert verdicts(found) == {"lorafx": []}

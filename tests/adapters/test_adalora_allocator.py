"""The allocation of ranks: the importance of directions, exactly as many as the budget says, and what is refused."""

import pytest
import torch

import lorafx
from lorafx.adapters.kinds.adalora_allocator import Allocator
from lorafx.errors import AdapterError


def config(**fields):
    return lorafx.AdaLoraConfig(**{"init_r": 3, "target_r": 1, "total_step": 4, "beta1": 0.6, "beta2": 0.7} | fields)


def sites(names=("one", "two"), seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    shapes = {"lora_A": (3, 5), "lora_E": (3, 1), "lora_B": (4, 3)}
    made = {site: {role: torch.randn(shape, generator=rng) for role, shape in shapes.items()} for site in names}
    for at in made.values():
        for tensor in at.values():
            tensor.grad = torch.randn(tensor.shape, generator=rng)
    return made


def test_importance_is_that_of_two_moving_averages():
    at = {role: tensor.double() for role, tensor in sites(("one",))["one"].items()}
    grads = [{role: torch.randn_like(tensor) for role, tensor in at.items()} for _ in range(2)]
    allocator, start = Allocator(), at["lora_E"].clone()
    for step, given in enumerate(grads):
        for role, tensor in at.items():
            tensor.grad = given[role]
        left = allocator.step(step, config(tinit=1, total_step=5, target_r=2, deltaT=3), {"one": at})
        assert left is None
    for role, tensor in at.items():
        tensor.grad = grads[0][role]
    left = allocator.step(3, config(tinit=1, total_step=5, target_r=2, deltaT=3), {"one": at})

    score = 0
    for role, across in (("lora_A", 1), ("lora_E", 1), ("lora_B", 0)):
        mean = spread = 0
        for given in (*grads, grads[0]):
            now = ((start if role == "lora_E" else at[role]) * given[role]).abs()
            mean = 0.6 * mean + 0.4 * now
            spread = 0.7 * spread + 0.3 * (now - mean).abs()
        score = score + (mean * spread).mean(across)
    torch.testing.assert_close(allocator._importance("one"), score, rtol=1e-12, atol=1e-12)
    kept = score > score.min()  # int((3 - 2) · (1 - 2/4)³ + 2) = 2
    assert left == {"one.lora_E": kept.tolist()}
    torch.testing.assert_close(at["lora_E"], start * kept[:, None], rtol=0, atol=0)


def test_directions_of_the_same_importance_are_not_all_dropped():
    given = sites()
    for at in given.values():
        for tensor in at.values():
            tensor.grad = torch.zeros_like(tensor)
    left = Allocator().step(1, config(), given)
    assert sum(map(sum, left.values())) == int(4 * 0.75**3 + 2)


def test_a_step_of_no_gradient_changes_nothing():
    given = sites()
    for at in given.values():
        for tensor in at.values():
            tensor.grad = None
    before = {site: at["lora_E"].clone() for site, at in given.items()}
    with pytest.raises(AdapterError, match="before `zero_grad"):
        Allocator().step(1, config(), given)
    assert all(torch.equal(given[site]["lora_E"], value) for site, value in before.items())
    given["one"]["lora_B"].grad = torch.ones(4, 3)  # what took no part in a step is of no importance in it
    assert Allocator().step(1, config(), given)


def test_the_last_allocation_is_made_once_even_if_its_step_was_left_out():
    allocator, given = Allocator(), sites()
    allocator.step(1, config(tfinal=1), given)
    left = allocator.step(5, config(tfinal=1), given)
    assert sum(map(sum, left.values())) == 2
    for at in given.values():
        at["lora_E"] += 1  # as an optimizer moves them
    assert allocator.step(6, config(tfinal=1, rank_pattern=left), given) is None
    assert {f"{site}.lora_E": (at["lora_E"][:, 0] != 0).tolist() for site, at in given.items()} == left
    with pytest.raises(AdapterError, match="step 9 is past the last allocation, at 4"):
        Allocator().step(9, config(), given)

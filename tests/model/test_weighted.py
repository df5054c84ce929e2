"""One adapter made of several, by weights: what it computes, what is saved of it, and what is refused."""

import peft
import pytest
import torch
from graphs import Chain, adapted, change
from torch import nn

import lorafx
from lorafx.errors import AdapterError, ConfigError

ALL = ["first", "second"]


def several(*configs, model=None, names="abc"):
    """A model in float64 with these adapters, none of which starts at zero."""
    torch.manual_seed(0)
    common = {"init_lora_weights": False, "target_modules": ALL}
    first, *others = [{**common, **config} for config in configs]
    lora = lorafx.compile((model or Chain()).double(), first, adapter_name=names[0], capture="sites")
    for name, config in zip(names[1:], others):
        lora.add_adapter(name, config)
    return lora


def changes(lora, name):
    return {site.name: change(lora, name, site) for site in lora._lorafx.adapters[name].selection}


@pytest.mark.parametrize(
    ("combination_type", "options"), [("cat", {}), ("svd", {"svd_rank": 4}), ("svd", {"svd_rank": 6})]
)
def test_what_it_does_is_the_sum_of_what_they_do(combination_type, options):
    """Also where they scale otherwise, by √r or by a scale that was set, and where one of them is not."""
    lora = several({"r": 1, "lora_alpha": 5}, {"r": 2, "use_rslora": True}, {"r": 1, "target_modules": ["second"]})
    lora.set_scale("b", -0.5)
    weights = {"a": 0.7, "b": 2.0, "c": -1.5}
    lora.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type, **options)
    assert lora.active_adapters == ["a"] and lora.peft_config["sum"].lora_alpha == lora.peft_config["sum"].r
    found = changes(lora, "sum")
    for site in ALL:
        parts = [w * changes(lora, name)[site]["weight"] for name, w in weights.items() if site in changes(lora, name)]
        torch.testing.assert_close(found[site]["weight"], sum(parts), rtol=1e-12, atol=1e-12)
    lora.set_adapter("sum")
    assert lora.get_parameter("first.lora_A.sum.weight").requires_grad


def test_one_adapter_alone_is_multiplied():
    lora = several({"r": 2, "lora_alpha": 3})
    lora.add_weighted_adapter(["a"], [-2.0], "minus")
    for site, found in changes(lora, "minus").items():
        torch.testing.assert_close(found["weight"], -2 * changes(lora, "a")[site]["weight"], rtol=1e-12, atol=1e-12)


def test_convolutions_in_groups_are_put_beside_each_other_group_by_group():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 6, 3, groups=2)

        def forward(self, x):
            return self.conv(x)

    lora = several(*({"r": r, "target_modules": ["conv"]} for r in (2, 4)), model=Grouped())
    x, base = torch.randn(2, 4, 5, dtype=torch.float64), {}
    for name in "ab":
        lora.set_adapter(name)
        base[name] = lora(x) - lora._lorafx.base(x)
    lora.add_weighted_adapter(["a", "b"], [2.0, -1.0], "sum", "cat")
    lora.set_adapter("sum")
    expected = lora._lorafx.base(x) + 2 * base["a"] - base["b"]
    torch.testing.assert_close(lora(x), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ConfigError, match="conv is a convolution with groups=2"):
        lora.add_weighted_adapter(["a", "b"], [2.0, -1.0], "near")


def test_room_for_others_is_no_part_of_what_is_combined():
    lora = several({"r": 2, "target_modules": ["second"]}, {"r": 2, "target_modules": ["second"]})
    lora.add_weighted_adapter(["a", "b"], [2.0, -1.0], "sum", "cat")
    lora.prepare_for_hotswap(target_rank=5, config=lorafx.LoraConfig(target_modules=ALL))
    for combination_type in ("cat", "svd", "linear"):
        lora.add_weighted_adapter(["a", "b"], [2.0, -1.0], combination_type, combination_type)
        assert lora.peft_config[combination_type].r == (4 if combination_type == "cat" else 2)
        assert list(changes(lora, combination_type)) == ["second"]
    found, expected = (changes(lora, name)["second"]["weight"] for name in ("cat", "sum"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_biases_of_b_are_added_too():
    lora = several({"r": 2, "lora_bias": True}, {"r": 2, "lora_bias": True}, {"r": 2})
    lora.delete_adapter("c")
    lora.add_weighted_adapter(["a", "b"], [2.0, -1.0], "sum", "cat")
    for site, found in changes(lora, "sum").items():
        parts = [changes(lora, name)[site]["bias"] for name in "ab"]
        torch.testing.assert_close(found["bias"], 2 * parts[0] - parts[1], rtol=1e-12, atol=1e-12)


def test_a_module_that_one_of_them_trains_goes_along():
    lora = several(
        {"r": 2, "target_modules": ["first"]}, {"r": 2, "target_modules": ["first"], "modules_to_save": ["second"]}
    )
    own = lora.get_parameter("second.modules_to_save.b.weight")
    with torch.no_grad():
        own.add_(1)
    lora.add_weighted_adapter(["a", "b"], [1.0, 3.0], "sum", "linear")
    assert torch.equal(lora.get_parameter("second.modules_to_save.sum.weight"), own)
    lora.add_adapter("c", lora.peft_config["b"])
    with pytest.raises(AdapterError, match=r"'b' and 'c' cannot be active together.*second"):
        lora.add_weighted_adapter(["b", "c"], [1.0, 1.0], "both", "linear")


@pytest.mark.slow
def test_peft_loads_it(tmp_path):
    torch.manual_seed(0)
    model, again = Chain(), Chain()
    again.load_state_dict(model.state_dict())
    lora, x = adapted(model, target_modules=["first"], use_rslora=True).eval(), torch.randn(5, 4)
    lora.add_adapter("b", {"r": 3, "target_modules": ["second"], "init_lora_weights": False})
    lora.add_weighted_adapter(["default", "b"], [0.5, 2.0], "sum")
    lora.set_adapter("sum")
    lora.save_pretrained(tmp_path, selected_adapters=["sum"])
    theirs = peft.PeftModel.from_pretrained(again, tmp_path / "sum").eval()
    torch.testing.assert_close(theirs(x), lora(x))


def test_random_numbers_follow_the_seed():
    lora = several({"r": 2}, {"r": 2})
    how = {"combination_type": "dare_linear", "density": 0.5, "random_state": 3}
    for name in ("one", "two"):
        lora.add_weighted_adapter(["a", "b"], [1.0, 1.0], name, **how)
    lora.add_weighted_adapter(["a", "b"], [1.0, 1.0], "other", **{**how, "random_state": 4})
    one, two, other = (lora.get_parameter(f"second.lora_B.{name}.weight") for name in ("one", "two", "other"))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((["a", "nobody"], [1, 1], "new"), AdapterError, "no adapter 'nobody'"),
        ((["a", "b"], [1, 1], "b"), AdapterError, "an adapter 'b' already"),
        ((["a", "b"], [1], "new"), ConfigError, "1 weights for 2 adapters"),
        (([], [], "new"), ConfigError, "0 weights for 0 adapters"),
        (("ab", [1, 1], "new"), ConfigError, "`adapters` must be a list of names"),
        ((["a", "b"], [1, float("nan")], "new"), ConfigError, "`weights` must be a list of finite numbers"),
        ((["a", "b"], [1, 1], "new.name"), AdapterError, "no dots"),
        ((["a", "b"], [1, 1], "new", "linear"), AdapterError, r"first: 'linear' combines .* ranks there are \[2, 3\]"),
        ((["a", "b"], [1, 1], "new", "sum"), ConfigError, "`combination_type` must be one of svd, cat"),
        ((["a", "b"], [1, 1], "new", "ties_svd"), ConfigError, "`density` must be"),
    ],
)
def test_bad_input_is_one_clear_error_and_changes_nothing(arguments, error, said):
    lora = several({"r": 2}, {"r": 3})
    before = {path: tensor.clone() for path, tensor in lora.state_dict().items()}
    with pytest.raises(error, match=said):
        lora.add_weighted_adapter(*arguments)
    assert list(lora.peft_config) == ["a", "b"]
    assert all(torch.equal(before.pop(path), tensor) for path, tensor in lora.state_dict().items()) and not before


def test_what_was_taken_out_of_the_base_cannot_be_combined():
    lora = several({"r": 2}, {"r": 2, "init_lora_weights": "pissa"})
    with pytest.raises(AdapterError, match="'b' took its start values out of the base"):
        lora.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")

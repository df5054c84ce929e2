"""A call and its key: taken apart as by a pytree, and what is told apart by the key."""

import contextlib
from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch
from graphs import Chain, adapted
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

import lorafx
from lorafx.capture.caches import register_caches
from lorafx.serving.call_key import Call, CallKey, full_masks, in_one_order, taken_apart
from lorafx.serving.tree_state import TreeGuards

register_caches(torch.nn.Module())
Pair = namedtuple("Pair", "left right")
names = st.sampled_from("abc")
pytree.register_pytree_node(  # which pytrees do not look at, of a named tuple
    Pair, lambda pair: ([pair.right, pair.left], None), lambda children, _: Pair(*reversed(children))
)
leaf = st.sampled_from([torch.zeros(2), torch.ones(1), None, 1, 2.5, True, "text", torch.float16])


def containers(inner):
    pairs = st.dictionaries(names, inner, max_size=3)
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        pairs,
        pairs.map(OrderedDict),
        pairs.map(lambda values: defaultdict(list, values)),
        st.builds(Pair, inner, inner),
    )


value = st.recursive(leaf, containers, max_leaves=8)
call = st.tuples(st.lists(value, max_size=2).map(tuple), st.dictionaries(names, value, max_size=3))


@given(call, call)
def test_a_call_is_taken_apart_as_a_pytree(first, second):
    calls, trees = (
        [taken_apart(*each) for each in (first, second)],
        [pytree.tree_flatten(each) for each in (first, second)],
    )
    for (taken, _), (leaves, _) in zip(calls, trees):
        assert len(taken) == len(leaves) and all(a is b for a, b in zip(taken, leaves))
    assert (calls[0][1] == calls[1][1]) == (trees[0][1] == trees[1][1])
    assert hash(calls[0][1]) == hash(taken_apart(*first)[1])


def test_caches_and_models_outputs_are_taken_apart_too():
    def cache(layers=2, length=3):
        made = DynamicCache()
        for layer in range(layers):
            made.update(torch.zeros(1, 2, length, 4), torch.ones(1, 2, length, 4), layer)
        return made

    args, kwargs = (BaseModelOutput(last_hidden_state=torch.zeros(1)),), {"past": cache(), "other": None}
    leaves, structure = taken_apart(args, kwargs)
    assert all(a is b for a, b in zip(leaves, pytree.tree_leaves((args, kwargs)), strict=True))
    assert structure == taken_apart(args, {"past": cache(length=5), "other": 1})[1]
    assert structure != taken_apart(args, {"past": cache(layers=3), "other": None})[1]
    assert structure != taken_apart(args, {"other": None, "past": cache()})[1]
    odd = cache()
    odd.seen = {"a set": bytearray()}, {1}  # cannot be hashed
    hash(taken_apart((), {"past": odd})[1])


def test_keywords_have_one_order_and_none_where_that_is_the_default():
    class Model(torch.nn.Module):
        def forward(self, x, mask=None, scale=1.0, **more):
            return x

    given = in_one_order(Model, {"b": 2, "scale": None, "mask": None, "x": 0, "a": None})
    assert list(given.items()) == [("x", 0), ("scale", None), ("b", 2), ("a", None)]


@pytest.mark.parametrize(
    "mask, full",
    [
        (torch.ones(2, 3, dtype=torch.long), True),
        (torch.ones(2, 3, dtype=torch.bool), True),
        (torch.tensor([[1, 1], [0, 1]]), False),
        (torch.ones(2, 3), False),
        (torch.ones(2, 1, 3, 3, dtype=torch.long), False),
        (torch.ones(2, 3, dtype=torch.long, device="meta"), False),
    ],
    ids=["ones", "true", "padded", "added to scores", "4-D", "no values"],
)
def test_a_mask_that_masks_nothing_is_part_of_the_key(mask, full):
    assert full_masks({"attention_mask": mask, "ids": mask}) == (("attention_mask",) if full else ())
    inside = []
    torch.func.vmap(lambda each: inside.append(full_masks({"attention_mask": each})) or each)(
        torch.ones(2, 2, 3).long()
    )
    assert inside == [()], "its values cannot be looked at"


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Making(nn.Module):
    """Makes tensors of whatever torch makes by default."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 6)

    def forward(self, x):
        return self.up(x) + torch.arange(6) / 3 + (0.5 if torch.empty(0).is_cpu else 0)


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_what_a_model_makes_by_default_is_as_the_caller_set_it(capture):
    lora, x = lorafx.compile(Making(), {"r": 2, "target_modules": ["up"]}, capture=capture), torch.randn(5, 4)
    plain = Making()
    plain.load_state_dict({name: lora.state_dict()[name] for name in plain.state_dict()})
    for dtype in (torch.float32, torch.float64, torch.float32):
        with default_dtype(dtype):
            torch.testing.assert_close(lora(x), plain(x))
            assert lora(x).dtype == dtype


def test_modes_and_acting_adapters_are_part_of_the_key():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    state = TreeGuards().state(lora)

    def key(x=x):
        return CallKey.of(Call.of(lora, lora._lorafx.context, "", (x,), {}), state)

    keys = {key(), key(torch.randn(7, 4))}
    assert len(keys) == 1
    for mode in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        default_dtype(torch.float64),
        deterministic(),
        lora.disable_adapter(),
    ):
        with mode:
            keys.add(key())
    keys.add(key()._replace(layout=-1))
    lora.merge_adapter()
    assert len(keys | {key(), key(x.double())}) == 11
    assert key().with_any_attributes().attributes is None


class Filling(Chain):
    """Fills what it is given."""

    def forward(self, x, seen=None, shift=0):
        y = super().forward(x) + shift
        if seen is not None:
            seen.append(y)
        return {"y": y, "seen": seen}


def test_positional_and_keyword_calls_are_one_kind():
    lora, x = adapted(Filling()), torch.randn(5, 4)
    expected = lora(x)["y"]
    assert torch.equal(lora(x=x)["y"], expected) and len(lora.explain().calls) == 1
    for args, kwargs in (((x,), {}), ((), {"x": x})):
        filled = [torch.ones(())]
        given = lora(*args, seen=filled, **kwargs)
        assert given["seen"] is filled and torch.equal(filled[1], expected)
    filled = []
    assert torch.equal(lora(x, filled, 3)["y"], expected + 3) and len(filled) == 1
    assert torch.equal(lora(shift=3, x=x, seen=filled)["y"], expected + 3)
    assert len(lora.explain().calls) == 4  # none to fill; one with something in it; an empty one, and one that is not


def test_a_graph_is_called_as_its_call_was():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    expected = lora(x)
    assert torch.equal(lora.graph(x)(x), expected) and torch.equal(lora.graph(x=x)(x=x), expected)


class Squeezed(nn.Module):
    """Branches on what squeezing has left, as losses of one label do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        y = self.linear(x).squeeze()
        return y.sum(-1) if y.dim() == 2 else 100 * y


def test_a_graph_of_several_rows_does_not_serve_one():
    base = Squeezed().double()
    lora = lorafx.compile(base, {"target_modules": ["linear"]}, capture="graph")
    for rows in (5, 1, 6):
        x = torch.randn(rows, 4, dtype=torch.float64)
        torch.testing.assert_close(lora(x), base(x), atol=1e-14, rtol=1e-14)
    assert len(lora.explain().calls) == 2

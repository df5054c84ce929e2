"""A call taken apart: as a pytree takes it apart, with structures that are equal where a pytree's are."""

from collections import OrderedDict, defaultdict, namedtuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from lorafx.capture.caches import register_caches
from lorafx.serving.call_key import Call

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
    calls, trees = [Call.of(*each) for each in (first, second)], [pytree.tree_flatten(each) for each in (first, second)]
    for taken, (leaves, _) in zip(calls, trees):
        assert len(taken.leaves) == len(leaves) and all(a is b for a, b in zip(taken.leaves, leaves))
    assert (calls[0].structure == calls[1].structure) == (trees[0][1] == trees[1][1])
    assert hash(calls[0].structure) == hash(Call.of(*first).structure)


def test_caches_and_models_outputs_are_taken_apart_too():
    def cache(layers=2, length=3):
        made = DynamicCache()
        for layer in range(layers):
            made.update(torch.zeros(1, 2, length, 4), torch.ones(1, 2, length, 4), layer)
        return made

    args, kwargs = (BaseModelOutput(last_hidden_state=torch.zeros(1)),), {"past": cache(), "other": None}
    taken = Call.of(args, kwargs)
    assert all(a is b for a, b in zip(taken.leaves, pytree.tree_leaves((args, kwargs)), strict=True))
    assert taken.structure == Call.of(args, {"past": cache(length=5), "other": 1}).structure
    assert taken.structure != Call.of(args, {"past": cache(layers=3), "other": None}).structure
    assert taken.structure != Call.of(args, {"other": None, "past": cache()}).structure
    odd = cache()
    odd.seen = {"a set": bytearray()}, {1}  # cannot be hashed
    hash(Call.of((), {"past": odd}).structure)

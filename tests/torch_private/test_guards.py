"""guards: conditions that are written at once say what torch's own writing of them says."""

import pytest
import torch
from torch.export import _unlift
from torch.utils import _pytree as pytree

from lorafx.torch_private.guards import conditions_written_at_once, written

# Eleven arguments, so that a name of one begins with that of another.
CALL = {"z": {"k": torch.zeros(2, 3), "kk": torch.zeros(3)}, "many": [torch.zeros(n) for n in range(3, 12)]}
CODES = ["L['z']['k'].size()[1] == L['z']['kk'].size()[0]", "(L['many'][8].size()[0]) \n >= 4", "math.floor(2.5) == 2"]
CODES += ["L['many'][0].size()[0] == 3 and L['z']['kk'].size()[0] < 8"]


def outcome(module, args):
    try:
        return module(*args)
    except AssertionError as error:
        return str(error).translate(dict.fromkeys(map(ord, "() ")))  # torch takes needless ones away


@pytest.mark.parametrize("changed", [None, ("k", (2, 4)), ("kk", (7,)), (8, (1,)), (0, (4,))])
def test_conditions_are_torchs_own(changed):
    paths, leaves = zip(*pytree.tree_flatten_with_path(CALL)[0])
    theirs, own = (write(CODES, list(paths)) for write in (_unlift._convert_guards_code_to_fn, written))
    args = [torch.zeros(changed[1]) if changed and changed[0] in _keys(p) else leaf for p, leaf in zip(paths, leaves)]
    assert outcome(own, args) == outcome(theirs, args)
    assert (outcome(own, args) is None) == (changed is None), "each change fails one"


@pytest.mark.parametrize("least, fits", [("3", True), ("inf", False)])
def test_a_bound_may_be_infinite(least, fits):
    """Which torch's own writing does not know before 2.13."""
    paths, leaves = zip(*pytree.tree_flatten_with_path(CALL)[0])
    own = written([f"L['z']['kk'].size()[0] >= {least} and L['z']['kk'].size()[0] < inf"], list(paths))
    assert (outcome(own, leaves) is None) == fits


def _keys(path):
    return [getattr(each, "key", getattr(each, "idx", None)) for each in path]


def test_torchs_function_is_back_afterwards():
    theirs = _unlift._convert_guards_code_to_fn
    with conditions_written_at_once():
        assert _unlift._convert_guards_code_to_fn is written
    assert _unlift._convert_guards_code_to_fn is theirs
    assert outcome(written([], []), []) is None

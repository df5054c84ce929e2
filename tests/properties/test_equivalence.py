"""What must hold for every model, config and adapter, checked on random ones (`lorafx.testing`)."""

import contextlib
import dataclasses
import functools
import warnings
from unittest import mock

import pytest
import torch
from graphs import change
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lorafx
from lorafx import testing
from lorafx.adapters.kinds.lora import Lora
from lorafx.graph import resolve
from lorafx.merging.residual import Residual
from lorafx.passes import Canonicalize, InsertAdapters, MatchTargets, MergeAdapters
from lorafx.pipeline import Context, Pass, Pipeline

HALF = (torch.bfloat16, torch.float16)
REAL = (torch.float32, *HALF)
ANY_SCALE = st.floats(-4, 1).map(lambda exponent: 10.0**exponent)
pytestmark = pytest.mark.filterwarnings("ignore:.*shares its weight")


def examples(count):
    """Run a property on this many examples, which depend on the code that is imported alone, not on chance.

    A failing one is printed as a recipe.
    """
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


# --- a merged model computes what the unmerged one does ---


@pytest.mark.slow
@examples(8)
@given(testing.adapted(adapters=2))
def test_merged_and_unloaded_equal_unmerged(case):
    """The unloaded base runs its own Python without any graph: a reference for every kind of site, own copy and tie."""
    lora = case.build()
    base = testing.base_tensors(lora)
    testing.assert_merged_equals_unmerged(lora, case.call())
    testing.assert_same_tensors(testing.base_tensors(lora), base)
    testing.assert_unloaded_equals_unmerged(lora, case.call())


@pytest.mark.slow
@examples(6)
@given(testing.adapted(testing.models(dtypes=[torch.float64]), adapters=2), st.integers(1, 99))
def test_one_graph_serves_other_sizes(case, seed):
    """With two captures at most (one for unmerged calls, one for merged ones), whatever the sizes."""
    lora = case.build()
    for each in (0, seed, seed + 1):
        testing.assert_merged_equals_unmerged(lora, case.call(each))
    assert len(lora.report().graphs) == 2


# --- an adapter at its start is not there ---


@pytest.mark.slow
@examples(7)
@given(testing.adapted(mergeable=False, adapters=2))
def test_zero_B_changes_no_bit_of_the_output(case):
    """In eval mode, with gradients; in groups and with own copies of biases and modules too."""
    testing.assert_inert(case.build(start=True), case.model.build(), case.call())


# --- merging is exact ---


@examples(40)
@given(
    testing.adapted(testing.models(dtypes=REAL), adapters=4, scales=ANY_SCALE),
    st.integers(1, 3),
    st.booleans(),
    st.randoms(),
)
def test_unmerging_restores_every_bit(case, cycles, one_by_one, random):
    """Any number of cycles, several adapters in any order, together or one by one, at any scale."""
    lora = case.build()
    names = random.sample(lora.active_adapters, len(lora.active_adapters))
    testing.assert_merge_is_exact(lora, names, cycles=cycles, one_by_one=one_by_one)


@pytest.mark.slow
@examples(25)
@given(testing.adapted(testing.models(dtypes=REAL), adapters=4, scales=ANY_SCALE), st.randoms())
def test_the_merged_weights_depend_neither_on_order_nor_on_grouping(case, random):
    """One rounding of W + ΣΔW, where the sum may be taken in any order: in float64, then rounded to float32.

    Two float64 sums of n terms differ by at most 2 n u₆₄ Σ|ΔW|, far below half a unit of float32, so their roundings
    differ in the last place at most where they straddle a tie; so do the weights.
    """
    together, apart = case.build(), case.build()
    together.merge_adapter(list(together.active_adapters))
    for name in random.sample(apart.active_adapters, len(apart.active_adapters)):
        apart.merge_adapter([name])
    expected, actual = testing.base_tensors(together), testing.base_tensors(apart)
    for path, tensor in expected.items():
        unit = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(actual[path], tensor, rtol=unit, atol=0)


@pytest.mark.slow
@examples(25)
@given(testing.adapted(testing.models(dtypes=HALF), scales=ANY_SCALE))
def test_merging_rounds_once(case):
    """W' is within half a unit in the last place of W + ΔW as float64 has it, and one float32 rounding."""
    lora = case.build()
    adapter = lora._lorafx.adapters["default"]
    exact = {}
    for site in adapter.selection:
        for name, delta in change(lora, "default", site).items():
            base = f"{site.name}.{name}"
            path = adapter.replaced.get(base, base)  # the bias that the adapter trains takes its own `lora_bias`
            exact[path] = lora.get_parameter(path).detach().double() + delta
    lora.merge_adapter()
    for path, value in exact.items():
        merged = lora.get_parameter(path).detach()
        unit = torch.finfo(merged.dtype).eps / 2 + 2 * torch.finfo(torch.float32).eps
        smallest = torch.finfo(merged.dtype).smallest_normal * unit
        torch.testing.assert_close(merged.double(), value, rtol=unit, atol=smallest)


@pytest.mark.slow
@examples(25)
@given(testing.adapted(testing.models(dtypes=REAL), adapters=2), st.integers(0, 2**32), st.booleans())
def test_any_finite_weights_come_back(case, seed, hostile):
    """Weights of random bits (subnormals, -0, values near the largest), and adapters as random as those."""
    lora = case.build()
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in lora.named_parameters():
        if hostile or "lora_" not in name:
            parameter.data.copy_(_random_bits(parameter, rng))
    testing.assert_merge_is_exact(lora)


def _random_bits(like, rng):
    """Finite floats, every bit pattern alike."""
    integers = testing.bits(like).dtype
    ends = torch.iinfo(integers)
    drawn = torch.randint(ends.min, ends.max, like.shape, generator=rng, dtype=integers).view(like.dtype)
    return torch.where(drawn.isfinite(), drawn, torch.copysign(torch.zeros_like(drawn), drawn))


@examples(150)
@given(st.sampled_from((torch.float64, *REAL)), st.integers(1, 70), st.integers(0, 2**32), st.floats(0, 1))
def test_a_residual_restores_anything_from_any_guess(dtype, count, seed, share):
    """Bits are bits: NaN, infinities and -0 come back as well, from a guess that is right in a `share` of places."""
    rng = torch.Generator().manual_seed(seed)
    like = torch.empty(count, dtype=dtype)
    original, guess = (_random_bits(like, rng) for _ in range(2))
    guess = torch.where(torch.rand(count, generator=rng) < share, original, guess)
    original[0] = [0.0, -0.0, float("nan"), float("-inf")][seed % 4]
    assert testing.same_bits(Residual.of(original, guess.clone()).restore(guess), original)


# --- and costs little ---

LARGE = testing.models(
    dtypes=REAL, widths=(64, 80, 96, 130), kinds=("linear", "addmm", "conv1d", "conv2d"), max_steps=3, sharing=False
)


@pytest.mark.slow
@examples(20)
@given(testing.adapted(LARGE, adapters=4, scales=st.floats(1e-4, 0.05)))
def test_small_adapters_keep_under_a_quarter_of_the_weight(case):
    """Of 4,096 elements and more, all adapters together changing W by 5 % at most: their ΔW add up in quadrature."""
    lora = dataclasses.replace(case, scale=case.scale / len(case.configs) ** 0.5).build()
    lora.merge_adapter()
    for path, (kept, size) in lora.report().merged.items():
        if lora.get_parameter(path).numel() >= 4096:
            assert kept < 0.25 * size + _of_adapters(lora), f"{path}: {kept} of {size} bytes"


@pytest.mark.slow
@examples(20)
@given(testing.adapted(testing.models(dtypes=REAL) | LARGE, adapters=4, scales=st.floats(1e-3, 100)))
def test_no_adapter_keeps_more_than_a_copy_of_the_weight(case):
    lora = case.build()
    lora.merge_adapter()
    assert lora.report().merged
    for path, (kept, size) in lora.report().merged.items():  # fingerprints are 32 bytes for each 4096 begun, twice
        assert kept <= size * (1 + 1 / 64) + 64 + _of_adapters(lora), f"{path}: {kept} of {size} bytes"


def _of_adapters(lora):
    """Bytes of all adapters' tensors, whose values at the merge are kept too."""
    return sum(lora.get_parameter(path).nbytes for a in lora._lorafx.adapters.values() for path in a.paths)


# --- and happens whole or not at all ---


@pytest.mark.slow
@examples(60)
@given(
    testing.adapted(testing.models(dtypes=REAL), adapters=3),
    st.sampled_from(["ΔW", "residual", "write"]),
    st.integers(0, 8),
    st.sampled_from(["merge", "merge on top", "unmerge"]),
)
def test_a_failure_half_way_leaves_every_weight_as_it_was(case, where, countdown, action):
    lora = case.build()
    original, names = _everything(lora), list(lora.active_adapters)
    if action != "merge":
        lora.merge_adapter(names[:1])
    before, merged = _everything(lora), list(lora.merged_adapters)
    act = lora.unmerge_adapter if action == "unmerge" else functools.partial(lora.merge_adapter, names)
    with warnings.catch_warnings(), _failing(where, countdown) as failed, contextlib.suppress(_Injected):
        warnings.simplefilter("ignore")  # of one adapter nothing is left to merge on top
        act()
    assert failed or countdown or action != "merge", "each part of merging is used at least once"
    if failed:
        testing.assert_same_tensors(_everything(lora), before)
        assert lora.merged_adapters == merged
    lora.unmerge_adapter()
    testing.assert_same_tensors(_everything(lora), original)


def _everything(lora):
    """Copies of all tensors, the adapters' own among them: a merge may write into a bias that an adapter trains."""
    return {path: tensor.clone() for path, tensor in lora.state_dict().items()}


class _Injected(Exception):
    """Raised on purpose."""


@contextlib.contextmanager
def _failing(where, countdown):
    """Let the next use but `countdown` of a part of merging raise; yields a list that tells whether it has."""
    place, name = {"ΔW": (Lora, "delta"), "residual": (Residual, "of"), "write": (torch.Tensor, "copy_")}[where]
    genuine, calls, failed = getattr(place, name), iter(range(countdown, -1, -1)), []

    def replacement(*args):
        if next(calls, None) == 0:
            failed.append(where)
            raise _Injected(where)
        return genuine(*args)

    with mock.patch.object(place, name, replacement):
        yield failed


# --- files ---


@pytest.mark.slow
@examples(25)
@given(testing.adapted(mergeable=False, adapters=3))
def test_saving_and_loading_is_the_identity(tmp_path_factory, case):
    testing.assert_roundtrip(case.build(), tmp_path_factory.mktemp("adapter"))


@pytest.mark.slow
@examples(10)
@given(testing.adapted(adapters=3))
def test_a_merged_model_saves_the_same_files(tmp_path_factory, case):
    folder = tmp_path_factory.mktemp("adapter")
    lora = case.build()
    lora.save_pretrained(folder / "before")
    lora.merge_adapter()
    lora.save_pretrained(folder / "merged")
    files = [file.relative_to(folder / "before") for file in (folder / "before").rglob("*") if file.is_file()]
    for file in files:
        assert (folder / "before" / file).read_bytes() == (folder / "merged" / file).read_bytes(), file


# --- passes and pipelines ---


@dataclasses.dataclass(frozen=True)
class PropertyPassWithOptions(Pass):
    """Has an option of each plain type."""

    text: str = ""
    count: int = 0
    rate: float = 0.0
    flag: bool = False
    nothing: None = None
    several: tuple = ()
    table: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PropertyPassOfOne(Pass):
    """Has one option."""

    only: object = None


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
NESTED = st.recursive(
    PLAIN | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
PASSES = st.one_of(
    st.sampled_from(lorafx.passes.default),
    st.builds(PropertyPassOfOne, NESTED),
    st.builds(
        PropertyPassWithOptions,
        text=st.text(),
        count=st.integers(),
        rate=st.floats(allow_nan=False, allow_infinity=False),
        flag=st.booleans(),
        several=st.lists(PLAIN).map(tuple),
        table=st.dictionaries(st.text(), NESTED, max_size=3),
    ),
)


@examples(50)
@given(st.lists(PASSES, max_size=5))
def test_pipelines_print_and_parse_to_themselves(passes):
    pipeline = Pipeline(*passes)
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert str(Pipeline.parse(str(pipeline))) == str(pipeline)


@pytest.mark.slow
@examples(6)
@given(testing.adapted(adapters=3, replaces=False), st.randoms())
def test_merging_all_adapters_reverses_their_insertion(case, random):
    """The graph before insertion and after merging is the same text up to node numbering, in any order of adapters."""
    lora = case.build()
    adapters = tuple(random.sample(lora._lorafx.context.adapters, len(case.configs)))
    texts = {}

    def note(previous, gm, following):
        texts[previous and previous.name] = numbered(gm)

    pipeline = Pipeline(Canonicalize(), MatchTargets(), InsertAdapters(), MergeAdapters())
    gm = lorafx.trace(lora, **case.model.inputs())
    read = {id(resolve(gm, node.target)) for node in gm.graph.find_nodes(op="get_attr")}
    adapted = {id(resolve(lora, site.weight)) for adapter in adapters for site in adapter.selection}
    pipeline.run(gm, Context(adapters, frozenset(lora.active_adapters)), [note])
    assert texts["merge_adapters"] == texts["match_targets"]
    assert (texts["insert_adapters"] != texts["match_targets"]) == (not read.isdisjoint(adapted))


def numbered(gm):
    """A graph as text in which nodes are numbers."""
    number = {node: f"%{index}" for index, node in enumerate(gm.graph.nodes)}

    def written(value):
        return torch.fx.node.map_aggregate(value, lambda leaf: number.get(leaf) or repr(leaf))

    return "\n".join(f"{number[n]} {n.op} {n.target} {written(n.args)} {written(n.kwargs)}" for n in gm.graph.nodes)

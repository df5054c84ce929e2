"""Test what you build on lorafx: hypothesis strategies for models and configs, and checks of what must always hold.

Needs `hypothesis` (the `dev` extra); `import lorafx` does not import this module. A test in four lines:

    @hypothesis.given(testing.adapted(adapters=2))
    def test_my_pass(case):
        lora = case.build(pipeline=my_pipeline)
        testing.assert_merged_equals_unmerged(lora, lambda model: model(**case.model.inputs()))

Checks raise `AssertionError`. Those that compare numbers derive their tolerance, see `tolerance`; the others compare
bits.
"""

from .adapters import Adapted, adaptable, adapted, configs, randomize
from .checks import (
    Call,
    adapter_tensors,
    assert_close,
    assert_gradients,
    assert_inert,
    assert_merge_is_exact,
    assert_merged_equals_unmerged,
    assert_roundtrip,
    assert_same_tensors,
    assert_unloaded_equals_unmerged,
    backward_error,
    base_tensors,
    bits,
    condition,
    evaluating,
    same_bits,
    tolerance,
)
from .models import DTYPES, Dag, Layer, RandomModel, Step, models

__all__ = [
    "DTYPES",
    "Adapted",
    "Call",
    "Dag",
    "Layer",
    "RandomModel",
    "Step",
    "adaptable",
    "adapted",
    "adapter_tensors",
    "assert_close",
    "assert_gradients",
    "assert_inert",
    "assert_merge_is_exact",
    "assert_merged_equals_unmerged",
    "assert_roundtrip",
    "assert_same_tensors",
    "assert_unloaded_equals_unmerged",
    "backward_error",
    "base_tensors",
    "bits",
    "condition",
    "configs",
    "evaluating",
    "models",
    "randomize",
    "same_bits",
    "tolerance",
]

"""What is for one kind of CPU: products and attention by the fastest of what torch has on this processor.

Formulas of operators call the functions below and nothing else of this room. They need not know which library
multiplies, or in which dtype: on any other device or processor each function is ATen's own operator.

    linear, matmul, over_rows        products of two matrices
    accumulated, add_over_rows       a product added to what is there
    product_with_update              a product of matrices, and a low-rank one added to it
    widened_where_slow               decorates a formula of products: in float32, where half precision is slow
    wide_where_slow                  tensors as such a formula gets them
    trained_linear                   a linear layer that a gradient goes through
    trained_attention                attention that a gradient goes through

The first six have no derivative of their own where they gain something: they are for the forward and backward of an
autograd function, and for what nobody derives. Passes ask what there is: `has_linear_for` and `has_attention_for` a
tensor, `product_pays` for a compiled graph, and `choices`, on which compiled code depends.
"""

from .attention import has_attention_for, trained_attention
from .half_precision import wide_where_slow, widened_where_slow
from .linear_layer import has_linear_for, trained_linear
from .products import (
    accumulated,
    add_over_rows,
    choices,
    linear,
    matmul,
    over_rows,
    product_pays,
    product_with_update,
)

__all__ = [
    "accumulated",
    "add_over_rows",
    "choices",
    "has_attention_for",
    "has_linear_for",
    "linear",
    "matmul",
    "over_rows",
    "product_pays",
    "product_with_update",
    "trained_attention",
    "trained_linear",
    "wide_where_slow",
    "widened_where_slow",
]

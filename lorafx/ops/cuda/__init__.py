"""What is for NVIDIA's GPUs: kernels in Triton, where a formula in torch's operators would read and write too often.

    has_cross_entropy_for, cross_entropy_in_place        logits that become the gradient of their loss

Operators ask `has_…_for` the tensors at hand. The answer is no where Triton is missing, for dtypes and tensors that a
kernel is not for, and where a first try fails, as it does without a C compiler; then they use torch's operators. Triton
is imported by the files of kernels alone, which are loaded when first needed.
"""

from .cross_entropy import cross_entropy_in_place, has_cross_entropy_for

__all__ = ["cross_entropy_in_place", "has_cross_entropy_for"]

"""Memory: where a tensor's begins, which tensors lie in the memory of others, and which may not be written to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..torch_private.tensors import is_wrapped
from .attached import named_own_modules
from .watched import PLAIN_TENSORS


def storage_of(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 for a tensor that has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # sparse, say
        return 0


def whole_storage_of(tensor: Tensor) -> int:
    """Where a parameter's memory begins, if that is all its own, and no flat buffer of many."""
    if type(tensor) not in PLAIN_TENSORS or tensor.is_meta or tensor.layout != torch.strided:
        return 0
    if is_wrapped(tensor):  # by a transform of torch.func's
        return 0
    return storage_of(tensor) if tensor.untyped_storage().nbytes() == tensor.nbytes else 0


def made_for_inference(tree: nn.Module) -> list[str]:
    """Paths of a model's own parameters that autograd keeps nothing of, and that may only be written to in that mode.

    `torch.inference_mode` has made them.
    """
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in named_own_modules(tree)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_inference()
    ]


class Shared:
    """Which tensors of a model lie in the memory of others: parameters of one storage are no tied weight.

    Those of adapters, of which there may be many, have memory of their own.
    """

    def __init__(self, tree: nn.Module):
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        for path, module in named_own_modules(tree):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and _lies_in_memory(tensor):
                    self._by_storage.setdefault(storage_of(tensor), []).append((f"{path}.{name}".lstrip("."), tensor))

    def objection(self, name: str, tensor: Tensor) -> str:
        """Why a write into a tensor would change more than its own numbers; empty if it would not."""
        if not _lies_in_memory(tensor):
            return ""
        if any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride())):
            return f"{name} is expanded: several of its numbers are one in memory; give its module a clone of it"
        near = self._by_storage.get(storage_of(tensor), ())
        others = [other for other, its in near if its is not tensor and _overlap(tensor, its)]
        if not others:
            return ""
        return (
            f"{name} shares its memory with {', '.join(others)}, which would change, too; give each module its own "
            "(`weight.clone()`), or tie them as one and the same parameter"
        )


def _lies_in_memory(tensor: Tensor) -> bool:
    plain = type(tensor) in PLAIN_TENSORS and tensor.layout == torch.strided
    return plain and not tensor.is_meta and not is_wrapped(tensor) and tensor.numel() > 0


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have a number in common; of two dtypes, whether they lie among each other."""
    (first, end), (others_first, others_end) = _span(one), _span(other)
    if end <= others_first or others_end <= first:
        return False
    if one.dtype != other.dtype:
        return True
    size, start = one.element_size(), min(first, others_first)
    marks = torch.zeros((max(end, others_end) - start) // size, dtype=torch.bool, device="cpu")
    marks.as_strided(one.shape, one.stride(), (first - start) // size).fill_(True)
    return bool(marks.as_strided(other.shape, other.stride(), (others_first - start) // size).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """Where its first number begins in memory and its last one ends, in bytes."""
    count = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + count * tensor.element_size()

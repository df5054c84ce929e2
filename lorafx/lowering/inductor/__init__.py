"""Passes that Inductor runs on a graph of ATen operators after its own, while it compiles a piece of ours.

In comes such a graph, out goes the same one rewritten in place: `onednn_products` writes products that a CPU has a
faster way for, `in_place_sums` adds to a product in its own memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.fx import Graph

from ... import ops
from ...torch_private import inductor
from ...torch_private.inductor import CustomGraphPass, get_hash_for_files
from .in_place_sums import SumsInPlace
from .onednn_products import ProductsByOnednn


class OurPasses(CustomGraphPass):
    """All of them, as the one pass for which Inductor has a setting."""

    _passes = ProductsByOnednn(), SumsInPlace()

    def __call__(self, graph: Graph) -> None:
        for each in self._passes:
            each(graph)

    def uuid(self) -> Any:
        """What compilations are kept by on disk: the passes, what these call, and the formulas of our operators.

        torch keeps a compiled graph by the operators' names alone, so another release's would be taken for this one's.
        """
        formulas = tuple(sorted(map(str, Path(ops.__file__).parent.rglob("*.py"))))
        return [get_hash_for_files((*formulas, str(inductor.__file__))), *(each.uuid() for each in self._passes)]


__all__ = ["OurPasses"]

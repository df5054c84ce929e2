"""Errors in a running graph: they name the line of the model that an operator came from, not one of generated code."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch.fx import GraphModule

from ..errors import user_line
from ..graph.blocks import blocks_of
from ..torch_private.graphs import node_at


def naming_lines(gm: GraphModule) -> Callable[..., Any]:
    """The graph as a function of its inputs. An error in it is as the operator raised it, with a note of the line."""

    def run(*inputs: Any) -> Any:
        try:
            return gm.forward(*inputs)
        except AssertionError:  # a guard, which says that the graph is not for these sizes
            raise
        except Exception as error:
            if line := _line(gm, error.__traceback__):
                error.add_note(f"in the model, {line}")
            raise

    return run


def _line(gm: GraphModule, traceback: TracebackType | None) -> str | None:
    """The model's line of the innermost node of the graph, or of one of its blocks, that was running."""
    codes = {type(part).forward.__code__: part for part in (gm, *blocks_of(gm))}
    line = None
    while traceback is not None:
        part = codes.get(traceback.tb_frame.f_code)
        node = node_at(part, traceback.tb_lineno) if part is not None else None
        line = user_line(node) if node is not None and "stack_trace" in node.meta else line
        traceback = traceback.tb_next
    return line

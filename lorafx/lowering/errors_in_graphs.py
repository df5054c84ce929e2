"""Errors in a running graph: they name the line of the model that an operator came from, not one of generated code."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch.fx import GraphModule

from ..errors import user_line
from ..graph.blocks import blocks_of
from ..torch_private.graphs import node_at
from .pieces import Compiled, Piece


def naming_lines(gm: GraphModule) -> Callable[..., Any]:
    """The graph as a function of its inputs. An error in it is as the operator raised it, with a note of the line."""

    def run(*inputs: Any) -> Any:
        try:
            return gm.forward(*inputs)
        except AssertionError:  # a guard, which says that the graph is not for these sizes
            raise
        except Exception as error:
            if note := _note(gm, error.__traceback__):
                error.add_note(note)
            raise

    return run


def naming_compiled(piece: Piece) -> Callable[..., Any]:
    """What was compiled as a whole, in which nobody knows the model's lines any more. An error in it says so."""

    def run(*inputs: Any) -> Any:
        try:
            return piece.run(*inputs)
        except AssertionError:
            raise
        except Exception as error:
            error.add_note(_of_compiled(piece))
            raise

    return run


def _of_compiled(piece: Piece) -> str:
    return f"in compiled code ({piece.title}); with backend='eager' the message names the model's line"


def _note(gm: GraphModule, traceback: TracebackType | None) -> str | None:
    """The model's line of the innermost node of the graph, or of one of its blocks, that was running.

    For a compiled piece it is which one that is.
    """
    # By identity: code that a compiler has made may hold what has no hash.
    codes = {id(type(part).forward.__code__): part for part in (gm, *blocks_of(gm)) if isinstance(part, GraphModule)}
    note = None
    while traceback is not None:
        if (part := codes.get(id(traceback.tb_frame.f_code))) is not None:
            node = node_at(part, traceback.tb_lineno)
            note = f"in the model, {user_line(node)}" if node is not None and "stack_trace" in node.meta else note
        elif traceback.tb_frame.f_code is Compiled.forward.__code__:
            note = _of_compiled(traceback.tb_frame.f_locals["self"].piece)
        traceback = traceback.tb_next
    return note

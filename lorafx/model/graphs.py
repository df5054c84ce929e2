"""Graphs: the rewritten graph of a call, as a value, as text about one place of it, and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from ..errors import CaptureError
from ..graph.modules import refresh
from ..serving.programs import Program
from ..showing import View, heats, record, view, write_page
from .part import Part
from .rows import acting_in


class Graphs(Part):
    """The part of an adapted model that has graphs for people to look at."""

    def graph(self, *args: Any, **kwargs: Any) -> GraphModule:
        """The rewritten graph that serves this call; captured now if none is kept. The call is not run.

        Raises `CaptureError` when the call cannot be captured as a whole.
        """
        gm = self._with_graph(args, kwargs).gm
        assert gm is not None, "it has one"
        refresh(gm, self.tree)
        return gm

    def show(self, name: str | None = None, /, *args: Any, html: str | Path | None = None, **kwargs: Any) -> View:
        """What the passes made of one place of a call: as captured, what each pass wrote, and as it is now.

        `name` is a site's, a module's, a layer's or a pass's; None tells of the whole call. The call is that with the
        other arguments, which is captured now if no graph is kept for it, and not run; without any, it is the call
        that a graph has served last. `html` is a path to which a page of the whole call is written, opened at `name`:
        one file, which needs no network. The passes run once more, on a copy, for this.

        Raises `SelectionError` for a name that is not in this call, `CaptureError` if it has no graph, and `OSError`
        if the page cannot be written.
        """
        program = self._with_graph(args, kwargs) if args or kwargs else self._used_last()
        state, tree = self._lorafx, self.tree
        history = record(program.to_rewrite(tree), state.dispatcher.pipeline, program.context)
        shown = view(history, name)
        if html is not None:
            title = f"{type(state.base).__name__}: {program.title}"
            write_page(html, title, history, heats(tree, program.context.adapters), name or "")
        return shown

    def _with_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        context, kwargs = acting_in(self.tree, args, kwargs)
        program = self._lorafx.dispatcher.program(self.tree, context, args, kwargs)
        if program.gm is None:
            raise CaptureError(f"this call is served by sites, there is no graph of the whole: {program.reason}")
        return program

    def _used_last(self) -> Program:
        kept = [program for program in self._lorafx.dispatcher if program.gm is not None]
        if not kept:
            raise CaptureError(
                "no call has a graph yet: it gets one when such calls have come often. Give show() the arguments of a "
                "call, and it has one at once: show(input_ids=ids), or after a name, show(name, input_ids=ids)"
            )
        return kept[-1]

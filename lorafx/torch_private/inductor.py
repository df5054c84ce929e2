"""What a pass of ours within Inductor is made of. Imported when something is compiled, for it takes seconds."""

from __future__ import annotations

from typing import Any

from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

__all__ = [
    # What runs after Inductor's passes, and what says in its cache that it did. Without it, no pass of ours would.
    "CustomGraphPass",
    # A number for the text of files, for a `CustomGraphPass`. Without it, old compilations would outlive our passes.
    "get_hash_for_files",
    # Settings of Inductor. Without it, our passes would push others' aside, and add where a template does.
    "inductor",
]

# Inductor's setting for a pass after its own on ATen operators.
POST_PASS = "post_grad_custom_post_pass"


def let_inductor_call(operator: Any, name: str) -> None:
    """Have Inductor call an operator that writes in place by this name. Without it, sums would take new memory.

    By itself it would write ATen's operators out where it can, and call others by their overloads, which takes longer.
    """
    from torch._inductor.ir import FallbackKernel  # takes seconds; a pass runs when it is there
    from torch._inductor.lowering import lowerings, register_lowering
    from torch._inductor.virtualized import V

    class Called(FallbackKernel):
        def set_python_kernel_name(self, python_kernel_name: str | None) -> None:
            self.python_kernel_name = name

        @classmethod
        def process_kernel(cls, *given: Any, **named: Any) -> Any:
            return None, *super().process_kernel(*given, **named)[1:]  # a name for the result would keep its memory

    def call(written: Any, *args: Any, **kwargs: Any) -> None:
        written.realize()
        V.graph.mark_buffer_mutated(written.get_name())  # or whoever reads it would compute it anew
        Called.create(operator, written, *args, **kwargs)

    if operator not in lowerings:
        register_lowering(operator, type_promotion_kind=None)(call)

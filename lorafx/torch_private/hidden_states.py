"""hidden_states: the hooks that have transformers' models record hidden states, hung up by the first call for these."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

_HUNG_UP = "_output_capturing_hooks_installed"  # transformers sets it on a model that has its hooks


def record_as_asked(model: nn.Module, changed: Iterable[str]) -> bool:
    """Hang up the hooks of each model below that a call would have hung up; whether there is any.

    `changed` are the dotted names of what the call has set. Without it, a call for hidden states could not be captured
    before the model's own Python has run one.
    """
    paths = [name.removesuffix(_HUNG_UP).rstrip(".") for name in changed if name.endswith(_HUNG_UP)]
    without = [part for part in map(model.get_submodule, paths) if not getattr(part, _HUNG_UP, False)]
    if without:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks

        for part in without:
            maybe_install_capturing_hooks(part)  # type: ignore[arg-type]
    return bool(without)

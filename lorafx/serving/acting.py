"""Acting: whether a call runs a site of the active adapters at all. A net under everything that finds sites.

A model may read a weight where nobody sees it: through numpy, or from a copy that it made before it was adapted. Such a
call gives what the base gives, and nothing is trained. So each kind of call is asked when it first comes, one by sites
each time: if no site acts, that is said once, and a training step of which nothing reaches an adapter is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ..errors import AdapterError, warn
from ..graph.blocks import blocks_of
from ..graph.emit import SITE, made_by
from ..ops.deferral import Deferred
from ..torch_private.graphs import home_of
from ..torch_private.tensors import is_compiled_now, is_wrapped
from ..tree.lookup import find_tensor
from .call_key import Call

# Functions of these are given all tensors that they pass gradients to, as re-entrant checkpoints are not.
_SEEN_THROUGH = ("lorafx.", "torch._library.", "torch._functorch.")
_ADVICE = "Choose targets that this call runs (the model may read their weights in a way that no graph shows)"


def acts_in(gm: GraphModule) -> bool:
    """Whether a rewritten graph, or a block that it runs, has a site or reads an adapter's own copy of a tensor."""
    nodes = (node for part in (gm, *blocks_of(gm)) for node in part.graph.nodes)
    return any(SITE in node.meta or ((maker := made_by(node)) is not None and maker.adapter) for node in nodes)


class Acting:
    """What is known of one adapted model's calls: in which parts the adapters have acted, and what was said."""

    def __init__(self) -> None:
        self._acted: set[tuple[tuple[str, ...], str]] = set()  # adapters, and the part that was called
        self._said: set[tuple[tuple[str, ...], str]] = set()

    def forget(self, adapter: str) -> None:
        """Forget where an adapter acted, which is deleted."""
        self._acted = {each for each in tuple(self._acted) if adapter not in each[0]}
        self._said = {each for each in tuple(self._said) if adapter not in each[0]}

    def see(self, call: Call, acts: bool, result: Any = None) -> None:
        """Note whether a call runs a site; if it does not, say so once, or raise `AdapterError` in a training step.

        `result` is what the call gave, if it has run: threads of the model's own may have run sites unseen.
        """
        names = _names(call)
        if acts:
            self._acted.add((names, call.path))
        elif any(_within(call)) and not (_leads_back(call.leaves, call, unknown=True) or _leads_back(result, call)):
            if not call.path and _wants_gradients(call):
                raise AdapterError(
                    f"{_subject(call)} runs no site of {_listed(names)}, so this training step would train nothing of "
                    f"{_sites(call)}. {_ADVICE}, or call `eval()`, or use `torch.no_grad()`, to train nothing"
                )
            if (names, call.path) not in self._said and not self._has_acted_before(names, call):
                self._said.add((names, call.path))
                warn(f"{_subject(call)} runs no site of {_listed(names)}: the result is the base model's. {_ADVICE}")

    def _has_acted_before(self, names: tuple[str, ...], call: Call) -> bool:
        """Whether the adapters acted where this call's arguments come from: in a part that was called by itself, or in
        the call that filled a cache. An encoder's sites do not run again while the decoder decodes."""
        parts = {part for known, part in tuple(self._acted) if known == names}
        given_more_than_tensors = any(each is not None for each in call.structure[2])  # type: ignore[index]
        return bool(parts - {""}) or bool(parts and given_more_than_tensors)

    def require_gradients(self, call: Call, result: Any) -> None:
        """Raise `AdapterError` if backward from what a training step gave would reach no adapter, and something else.

        It is silent on what it does not see through: another library's autograd functions, parameters that are no
        longer the model's own, transforms. Where backward would reach nothing, torch says so itself.
        """
        if call.path or not _wants_gradients(call):
            return
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not outputs or not all(map(_is_plain, outputs)) or is_compiled_now():
            return
        trained = set(map(id, _trained(call)))
        if any(id(leaf) in trained for leaf in _reached(outputs)):  # the first that is found will do
            return
        own = set(map(id, (*call.leaves, *call.tree.parameters())))
        if all(id(leaf) in own for leaf in _reached(outputs)):
            raise AdapterError(
                f"no gradient of what {_subject(call)} gives reaches {_listed(_names(call))}, so this training step "
                f"would train nothing of {_sites(call)}: does the model detach what they give, or run them in "
                "`no_grad`?"
            )


def _wants_gradients(call: Call) -> bool:
    """Whether a call is a training step: gradients are on, its module trains, and so do tensors that act unmerged."""
    training = torch.is_grad_enabled() and call.tree.get_submodule(call.path).training
    return training and any(tensor.requires_grad for tensor in _trained(call))


def _trained(call: Call) -> Iterator[Tensor]:
    """The tensors of adapters that are not merged."""
    paths = (path for a in call.context.adapters if a.name not in call.context.merged for path in a.paths)
    yield from (tensor for tensor in (find_tensor(call.tree, path) for path in paths) if tensor is not None)


def _within(call: Call) -> Iterator[str]:
    """The paths of the adapted tensors below the module that is called."""
    for adapter in call.context.adapters:
        for path in (*(site.weight for site in adapter.selection), *adapter.replaced):
            if path.startswith(f"{call.path}." if call.path else ""):
                yield path


def _leads_back(values: Any, call: Call, unknown: bool = False) -> bool:
    """Whether backward from one of these values reaches a tensor of the adapters, as from an encoder's output.

    `unknown` is the answer for what happens inside another library's function.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    trained = set(map(id, _trained(call))) if leaves else set()
    return any(unknown if leaf is None else id(leaf) in trained for leaf in _reached(leaves))


def _reached(outputs: list[Tensor]) -> Iterator[Tensor | None]:
    """The leaves that backward would reach; None for what happens inside another library's function."""
    pending: list[Any] = [output.grad_fn for output in outputs]
    yield from (output for output in outputs if output.grad_fn is None)
    seen: set[Any] = set()
    while pending:
        function = pending.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            yield function.variable
        elif (home := home_of(function)) and not home.startswith(_SEEN_THROUGH):
            yield None
        pending.extend(following for following, _ in function.next_functions)


def _is_plain(output: Tensor) -> bool:
    """Whether autograd's history of a tensor can be looked at."""
    return type(output) in (Tensor, nn.Parameter, Deferred) and not is_wrapped(output)


def _names(call: Call) -> tuple[str, ...]:
    return tuple(adapter.name for adapter in call.context.adapters)


def _subject(call: Call) -> str:
    module: nn.Module = call.tree.get_submodule(call.path)
    return f"this call of {type(module).__name__}" + (f" ({call.path})" if call.path else "")


def _listed(names: tuple[str, ...]) -> str:
    return "the adapter" + ("s " if len(names) > 1 else " ") + ", ".join(map(repr, names))


def _sites(call: Call) -> str:
    """The sites by name, the first few of many."""
    named = [site.name for site in call.context.selection] or list(_within(call))
    return ", ".join(named[:4]) + (f" and {len(named) - 4} more sites" if len(named) > 4 else "")

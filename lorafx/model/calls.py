"""Calls of an adapted model, and of the modules in it that hold sites: each is served by what is kept for its kind."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..adapters.adapter import Adapter
from ..errors import warn
from ..serving.call_key import in_one_order
from ..serving.choosing import Choice, choosing, chosen_for
from ..serving.per_site import SiteInterpreter
from ..torch_private.compilers import compiler_in_charge, not_traced
from ..torch_private.tensors import ENTRANCE
from ..tree.holdings import leads_to
from ..tree.hooks import RUNNING
from ..tree.lookup import module_at
from ..tree.mirror import STATE, own_forward, show_own_forward
from ..tree.wrappers import innermost
from .backward import prepare, require_kept
from .bounds import keep_within_bounds
from .penalties import add_penalties
from .rows import NAMES, as_chosen, choice_of, named
from .state import State

# What Dynamo says where somebody wants a graph of more than the adapted model.
WITHIN_DYNAMO = (
    "a model adapted by lorafx is a graph of its own: give torch.compile that model with fullgraph=True, or the "
    "function around it with fullgraph=False; and torch.export the model with strict=False"
)


@not_traced(WITHIN_DYNAMO)
def serve(tree: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a call of the module at `path`; rows may have adapters of their own (`rows.py`)."""
    state: State = vars(tree)[STATE]
    choice = chosen_for(state)
    if NAMES in kwargs or SiteInterpreter.running(tree) is None:
        choice, kwargs = choice_of(tree, path, args, kwargs, choice)
    if choice is None:
        return _serve(tree, state, None, path, args, kwargs)
    with choosing(choice.within):
        return _serve(tree, state, choice, path, args, kwargs)


def _serve(
    tree: nn.Module, state: State, choice: Choice | None, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if (interpreter := SiteInterpreter.running(tree)) is not None:
        return interpreter.step_into(interpreter, path, innermost(module_at(tree, path)), args, kwargs)
    if (outer := RUNNING.mode) is not None:  # of another model, perhaps of the same base
        outer.see_all()
        with outer.suspended():
            return _serve(tree, state, choice, path, args, kwargs)
    if state.replicas is not None:
        state.replicas.follow()
    if not path and (replaced := state.originals.replaced()):
        warn(
            f"{', '.join(replaced)} of the base was replaced since it was adapted, and the adapted model keeps the "
            "modules that it has: replace them there, as by its own `resize_token_embeddings`, or adapt the base anew"
        )
    context = state.context
    names = state.acting
    if choice is not None:
        context, kwargs = as_chosen(choice, args, in_one_order(type(module_at(tree, path)), kwargs))
        names = () if state.disabled else tuple(named(choice))
    acting = [state.adapters[name] for name in names if name not in context.merged]
    keep_within_bounds(tree, acting)
    try:
        result = state.dispatcher_within(compiler_in_charge()).serve(tree, context, path, args, kwargs)
    except RuntimeError as error:
        require_kept(tree, error)
        raise
    if not path:
        add_penalties(tree, acting, result)
        prepare(state, tree, result)
    return result


class PartCall:
    """The forward of a module that holds sites: a call of this part alone is a call of its own, with its own graph.

    `replaced` has the `forward` that was an attribute of the module itself when this took its place, if there was one.
    That is what runs, whatever somebody has put around this meanwhile.
    """

    lorafx = True

    def __init__(self, tree: nn.Module, path: str):
        self.tree, self.path, self.module = tree, path, innermost(module_at(tree, path))
        self.replaced = {k: v for k, v in vars(self.module).items() if k == "forward"}
        show_own_forward(self.module, self.replaced.get("forward"))

    @not_traced(WITHIN_DYNAMO)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = SiteInterpreter.running(self.tree)
        if running is not None and NAMES not in kwargs:
            if (result := running.run_site(self.path, args, kwargs)) is not NotImplemented:
                return result
            return running.step_into(running, self.path, self.module, args, kwargs)
        show_own_forward(self.module, self.replaced.get("forward"))
        return serve(self.tree, self.path, args, kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the part's own forward: transformers asks which arguments a part takes that generates by itself."""
        return inspect.signature(own_forward(self.module))


class Entrance:
    """What runs when a served module is called: what nn.Module runs, once its forward is sure to be what serves it.

    A module may choose its forward anew while it runs or goes into another mode, or somebody may. A model around it
    would find the site all the same, but a call of the module alone would be the base's.
    """

    lorafx = True

    def __init__(self, module: nn.Module, serving: PartCall):
        self.module, self.serving = module, serving
        self.replaced: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.take_over()
        return getattr(type(self.module), ENTRANCE)(self.module, *args, **kwargs)

    def take_over(self) -> None:
        """Go on serving the module by the forward that it has now, if that is another.

        A forward that leads to one that serves is left where it is, as a wrapper around that; it may be an earlier one,
        which somebody has kept to put it back.
        """
        attributes = vars(self.module)
        forward = attributes.get("forward")
        if forward is self.serving:
            return
        found: list[PartCall] = []

        def serves(held: Any) -> bool:
            if isinstance(held, PartCall) and held.tree is self.serving.tree and held.path == self.serving.path:
                found.append(held)
            return bool(found)

        if leads_to(forward, serves):
            self.serving = found[0]
        else:
            self.serving = attributes["forward"] = PartCall(self.serving.tree, self.serving.path)  # type: ignore
        show_own_forward(self.serving.module, self.serving.replaced.get("forward"))


def serve_parts(tree: nn.Module, adapter: Adapter) -> None:
    """Have the modules that contain an adapter's sites or own copies, at any depth, be served when called alone."""
    for path in _parts(adapter):
        part = tree.get_submodule(path)
        if (entrance := vars(part).get(ENTRANCE)) is not None:
            entrance.take_over()
            continue
        vars(part)["forward"] = serving = PartCall(tree, path)
        vars(part)[ENTRANCE] = Entrance(part, serving)


def _parts(adapter: Adapter) -> Iterator[str]:
    """Paths of the modules that contain an adapter's sites or own copies, at any depth; the root is not among them."""
    owners = [site.module for site in adapter.selection] + [base.rpartition(".")[0] for base in adapter.replaced]
    paths = {".".join(owner.split(".")[:depth]) for owner in owners for depth in range(1, owner.count(".") + 2)}
    yield from sorted(path for path in paths if path)

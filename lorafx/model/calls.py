"""Calls of an adapted model, and of the modules in it that hold sites: each is served by what is kept for its kind."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..adapters.adapter import Adapter
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
from .backward import prepare
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
    context = state.context
    names = state.acting
    if choice is not None:
        context, kwargs = as_chosen(tree, choice, args, in_one_order(type(module_at(tree, path)), kwargs))
        names = () if state.disabled else tuple(named(choice))
    acting = [state.adapters[name] for name in names if name not in context.merged]
    keep_within_bounds(tree, acting)
    result = state.dispatcher_within(compiler_in_charge()).serve(tree, context, path, args, kwargs)
    if not path:
        add_penalties(tree, acting, result)
        prepare(state, tree, result)
    return result


class PartCall:
    """The forward of a module that holds sites: a call of this part alone is a call of its own, with its own graph.

    `replaced` has the `forward` that is an attribute of the module itself, if there is one. That is what runs, whatever
    somebody has put around this meanwhile.
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

    def take_over(self, attributes: dict[str, Any]) -> None:
        """Go on serving a module of these attributes, by the forward that it has now, if it has been given another.

        A forward that leads here, as a wrapper around this does, is left where it is.
        """
        forward = attributes.get("forward")
        if not leads_to(forward, lambda held: held is self):
            self.replaced = {} if forward is None else {"forward": forward}
            attributes["forward"] = self
            show_own_forward(self.module, forward)


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
        attributes = vars(self.module)
        if attributes.get("forward") is not self.serving:
            self.serving.take_over(attributes)
        return getattr(type(self.module), ENTRANCE)(self.module, *args, **kwargs)


def serve_parts(tree: nn.Module, adapter: Adapter) -> None:
    """Have the modules that contain an adapter's sites or own copies, at any depth, be served when called alone."""
    for path in _parts(adapter):
        part = tree.get_submodule(path)
        if (entrance := vars(part).get(ENTRANCE)) is not None:
            entrance.serving.take_over(vars(part))
            continue
        vars(part)["forward"] = serving = PartCall(tree, path)
        vars(part)[ENTRANCE] = Entrance(part, serving)


def _parts(adapter: Adapter) -> Iterator[str]:
    """Paths of the modules that contain an adapter's sites or own copies, at any depth; the root is not among them."""
    owners = [site.module for site in adapter.selection] + [base.rpartition(".")[0] for base in adapter.replaced]
    paths = {".".join(owner.split(".")[:depth]) for owner in owners for depth in range(1, owner.count(".") + 2)}
    yield from sorted(path for path in paths if path)

"""Module stacks: the modules in which each node was computed, outermost first, by their paths from the root.

Where a model shares modules, torch.export names each by how it was reached. A module that was reached without torch's
knowing, as from a container that is iterated over, or whose `forward` is an attribute of its own, then has what it
reaches named from itself on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule

STACK = "nn_module_stack"  # in a node's meta: of each module its path, with `@` and a number from the second call on


def name_from_the_root(gm: GraphModule, root: nn.Module) -> None:
    """Have the stacks of a graph that was exported of `root` name all modules from there."""
    modules = dict(root.named_modules(remove_duplicate=False))
    if len(modules) == len(set(modules.values())):
        return
    for node in gm.graph.nodes:
        if stack := node.meta.get(STACK):
            node.meta[STACK] = _from_the_root(stack, modules)


def _from_the_root(stack: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    outer: list[str] = []  # the modules around, outermost first, from the root
    found = {}
    for key, (path, kind) in stack.items():
        plain, at, number = path.partition("@")
        inside = any(plain.startswith(f"{each}.") for each in outer)
        candidates = () if inside else [f"{each}.{plain}" for each in reversed(outer)]
        plain = next((each for each in candidates if each in paths), plain)
        found[key] = f"{plain}{at}{number}", kind
        outer += [plain] if plain else []
    return found

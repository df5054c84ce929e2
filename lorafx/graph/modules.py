"""Graph modules over a module tree: they read its tensors from it, and own only what the tree does not have."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..torch_private.graphs import GUARDS, codegen_of
from ..tree.lookup import find_tensor
from . import resolve
from .blocks import LAYERS
from .module_stacks import name_from_the_root

CAPTURED = "captured"
PLAIN = "plain"  # in a graph module's meta: names of tensors it reads that are plain attributes of the tree's root


# What a graph module has besides its children and tensors: a model whose root uses such a name has no graph.
_TAKEN = {CAPTURED, *dir(GraphModule(nn.Module(), Graph()))} - set(dir(nn.Module()))


class GraphOverTree(GraphModule):
    """A graph module whose children and tensors are a tree's own."""

    def __reduce__(self) -> NoReturn:
        raise CaptureError(
            "a graph is not pickled: it runs on the model's own modules, and holds code that was written in this "
            "process. Pickle the model, or save its adapters, and ask for the graph of a call there; copy.deepcopy "
            "gives a graph with tensors of its own"
        )


def taken_names(root: nn.Module) -> list[str]:
    """The names of the root's own children and tensors that mean something else on a graph module, as `graph` does."""
    plain = [name for name, value in vars(root).items() if isinstance(value, Tensor)]
    return [name for name in (*root._modules, *root._parameters, *root._buffers, *plain) if name in _TAKEN]


def rooted(exported: GraphModule, tree: nn.Module) -> GraphModule:
    """The exported graph as a module over `tree`: it reads the tree's tensors from the tree, the rest from `captured`.

    The rest is what only the graph has: lifted constants, guards, bodies of control-flow operators.
    """
    name_from_the_root(exported, tree)
    private = nn.Module()
    for node in exported.graph.nodes:
        if node.op == "get_attr" and not node.users:  # torch.export reads every tensor, used or not
            exported.graph.erase_node(node)
            continue
        if node.op not in ("get_attr", "call_module") or find_tensor(tree, str(node.target)) is not None:
            continue
        atom = str(node.target).replace(".", "_")
        value = resolve(exported, str(node.target))
        if isinstance(value, nn.Module):
            private.add_module(atom, value)
        elif isinstance(value, Tensor):
            private.register_buffer(atom, value, persistent=False)
        else:
            setattr(private, atom, value)
        node.target = f"{CAPTURED}.{atom}"
    return over(exported.graph, tree, private)


def over(graph: Graph, tree: nn.Module, private: nn.Module) -> GraphModule:
    """A GraphModule that runs `graph` on the modules and tensors of `tree`, shared and not copied.

    `private` holds what only the graph has; it becomes the submodule `captured`.
    """
    gm = GraphOverTree(nn.Module(), Graph(), class_name="GraphModule")
    gm.__dict__["_parameters"], gm.__dict__["_buffers"] = tree._parameters, tree._buffers
    gm.__dict__["_modules"] = {**tree._modules, CAPTURED: private}
    gm.training = tree.training
    targets = [str(node.target) for node in graph.find_nodes(op="get_attr")]
    gm.meta[PLAIN] = [name for name in targets if isinstance(vars(tree).get(name), Tensor)]
    refresh(gm, tree)
    gm.graph = graph
    return gm


def copied(gm: GraphModule, tree: nn.Module) -> GraphModule:
    """A copy over the same tree, blocks included, that can be rewritten while the original stays as it is."""
    private = copy.copy(gm.get_submodule(CAPTURED))
    private.__dict__["_modules"] = {name: _copied_block(child, tree) for name, child in private._modules.items()}
    other = over(copied_graph(gm.graph), tree, private)
    other.meta = {**gm.meta, **other.meta}
    return other


def _copied_block(child: nn.Module | None, tree: nn.Module) -> nn.Module | None:
    if not (isinstance(child, GraphModule) and LAYERS in child.meta):
        return child
    block = copied(child, tree.get_submodule(child.meta[LAYERS][0]))
    block.meta[LAYERS] = list(child.meta[LAYERS])
    return block


def by_leaves(gm: GraphModule) -> GraphModule:
    """A copy that takes the leaves of a call's arguments and returns those of its output, flattening nothing itself."""
    other = copied(gm, gm)
    other.graph.set_codegen(CodeGen())
    other.recompile()
    return other


def copied_graph(graph: Graph) -> Graph:
    """The same nodes with the same metadata, called the same way."""
    other = Graph()
    other.output(other.graph_copy(graph, {}))
    other.set_codegen(codegen_of(graph))
    return other


def accepts(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a graph's guards accept a call with the call key that the graph was captured for."""
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), pytree.tree_leaves((args, kwargs))))
    try:
        for node in gm.graph.find_nodes(op="call_module", target=f"{CAPTURED}.{GUARDS}"):
            gm.get_submodule(str(node.target))(*(values[argument] for argument in node.args))
    except AssertionError:
        return False
    return True


def refresh(gm: GraphModule, tree: nn.Module) -> None:
    """Take over the root's children, and tensors that are plain attributes, where the tree has replaced them since."""
    for name, child in tree._modules.items():
        if name != CAPTURED and gm._modules.get(name) is not child:
            gm._modules[name] = child
    for name in gm.meta[PLAIN]:
        gm.__dict__[name] = vars(tree)[name]

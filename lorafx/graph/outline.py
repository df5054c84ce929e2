"""Outlining: a region of a graph becomes a graph of its own; inlining: a call of a block becomes operators again.

`block_of` and `replace_region` turn a region into a block that layers run; `graph_of` and `call_module_instead` cut it
out, to be run by any module.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node

from . import INHERITED, MADE_BY, Provenance
from .blocks import LAYERS, block_calls, call_block
from .modules import CAPTURED, over
from .regions import Region, signature

Stack = dict[str, tuple[str, type]]


def graph_of(region: Region) -> Graph:
    """A region as a graph: from the region's inputs to the tuple of its outputs.

    Tensors of the region's own module are read by paths relative to that module.
    """
    graph = Graph()
    copies = {node: _input_like(graph, node.name, node) for node in region.inputs}
    for node in region.nodes:
        for read in node.all_input_nodes:
            if read in region.own and read not in copies:
                copies[read] = graph.get_attr(region.own[read])
                copies[read].meta = dict(read.meta)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta["nn_module_stack"] = _relative(node.meta.get("nn_module_stack"), region.path)
    graph.output(tuple(copies[node] for node in region.outputs))
    return graph


def with_reads_as_inputs(graph: Graph) -> tuple[Graph, list[str]]:
    """A copy that takes each attribute that it reads as an input, ahead of its own; and the attributes' paths."""
    lifted = Graph()
    copies: dict[Node, Node] = {}
    reads = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
    inputs = {path: _input_like(lifted, path.replace(".", "_"), node) for path, node in reads.items()}
    for node in graph.nodes:
        known = inputs.get(str(node.target)) if node.op == "get_attr" else None
        copies[node] = known or lifted.node_copy(node, copies.__getitem__)
    return lifted, list(reads)


def _input_like(graph: Graph, name: str, node: Node) -> Node:
    """A new input of `graph`, described like a node of another graph."""
    placeholder = graph.placeholder(name)
    placeholder.meta["val"] = node.meta.get("val")
    return placeholder


def block_of(gm: GraphModule, region: Region) -> GraphModule:
    """A new block with the operators of a region, over the region's module, kept in the outer graph's `captured`."""
    return keep_block(gm, over(graph_of(region), gm.get_submodule(region.path), nn.Module()))


def keep_block(gm: GraphModule, block: GraphModule) -> GraphModule:
    """Keep a block in the outer graph's `captured` under a new name; no layer runs it yet."""
    captured = gm.get_submodule(CAPTURED)
    number = next(n for n in range(len(captured._modules) + 1) if f"block_{n}" not in captured._modules)
    block.meta |= {LAYERS: [], "name": f"block_{number}"}
    captured.add_module(block.meta["name"], block)
    return block


def replace_region(gm: GraphModule, region: Region, block: GraphModule, made_by: Provenance | None = None) -> None:
    """Put a call of a block in a region's place. The block's operators must be the region's, in the same order."""
    theirs = dict(zip(_operators(block.graph), region.nodes, strict=True))
    inputs = dict(zip(_inputs_by_use(block.graph), region.inputs, strict=True))
    results = block.graph.output_node().args[0]
    given = [inputs[node] for node in block.graph.find_nodes(op="placeholder")]
    parts = insert_call(gm, region.nodes[-1], block, region.path, given, made_by)
    _take_place(gm.graph, region, {theirs[result]: part for result, part in zip(results, parts)})  # type: ignore


def call_module_instead(graph: Graph, region: Region, path: str) -> None:
    """Put a call of the module at `path` in a region's place: from the region's inputs to a tuple of its outputs."""
    outputs = region.outputs
    with graph.inserting_after(region.nodes[-1]):
        call = graph.call_module(path, region.inputs)
    _take_place(graph, region, dict(zip(outputs, _parts(graph, call, len(outputs)))))


def _take_place(graph: Graph, region: Region, parts: dict[Node, Node]) -> None:
    """Replace uses of a region's outputs by `parts`, and erase the region."""
    inside = set(region.nodes)
    for node, part in parts.items():
        node.replace_all_uses_with(part, delete_user_cb=lambda user: user not in inside)
        if not part.users:
            graph.erase_node(part)
    for node in reversed(region.nodes):
        graph.erase_node(node)
    for read in region.own:
        if not read.users:
            graph.erase_node(read)


def _parts(graph: Graph, call: Node, count: int) -> list[Node]:
    """A node for each of the outputs of a call, right after it."""
    parts: list[Node] = []
    for number in range(count):
        with graph.inserting_after(parts[-1] if parts else call):
            parts.append(graph.call_function(operator.getitem, (call, number)))
    return parts


def signature_of(block: GraphModule) -> Hashable:
    """The `Region.signature` of the regions that this block can replace; None if some of its inputs are unused."""
    inputs = _inputs_by_use(block.graph)
    if len(inputs) < len(block.graph.find_nodes(op="placeholder")):
        return None
    own = {node: ("own", str(node.target)) for node in block.graph.find_nodes(op="get_attr")}
    return signature(inputs, _operators(block.graph), own)


def add_outputs(gm: GraphModule, block: GraphModule, numbers: Iterable[int]) -> None:
    """Add to a block's outputs the results of its operators at these positions."""
    operators, output = _operators(block.graph), block.graph.output_node()
    results = dict.fromkeys((*output.args[0], *(operators[number] for number in numbers)))  # type: ignore[misc]
    output.args = (tuple(results),)
    for call, other, _ in block_calls(gm):
        if other is block:
            call.meta["val"] = tuple(result.meta.get("val") for result in results)


def _operators(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def _inputs_by_use(graph: Graph) -> list[Node]:
    reads = (read for node in _operators(graph) for read in node.all_input_nodes if read.op == "placeholder")
    return list(dict.fromkeys(reads))


def insert_call(
    gm: GraphModule, after: Node, block: GraphModule, layer: str, inputs: Iterable[Any], made_by: Provenance | None
) -> list[Node]:
    """Write a call of a block into a graph, and a node for each of its outputs, which are returned."""
    graph = gm.graph
    inherited = {key: after.meta[key] for key in INHERITED if key in after.meta}
    values = tuple(node.meta.get("val") for node in block.graph.output_node().args[0])  # type: ignore[union-attr]

    def described(node: Node, val: object) -> Node:
        node.meta = inherited | ({MADE_BY: made_by} if made_by else {}) | {"val": val}
        return node

    with graph.inserting_after(after):
        spot = described(graph.get_attr(f"{CAPTURED}.{block.meta['name']}"), block)
    with graph.inserting_after(spot):
        module = described(graph.get_attr(layer), gm.get_submodule(layer))
    with graph.inserting_after(module):
        call = described(graph.call_function(call_block, (spot, module, *inputs)), values)
    return [described(part, value) for part, value in zip(_parts(graph, call, len(values)), values)]


def inline_call(gm: GraphModule, call: Node, block: GraphModule, layer: str, made_by: Provenance | None = None) -> None:
    """Put a block's operators, on the tensors of the layer, in the place of a call of the block."""
    graph, inputs = gm.graph, list(call.args[2:])
    copies: dict[Node, Node] = dict(zip(block.graph.find_nodes(op="placeholder"), inputs))  # type: ignore[arg-type]
    with graph.inserting_before(call):
        for node in block.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":
                copies[node].target = f"{layer}.{node.target}"
            if made_by:
                copies[node].meta.setdefault(MADE_BY, made_by)
            copies[node].meta["nn_module_stack"] = _below(node.meta.get("nn_module_stack"), layer)
    reads = [read for read in call.args[:2] if isinstance(read, Node)]
    results = block.graph.output_node().args[0]
    for part in list(call.users):
        assert part.target is operator.getitem
        part.replace_all_uses_with(copies[results[part.args[1]]])  # type: ignore[index, call-overload]
        graph.erase_node(part)
    graph.erase_node(call)
    for read in reads:
        if not read.users:
            graph.erase_node(read)


def give_to_blocks(gm: GraphModule, value: Node) -> None:
    """Give each call of a block one more input, the last, by the name of the input of the outer graph that it is."""
    for call, block, _ in list(block_calls(gm)):
        inputs = block.graph.find_nodes(op="placeholder")
        if all(node.target != value.target for node in inputs):
            with block.graph.inserting_after(inputs[-1]) if inputs else block.graph.inserting_before():
                _input_like(block.graph, str(value.target), value)
        call.args = (*call.args, value)


def run_instead(call: Node, block: GraphModule) -> None:
    """Make a call run another block."""
    spot = call.args[0]
    assert isinstance(spot, Node) and len(spot.users) == 1
    spot.target, spot.meta = f"{CAPTURED}.{block.meta['name']}", spot.meta | {"val": block}


def list_layers(gm: GraphModule) -> None:
    """Write into each block's meta which layers run it, in order, and drop the blocks that no layer runs."""
    captured = gm.get_submodule(CAPTURED)
    layers: dict[GraphModule, dict[str, None]] = {}
    for _, block, layer in block_calls(gm):
        layers.setdefault(block, {})[layer] = None
    for name, child in list(captured._modules.items()):
        if isinstance(child, GraphModule) and LAYERS in child.meta:
            child.meta[LAYERS] = list(layers.get(child, ()))
            if child not in layers:
                del captured._modules[name]


def _relative(stack: Stack | None, path: str) -> Stack:
    """A node's `nn_module_stack` with paths relative to the module at `path`; what is outside of it is left out."""
    within = ((key, *place) for key, place in (stack or {}).items())
    return {
        key: (where.partition("@")[0].removeprefix(path).lstrip("."), cls)
        for key, where, cls in within
        if not path or f"{where.partition('@')[0]}.".startswith(f"{path}.")
    }


def _below(stack: Stack | None, layer: str) -> Stack:
    """The inverse of `_relative`: paths from the root."""
    return {key: (f"{layer}.{path}".rstrip("."), cls) for key, (path, cls) in (stack or {}).items()}

"""The invariants of a graph, each a small named check. A pipeline runs all of them at its start and after each pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..errors import VerifyError, user_line
from . import ADAPTED_BY, fake_mode_of, fake_value, made_by, resolve
from .blocks import LAYERS
from .description import interface_key, operand_key, traced_tensor_key

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter


@dataclass(frozen=True)
class Snapshot:
    """What later checks compare a graph with: its nodes and their values, its interface, the tensors it reads."""

    nodes: dict[Node, tuple[Any, ...]]
    values: dict[Node, Any]
    inputs: tuple[str, ...]
    outputs: tuple[Any, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def snapshot(gm: GraphModule) -> Snapshot:
    """Record a graph as it stands."""
    nodes = _nodes(gm)
    reads = {str(node.target): resolve(gm, str(node.target)) for node in nodes if node.op == "get_attr"}
    tensors = {path: value for path, value in reads.items() if isinstance(value, Tensor)}
    return Snapshot(nodes, {node: _value(node) for node in nodes}, _inputs(gm), _outputs(gm), tensors)


def is_changed(gm: GraphModule, before: Snapshot) -> bool:
    """Whether a graph has other nodes than it had, in another order, or nodes that say something else."""
    return list(_nodes(gm).items()) != list(before.nodes.items())


def _nodes(gm: GraphModule) -> dict[Node, tuple[Any, ...]]:
    return {node: (node.op, node.target, node.args, node.kwargs) for node in gm.graph.nodes}


@dataclass(frozen=True)
class State:
    """What a check sees: the arguments of `verify`."""

    gm: GraphModule
    before: Snapshot | None
    adapters: Sequence[Adapter]
    facts: frozenset[str]
    trained: frozenset[str]


def verify(
    gm: GraphModule,
    before: Snapshot | None,
    adapters: Sequence[Adapter],
    facts: frozenset[str],
    trained: frozenset[str],
    changed: bool = True,
) -> None:
    """Run every check; raise `VerifyError` with the first failure, naming the check.

    `before` is the snapshot before the pass, None at the start; `adapters` those that act; `facts` what the passes so
    far have established; `trained` the paths of base parameters that the user trains along with the adapters. Of a
    graph that has not `changed` since, what depends on its nodes alone holds still.
    """
    state = State(gm, before, adapters, facts, trained)
    for check in CHECKS if changed else SURROUNDINGS:
        failure = check(state)
        if failure:
            raise VerifyError(f"{check.__name__}: {failure}")


def all_there(state: State) -> str | None:
    """Every attribute that the graph reads exists."""
    for node in state.gm.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            try:
                resolve(state.gm, str(node.target))
            except AttributeError:
                return f"{node.name} reads {node.target}, which does not exist [{user_line(node)}]"
    return None


def well_formed(state: State) -> str | None:
    """The graph passes torch.fx's own lint."""
    try:
        state.gm.graph.lint()
    except RuntimeError as error:
        return str(error)
    return None


def no_orphans(state: State) -> str | None:
    """No adapter tensor is read for nothing."""
    own = {path for adapter in state.adapters for path in adapter.paths}
    for node in state.gm.graph.nodes:
        if node.op == "get_attr" and node.target in own and not node.users:
            return f"{node.target} is read and never used"
    return None


def same_interface(state: State) -> str | None:
    """Inputs and output structure are what they were; a block may have got more inputs, after those that it had."""
    if state.before is None:
        return None
    known = len(state.before.inputs) if LAYERS in state.gm.meta else None
    if _inputs(state.gm)[:known] != state.before.inputs:
        return f"inputs were {state.before.inputs} and are {_inputs(state.gm)}"
    before, now = state.before.outputs, _outputs(state.gm)
    if not _agree(before, now):
        return f"outputs were {interface_key(before)} and are {interface_key(now)}"
    return None


def true_values(state: State) -> str | None:
    """Shapes and dtypes recomputed on fake tensors agree with what new and changed nodes claim."""
    if state.before is None:
        return None
    mode = fake_mode_of(state.gm)
    for node in state.gm.graph.nodes:
        if node.op not in ("call_function", "get_attr") or not _changed(node, state.before):
            continue
        if "val" not in node.meta:
            return f"{node.name} has no value in its meta{_place(node)}"
        if not isinstance(node.target, (str, torch._ops.OpOverload)) or _still_true(node, state.before):
            continue
        try:
            value = fake_value(node, state.gm, mode)
        except Exception as error:
            return f"{node.format_node()} cannot be computed: {error}{_place(node)}"
        if not _agree(value, node.meta["val"]):
            claimed = interface_key(node.meta["val"])
            return f"{node.format_node()} gives {interface_key(value)} and claims {claimed}{_place(node)}"
    return None


def only_adapters_train(state: State) -> str | None:
    """Once the base is frozen, every trainable tensor that the graph reads is an active adapter's, or `trained`."""
    if "frozen" not in state.facts:
        return None
    own = state.trained.union(*(adapter.paths for adapter in state.adapters))
    for node in state.gm.graph.nodes:
        tensor = resolve(state.gm, str(node.target)) if node.op == "get_attr" else None
        if isinstance(tensor, Tensor) and tensor.requires_grad and node.target not in own:
            return f"{node.target} is trainable and belongs to no active adapter"
    return None


def one_adapter_of_a_name(state: State) -> str | None:
    """An adapter is inserted at most once at each operator that reads a site's weight."""
    for node in state.gm.graph.nodes:
        names = node.meta.get(ADAPTED_BY, ())
        if len(set(names)) < len(names):
            return f"{node.name} is adapted by {', '.join(names)}{_place(node)}"
    return None


def provenance(state: State) -> str | None:
    """Every new node says which pass made it."""
    if state.before is None:
        return None
    for node in state.gm.graph.nodes:
        if node not in state.before.nodes and node.op != "placeholder" and made_by(node) is None:
            return f"{node.format_node()} does not say who made it (emit it through a rule, or set its meta)"
    return None


Check = Callable[[State], str | None]
SURROUNDINGS: tuple[Check, ...] = (all_there, same_interface, no_orphans, one_adapter_of_a_name, only_adapters_train)
CHECKS: tuple[Check, ...] = (all_there, well_formed, provenance, true_values, *SURROUNDINGS[1:])


def _inputs(gm: GraphModule) -> tuple[str, ...]:
    return tuple(str(node.target) for node in gm.graph.nodes if node.op == "placeholder")


def _outputs(gm: GraphModule) -> tuple[Any, ...]:
    return tuple(node.meta.get("val") for node in gm.graph.output_node().all_input_nodes)


def _agree(a: Any, b: Any) -> bool:
    """Whether two values have the same structure, shapes, dtypes and devices."""
    if a is b:
        return True
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_agree, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = (a.dtype, a.device, a.ndim) == (b.dtype, b.device, b.ndim)
        return same and all(map(_same_size, a.shape, b.shape))
    return interface_key(a) == interface_key(b)


def _same_size(a: Any, b: Any) -> bool:
    """Equal as expressions; or one is a number that torch has put in the place of the other, a symbol of that value."""
    if str(a) == str(b):
        return True
    constant, symbolic = (a, b) if isinstance(a, int) else (b, a)
    return isinstance(constant, int) and isinstance(symbolic, torch.SymInt) and symbolic.node.hint == constant


def _changed(node: Node, before: Snapshot) -> bool:
    return before.nodes.get(node) != (node.op, node.target, node.args, node.kwargs)


def _still_true(node: Node, before: Snapshot) -> bool:
    """Whether a node's value stands, because the operator is the same, on inputs that torch does not tell apart.

    A pass changes more nodes in this way, as users of what it replaced, than it makes, and recomputing takes time.
    """
    if node not in before.nodes or before.values[node] is not _value(node):
        return False
    op, target, args, kwargs = before.nodes[node]
    then = map_arg((args, *kwargs.items()), lambda each: before.values.get(each, object()))
    now = map_arg((node.args, *node.kwargs.items()), _value)
    keep: list[Any] = []  # what the keys name by identity lives until they are compared
    first, second = (operand_key(each, traced_tensor_key, keep) for each in (then, now))
    return (op, target) == (node.op, node.target) and first == second


def _value(node: Node) -> Any:
    """What a node says that it gives; of a node that does not say, a value equal to no other."""
    return node.meta.get("val", object())


def _place(node: Node) -> str:
    maker = made_by(node)
    at = f" at site {maker.site}" if maker and maker.site else ""
    return f"{at} [{user_line(node)}]"

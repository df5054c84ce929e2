"""Parameters of repeated layers, kept from torch.export: it spends longer on each than replaying a layer takes.

They are taken out of the modules before export looks at these. While the model runs, a fake tensor stands where each
was. It gets a node in the graph when its layer is traced, or when somebody else reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ...torch_private.tensors import DisableTorchFunction
from ...torch_private.tracing import (
    detect_fake_mode,
    fake_tensor,
    get_proxy_mode,
    meta_like,
    pass_for_parameter,
    set_node,
    slot_of,
)


class _Parameter(HigherOrderOperator):
    """The operator of nodes that read the parameter at a path, until the graph is captured."""

    def __init__(self) -> None:
        super().__init__("lorafx_parameter")

    def __call__(self, *args: Any) -> Any:
        raise NotImplementedError("stands for a parameter while a graph is made")


_parameter = _Parameter()


class HiddenParameters(TorchFunctionMode):
    """The parameters of these layers of a mirror, without those that are found elsewhere in the model too.

    Creating it takes them out of the modules. As a context, in which the model is called, it puts stand-ins there and
    sees to it that those which torch is given have a node.
    """

    def __init__(self, root: nn.Module, layers: Iterable[nn.Module]):
        super().__init__()
        places = Counter(id(p) for _, p in root.named_parameters(remove_duplicate=False))
        paths = {module: path for path, module in root.named_modules()}
        self.parameters = [
            (module, name, f"{paths[module]}.{name}", parameter)
            for layer in layers
            for module in layer.modules()
            for name, parameter in module._parameters.items()
            if type(parameter) is nn.Parameter and type(parameter.data) is Tensor and places[id(parameter)] == 1
        ]
        self.paths: dict[int, str] = {}  # where a hidden parameter is in the model, by the id of its stand-in
        for module, name, _, _ in self.parameters:
            module._parameters[name] = None

    def __enter__(self) -> HiddenParameters:
        """Put stand-ins where the parameters were."""
        mode = detect_fake_mode()
        assert mode is not None, "hidden parameters are shown while torch.export calls the model"
        with DisableTorchFunction():
            for module, name, path, parameter in self.parameters:
                tensor = fake_tensor(mode, meta_like(parameter), parameter.device, parameter.requires_grad)
                pass_for_parameter(tensor)
                module._parameters[name] = tensor  # type: ignore[assignment]
                self.paths[id(tensor)] = path
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mode = get_proxy_mode()
        if mode is not None:
            self.trace(pytree.arg_tree_leaves(*args, **kwargs), mode.tracer)
        return func(*args, **kwargs)

    def trace(self, values: Iterable[Any], tracer: Any) -> None:
        """Give nodes to the stand-ins among `values` that have none.

        The nodes come right after the graph's inputs, where no region of another gradient or autocast mode is open.
        """
        for tensor in values:
            path = self.paths.get(id(tensor))
            if path is None or slot_of(tensor, tracer) is not None:
                continue
            inputs = tracer.graph.find_nodes(op="placeholder")
            with tracer.graph.inserting_after(inputs[-1]) if inputs else tracer.graph.inserting_before():
                proxy = tracer.create_proxy("call_function", _parameter, (path,), {}, name=path.replace(".", "_"))
            proxy.node.meta["val"] = tensor
            set_node(tensor, tracer, proxy)


def read_parameters(gm: GraphModule) -> None:
    """Let a captured graph read the parameters that were hidden, at their paths."""
    for node in gm.graph.find_nodes(op="call_function", target=_parameter):
        (node.target,), node.args, node.op = node.args, (), "get_attr"

"""Parameters that torch.export does not see: it spends more on each than tracing spends on a layer like one before it.

While the model runs, a stand-in is where the parameter was. It has no node in the graph until its layer is traced, or
somebody else reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import _ProxyTensor, get_proxy_mode, get_proxy_slot, set_proxy_slot
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch


class _Parameter(HigherOrderOperator):
    """Stands in a captured graph for the parameter at a path."""

    def __init__(self) -> None:
        super().__init__("lorafx_parameter")

    def __call__(self, *args: Any) -> Any:
        raise NotImplementedError("stands for a parameter while a graph is made")


_parameter = _Parameter()


class Hidden(TorchFunctionMode):
    """The parameters of these modules of a mirror that are found nowhere else, hidden until the model is called."""

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
        self.paths: dict[int, str] = {}
        for module, name, _, _ in self.parameters:
            module._parameters[name] = None

    def __enter__(self) -> Hidden:
        """Put stand-ins where the parameters were."""
        mode = detect_fake_mode()
        assert mode is not None, "hidden parameters are shown while torch.export calls the model"
        with torch._C.DisableTorchFunction(), no_dispatch():
            for module, name, path, parameter in self.parameters:
                like = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
                tensor = FakeTensor(mode, like, parameter.device).requires_grad_(parameter.requires_grad)
                tensor._is_param = True  # type: ignore[attr-defined]  # isinstance(tensor, nn.Parameter)
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
        """Give the stand-ins among values nodes: right after the graph's inputs, so in no region of another mode."""
        for tensor in values:
            path = self.paths.get(id(tensor))
            if path is None or get_proxy_slot(tensor, tracer, None) is not None:
                continue
            inputs = tracer.graph.find_nodes(op="placeholder")
            with tracer.graph.inserting_after(inputs[-1] if inputs else tracer.graph._root):
                proxy = tracer.create_proxy("call_function", _parameter, (path,), {}, name=path.replace(".", "_"))
            proxy.node.meta["val"] = tensor
            set_proxy_slot(tensor, tracer, _ProxyTensor(proxy, None))


def read_parameters(gm: GraphModule) -> None:
    """Let a captured graph read the parameters that were hidden."""
    for node in gm.graph.find_nodes(op="call_function", target=_parameter):
        (node.target,), node.args, node.op = node.args, (), "get_attr"

"""A traced network without in-place operations: the same numbers, every intermediate value left as it was."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from nss import operations as ops

_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def without_inplace(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a graph with equal outputs in which nothing is overwritten; modules and parameters are shared.

    A value that was overwritten and is read again later is read from the operation that overwrote it.

    >>> calm = without_inplace(trace(torchvision.models.resnet18()))
    """
    if not any(ops.writes_in_place(node, graph) for node in graph.graph.nodes):
        return graph
    twin = fx.Graph()
    root = shell(graph)
    places: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        places[node] = twin.node_copy(node, lambda old: places[old])
        if ops.writes_in_place(node, graph):
            _calm(places[node], root)
            places[node.args[0]] = places[node]
    return fx.GraphModule(root, twin)


def with_norms_folded(graph: fx.GraphModule, kept: Collection[str] = ()) -> fx.GraphModule:
    """Return a graph in which a BatchNorm behind a convolution is part of it: two passes over a map less each way.

    Only where nothing else reads the convolution, each of the two is called once, and the norm goes by its running
    statistics. The outputs are those of evaluation mode, but for rounding. kept: names of values that must stay.
    """
    calls = ops.module_calls(graph)
    both = {
        node: source
        for node in graph.graph.nodes
        if _is_running_norm(node, graph)
        and isinstance(ops.module_of(source := node.args[0], graph), ops.CONVOLUTIONS)
        and len(source.users) == len(source.args) == 1
        and source.name not in kept
        and calls[str(node.target)] == calls[str(source.target)] == 1
    }
    twin, root = fx.Graph(), shell(graph)
    places: dict[fx.Node, fx.Node] = {}
    folded = set(both.values())
    for node in graph.graph.nodes:
        if node in folded:
            continue
        if node not in both:
            places[node] = twin.node_copy(node, lambda old: places[old])
            continue
        layer = _Folded(ops.module_of(both[node], graph), ops.module_of(node, graph))
        name = f"folded_{node.name}"
        root._modules[name] = layer
        # By the norm's name: it is what others know the value by.
        places[node] = twin.create_node("call_module", name, (places[both[node].args[0]],), name=node.name)
    return fx.GraphModule(root, twin)


class _Folded(nn.Module):
    """A convolution with the BatchNorm behind it, as they are now."""

    def __init__(self, convolution: Any, norm: Any) -> None:
        super().__init__()
        self._convolution = [convolution]  # in a list: its parameters are not this module's
        statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        with torch.no_grad():
            self._weight, self._bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._convolution[0]._conv_forward(x, self._weight.detach(), self._bias.detach())
        return found


def _is_running_norm(node: fx.Node, graph: fx.GraphModule) -> bool:
    module = ops.module_of(node, graph) if node.op == "call_module" else None
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def shell(graph: fx.GraphModule) -> nn.Module:
    """Return a plain module with the children, parameters and buffers of `graph`, to hang a new graph on."""
    root = nn.Module()
    root._modules.update(graph._modules)
    root._parameters.update(graph._parameters)
    root._buffers.update(graph._buffers)
    return root


def _calm(node: fx.Node, root: nn.Module) -> None:
    """Make one node write to a new tensor."""
    if node.op == "call_module":
        module = copy.copy(root.get_submodule(str(node.target)))
        module.__dict__["inplace"] = False
        node.target = f"calm_{node.name}"
        root._modules[node.target] = module
    elif node.op == "call_method":
        node.target = str(node.target).removesuffix("_")
    else:
        name = ops.name_of(node).removesuffix("_")
        calm: Any = getattr(torch, name, None) or getattr(F, name, node.target)
        node.target = calm if ops.name_of(node).endswith("_") else _OPERATORS.get(node.target, node.target)
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}

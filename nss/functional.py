"""A traced network without in-place operations: the same numbers, every intermediate value left as it was."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

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
    twin = fx.Graph()
    root = shell(graph)
    places: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        places[node] = twin.node_copy(node, lambda old: places[old])
        if ops.writes_in_place(node, graph):
            _calm(places[node], root)
            places[node.args[0]] = places[node]
    return fx.GraphModule(root, twin)


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

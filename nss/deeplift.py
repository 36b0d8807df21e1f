"""DeepLIFT's rescale rule for all layers in one backward pass (Shrikumar et al. 2017, arXiv 1704.02685).

The batch carries the reference input as its last row. Every nonlinear operation of the traced network is replaced by
one with two ways back: its derivative, and the multiplier (f(x) - f(x0)) / (x - x0). So one forward pass serves both
Taylor and DeepLIFT, for every layer at once, wherever a nonlinearity is called from.

Max pooling passes the whole difference to the winner of the side that is larger, products share it evenly: both keep
the sum of contributions at f(x) - f(x0). What mixes otherwise (softmax, LayerNorm, attention) goes by its derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from nss import operations as ops
from nss.functional import shell

Elementwise = Callable[[Tensor], Tensor]


@dataclass
class Way:
    """Which way back the nonlinear operations of one graph take, and how many rows a batch has."""

    rescale: bool = False
    rows: int = 1
    watched: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """{name of a node: how to sum up what its entries contribute}, for nodes whose way back comes by that anyway"""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """{name of a watched node: that sum}, for those that were passed on the last way back"""


def rescaling(graph: fx.GraphModule, way: Way) -> fx.GraphModule:
    """Return a graph with equal outputs whose nonlinear operations follow `way` when differentiated.

    graph: free of in-place operations. The last of `way.rows` rows of a batch is the reference.

    >>> way = Way()
    >>> lifted = rescaling(without_inplace(trace(network)), way)
    """
    twin, root = fx.Graph(), shell(graph)
    places: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        places[node] = twin.node_copy(node, lambda old: places[old])
        step = _step(node, graph, way)
        if step is not None:
            name = f"rescaled_{node.name}"
            root._modules[name] = step
            with twin.inserting_after(places[node]):
                replaced = twin.call_module(name, tuple(places[arg] for arg in _operands(node)))
            twin.erase_node(places[node])
            places[node] = replaced
    return fx.GraphModule(root, twin)


def _operands(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.args if isinstance(arg, fx.Node)] or list(node.all_input_nodes[:1])


def _step(node: fx.Node, graph: fx.GraphModule, way: Way) -> nn.Module | None:
    if node.op not in ("call_module", "call_function", "call_method"):
        return None
    if ops.is_activation(node, graph):
        return _Step(_Elementwise, ops.bound(node, graph), way, node.name)
    if ops.is_max_pool(node, graph):
        return _Step(_MaxPool, ops.bound(node, graph, return_indices=True), way)
    both = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if ops.name_of(node) == "mul" and len(both) == 2 and all(arg.op != "get_attr" for arg in both):
        return _Step(_Product, way)
    return None


class _Step(nn.Module):
    """Calls a differentiable function of one or two activations with its settings."""

    def __init__(self, function: type[torch.autograd.Function], *settings: object) -> None:
        super().__init__()
        self._function, self._settings = function, settings

    def forward(self, *activations: Tensor) -> Tensor:
        result: Tensor = self._function.apply(*activations, *self._settings)
        return result


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Elementwise, way: Way, name: str) -> Tensor:
        y = function(x)
        ctx.save_for_backward(x, y)
        ctx.function, ctx.way, ctx.name = function, way, name
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, y = ctx.saved_tensors
        if not ctx.way.rescale:
            return _slope(ctx.function, x, y, gradient), None, None, None
        dx, dy = _difference(x, ctx.way.rows), _difference(y, ctx.way.rows)
        contribution = dy.mul_(gradient)
        if ctx.name in ctx.way.watched:
            ctx.way.sums[ctx.name] = ctx.way.watched[ctx.name](contribution)
        if _is_relu(ctx.function):
            # Exact however small dx is; where it is 0 nothing has changed and there is nothing to pass on.
            return contribution.div_(dx).nan_to_num_(0.0), None, None, None
        # Relative to the value, a smaller change is mostly rounding: the derivative is what the quotient tends to.
        close = dx.abs() <= torch.finfo(x.dtype).eps ** 0.5 * x.abs()
        found = torch.where(close, _derivative(ctx.function, x, gradient), contribution.div_(dx))
        return found, None, None, None


def _is_relu(function: Elementwise) -> bool:
    return isinstance(function, nn.ReLU)


def _slope(function: Elementwise, x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    if _is_relu(function):
        found: Tensor = torch.ops.aten.threshold_backward(gradient, y, 0)
        return found
    return _derivative(function, x, gradient)


def _derivative(function: Elementwise, x: Tensor, gradient: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        result: Tensor = torch.autograd.grad(function(leaf), leaf, gradient)[0]
    return result


def _difference(x: Tensor, rows: int) -> Tensor:
    """Subtract the reference. Networks that fold positions into the batch axis have several entries for each row."""
    per_row = x.unflatten(0, (rows, -1))
    difference: Tensor = (per_row - per_row[-1:]).flatten(0, 1)
    return difference


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], tuple[Tensor, Tensor]], way: Way) -> Tensor:
        y, winners = function(x)
        ctx.save_for_backward(x, y, winners)
        ctx.function, ctx.way = function, way
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, y, winners = ctx.saved_tensors
        if not ctx.way.rescale:
            return _derivative(lambda leaf: ctx.function(leaf)[0], x, gradient), None, None
        dy = _difference(y, ctx.way.rows)
        axis = 1 if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else 2
        flat, there, given = (_in_memory_order(each, axis) for each in (x, winners, gradient))
        dy = _in_memory_order(dy, axis)
        # The larger side's winner has moved by at least dy in dy's direction: the quotient is within 0..1.
        places = torch.where(dy >= 0, there, there[-1:])
        dx = flat.gather(axis, places).sub_(flat[-1:].expand_as(flat).gather(axis, places))
        share = torch.where(dx == 0, 1.0, dy / dx)
        spread = torch.zeros_like(flat).scatter_add_(axis, places, share.mul_(given))
        return _from_memory_order(spread, x, axis), None, None


def _in_memory_order(x: Tensor, axis: int) -> Tensor:
    """Return maps with their positions along one axis, 1 or 2, without moving what lies in memory in that order."""
    return x.flatten(2) if axis == 2 else x.permute(0, 2, 3, 1).flatten(1, 2)


def _from_memory_order(flat: Tensor, like: Tensor, axis: int) -> Tensor:
    return flat.view(like.shape) if axis == 2 else flat.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, way: Way) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.way = way
        return left * right

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = ctx.saved_tensors
        to_left, to_right = (right, left) if not ctx.way.rescale else (_middle(right, ctx.way), _middle(left, ctx.way))
        return (gradient * to_left).sum_to_size(left.shape), (gradient * to_right).sum_to_size(right.shape), None


def _middle(x: Tensor, way: Way) -> Tensor:
    """Mean of value and reference: xy - x0 y0 = (x - x0)(y + y0)/2 + (y - y0)(x + x0)/2."""
    return x - _difference(x, way.rows) / 2

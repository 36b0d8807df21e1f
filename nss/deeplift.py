"""DeepLIFT's rescale rule for all layers in one backward pass (Shrikumar et al. 2017, arXiv 1704.02685).

The reference input goes through once; what each nonlinear operation makes of it is kept. Every nonlinear operation of
the traced network is replaced by one with two ways back: its derivative, and the multiplier (f(x) - f(x0)) / (x - x0).
So one forward pass serves both Taylor and DeepLIFT, for every layer at once, wherever a nonlinearity is called from.

Max pooling passes the whole difference to the winner of the side that is larger, products share it evenly: both keep
the sum of contributions at f(x) - f(x0). What mixes otherwise (softmax, LayerNorm, attention) goes by its derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from nss import operations as ops
from nss.functional import shell

Elementwise = Callable[[Tensor], Tensor]
Pool = Callable[[Tensor], tuple[Tensor, Tensor]]

# Numbers that are taken through several operations at a time: what these read and write then stays in the cache.
PART = 1 << 18


@dataclass
class Way:
    """Which way back the nonlinear operations of one graph take, and what they compare with."""

    rescale: bool = False
    watched: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """{name of a node: how to sum up what its entries contribute}, for nodes whose way back comes by that anyway"""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """{name of a watched node: that sum}, for those that were passed on the last way back"""
    references: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """{name of a node: what it reads and returns for the reference}"""
    recording: bool = False
    """what goes through is the reference"""

    def record(self, name: str, *values: Tensor) -> None:
        """Keep what a node reads and returns, if it is the reference."""
        if self.recording:
            self.references[name] = values


def rescaling(graph: fx.GraphModule, way: Way) -> fx.GraphModule:
    """Return a graph with equal outputs whose nonlinear operations follow `way` when differentiated.

    graph: free of in-place operations.

    >>> way = Way()
    >>> lifted = rescaling(without_inplace(trace(network)), way)
    >>> refer(lifted, way, torch.zeros(1, 3, 32, 32))
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
                replaced = twin.call_module(name, tuple(places[arg] for arg in node.all_input_nodes))
            twin.erase_node(places[node])
            places[node] = replaced
    return fx.GraphModule(root, twin)


def refer(graph: fx.GraphModule, way: Way, reference: Tensor) -> None:
    """Compare with this input from now on. graph: what `rescaling` made. reference: [1, ..]."""
    way.recording = True
    try:
        with torch.no_grad():
            graph(reference)
    finally:
        way.recording = False


def in_parts(x: Tensor, *references: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Yield rows of a batch that a cache holds, and what the references are to them.

    All parts are of one size: sums over an image are the same wherever it stands. Networks that fold positions into the
    batch axis have several entries for each row.
    """
    size = len(x)
    while size % 2 == 0 and size * x[0].numel() > PART:
        size //= 2
    fitting = _for_rows(references, len(x))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        yield part, tuple(each if len(each) == 1 else each[part] for each in fitting)


def _step(node: fx.Node, graph: fx.GraphModule, way: Way) -> nn.Module | None:
    if ops.is_activation(node, graph):
        return _Alone(_Elementwise, ops.bound(node, graph), way, node.name)
    if ops.is_max_pool(node, graph):
        return _Alone(_MaxPool, ops.bound(node, graph, return_indices=True), way, node.name)
    both = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if ops.name_of(node) == "mul" and len(both) == 2 and all(arg.op != "get_attr" for arg in both):
        return _Both(way, node.name)
    return None


class _Alone(nn.Module):
    """Calls a differentiable function of one activation, which may be told sizes and limits besides."""

    def __init__(self, function: type[torch.autograd.Function], inner: Callable[..., Any], way: Way, name: str) -> None:
        super().__init__()
        self._function, self._inner, self._way, self._name = function, inner, way, name

    def forward(self, x: Tensor, *told: Any) -> Tensor:
        result: Tensor
        if any(isinstance(each, Tensor) for each in told):
            result = self._inner(x, *told)  # mixes values: by its derivative
        else:
            inner = (lambda value: self._inner(value, *told)) if told else self._inner
            result = self._function.apply(x, inner, self._way, self._name)
        return result


class _Both(nn.Module):
    """Multiplies two activations, or one by itself."""

    def __init__(self, way: Way, name: str) -> None:
        super().__init__()
        self._way, self._name = way, name

    def forward(self, *factors: Tensor) -> Tensor:
        result: Tensor = _Product.apply(factors[0], factors[-1], self._way, self._name)
        return result


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Elementwise, way: Way, name: str) -> Tensor:
        y = function(x)
        way.record(name, x, y)
        ctx.save_for_backward(x, y)
        ctx.function, ctx.way, ctx.name = function, way, name
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, y = ctx.saved_tensors
        if not ctx.way.rescale:
            return _slope(ctx.function, x, y, gradient), None, None, None
        watch, sums, found = ctx.way.watched.get(ctx.name), [], torch.empty_like(y)
        for part, (x0, y0) in in_parts(y, *ctx.way.references[ctx.name]):
            contribution = torch.sub(y[part], y0, out=found[part]).mul_(gradient[part])
            if watch is not None:
                sums.append(watch(contribution))
            _by_difference(contribution, x[part], x[part] - x0, gradient[part], ctx.function)
        if watch is not None:
            ctx.way.sums[ctx.name] = torch.cat(sums)
        return found, None, None, None


def _by_difference(contribution: Tensor, x: Tensor, dx: Tensor, gradient: Tensor, function: Elementwise) -> None:
    """Divide dy * gradient by dx in place."""
    if _is_relu(function):
        # Exact however small dx is; where it is 0 nothing has changed and there is nothing to pass on.
        contribution.div_(dx).nan_to_num_(0.0)
        return
    # Relative to the value, a smaller change is mostly rounding: the derivative is what the quotient tends to.
    close = dx.abs() <= torch.finfo(x.dtype).eps ** 0.5 * x.abs()
    contribution.copy_(torch.where(close, _derivative(function, x, gradient), contribution / dx))


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


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Pool, way: Way, name: str) -> Tensor:
        y, winners = function(x)
        way.record(name, x, y, winners)
        ctx.save_for_backward(x, y, winners)
        ctx.function, ctx.way, ctx.name = function, way, name
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, y, winners = ctx.saved_tensors
        if ctx.way.rescale:
            share, winners = _share(x, y, winners, *_for_rows(ctx.way.references[ctx.name], len(x)))
            gradient = share.mul_(gradient)
        return _handed_to(winners, gradient, x, ctx.function), None, None, None


def _for_rows(reference: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    """Repeat what is several entries for each row of a batch; one entry fits all rows as it is."""
    return tuple(
        each if len(each) == 1 else each.repeat(rows // len(each), *[1] * (each.dim() - 1)) for each in reference
    )


def _share(x: Tensor, y: Tensor, winners: Tensor, x0: Tensor, y0: Tensor, winners0: Tensor) -> tuple[Tensor, Tensor]:
    """Return dy / dx at the winner of the side that is larger, and where that is.

    That winner has moved by at least dy in dy's direction: the quotient is within 0..1, and 1 where nothing moved.
    """
    dy = y - y0
    up = dy >= 0
    dx = torch.where(up, y - _taken(x0, winners), _taken(x, winners0) - y0)
    return dy.div_(dx).nan_to_num_(1.0), torch.where(up, winners, winners0)


def _handed_to(places: Tensor, gradient: Tensor, x: Tensor, function: Pool) -> Tensor:
    """Return the gradient of x [n, channels, ..] when that of each window goes to one place of a map."""
    if isinstance(function, nn.MaxPool2d) and x.dim() == 4:
        settings = function.kernel_size, function.stride, function.padding, function.dilation, function.ceil_mode
        found: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(gradient, x, *settings, places)
        return found
    axis = _axis(x)
    flat = _in_memory_order(x, axis)
    spread = torch.zeros_like(flat).scatter_add_(axis, _in_memory_order(places, axis), _in_memory_order(gradient, axis))
    return spread.view(x.shape) if axis == 2 else spread.unflatten(1, x.shape[2:]).movedim(-1, 1)


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """Return the entries of maps x at places of them, [n, channels, ..]; either may be one for all rows."""
    axis = _axis(x if len(x) > 1 else places)
    flat, there = _in_memory_order(x, axis), _in_memory_order(places, axis)
    if len(there) == 1:
        # The same places in each row: picking them from a table is several times faster than gathering.
        numbers = torch.arange(flat[0].numel(), device=x.device).view(1, *flat.shape[1:]).gather(axis, there)
        found = flat.flatten(1).index_select(1, numbers.flatten()).view(len(x), *there.shape[1:])
    else:
        found = flat.expand(len(there), -1, -1).gather(axis, there)
    maps: Tensor = found.unflatten(axis, places.shape[2:])
    return maps.movedim(-1, 1) if axis == 1 else maps


def _axis(x: Tensor) -> int:
    """Along which axis `_in_memory_order` has the positions of x: 1 where channels are last in memory."""
    return 1 if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() else 2


def _in_memory_order(x: Tensor, axis: int) -> Tensor:
    """Return maps with their positions along one axis, 1 or 2, without moving what lies in memory in that order."""
    return x.flatten(2) if axis == 2 else x.movedim(1, -1).flatten(1, -2)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, way: Way, name: str) -> Tensor:
        way.record(name, left, right)
        ctx.save_for_backward(left, right)
        ctx.way, ctx.name = way, name
        return left * right

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        left, right = ctx.saved_tensors
        if ctx.way.rescale:
            # The mean of value and reference: xy - x0 y0 = (x - x0)(y + y0)/2 + (y - y0)(x + x0)/2.
            pairs = zip((left, right), ctx.way.references[ctx.name], strict=True)
            left, right = ((x + _for_rows((x0,), len(x))[0]) / 2 for x, x0 in pairs)
        to_left, to_right = gradient * right, gradient * left
        return (
            to_left.sum_to_size(ctx.saved_tensors[0].shape),
            to_right.sum_to_size(ctx.saved_tensors[1].shape),
            None,
            None,
        )

"""One-way wiring: networks side by side of which each reads what those before it compute, and none reads a later one.

Each task has a *column*: a network of its own, smaller than the factory's, whose layers also read the neurons of all
earlier columns. A weight from a later column into an earlier one does not exist, so nothing can move it. What an
earlier column computes is done by the same operations on tensors of the same shapes however many columns follow:
kernels choose the order of their sums by shape, so with zeros in one wide layer the last bits would move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nss import operations as ops
from nss.anatomy import Anatomy, dissect
from nss.errors import ExtendError
from nss.routing import Router
from nss.strides import picked, skips
from nss.surgery import Layer, filters_by_channel

_SUMS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


@dataclass(frozen=True)
class _Value:
    """What an earlier step gave, by the step's number."""

    step: int


@dataclass(frozen=True)
class _Step:
    """One operation of the factory's forward."""

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]
    axis: int | None
    """where the channels that it reads lie, of a layer whose every output reads all of them; else None"""
    last: tuple[int, ...]
    """the values that no later step reads"""


class Columns(nn.Module):
    """A network of several columns that answers for the classes of all of them, without being told the task.

    columns: networks of one factory, the first whole, each further one with the inputs that `read_earlier` adds.
    input_shape: (channels, height, width). router: decides between the columns (see nss.routing).
    Raises ExtendError when the factory's forward cannot be done by columns.

    >>> network = Columns([old, new], (1, 28, 28), router)
    >>> network(images).shape  # 5 old classes, then 5 new ones
    torch.Size([2, 10])
    """

    def __init__(self, columns: Sequence[nn.Module], input_shape: tuple[int, int, int], router: Router) -> None:
        super().__init__()
        self.columns = nn.ModuleList(columns)
        self.router = router
        self._steps = _program(dissect(columns[0], input_shape))

    def forward(self, x: Tensor) -> Tensor:
        """x: normalised images [n, c, h, w]. Returns logits [n, classes of all columns]."""
        logits, features = self.parts(x)
        answers: Tensor = self.router(logits, features)
        return answers

    def parts(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """x: normalised images [n, c, h, w]. Returns the logits of each column alone, and the router's features."""
        values: list[Any] = []
        joined: dict[tuple[int, int], Tensor] = {}
        views = []
        for step in self._steps:
            values.append(self._run(step, values, joined, x))
            if step.name in self.router.views:
                # Now: what works in place may overwrite it later.
                views.append(self.router.view(step.name, values[-1][0]))
            for number in step.last:
                # Of what earlier columns computed, training keeps what the last one reads, and nothing else.
                values[number] = None
                for column in range(1, len(self.columns)):
                    joined.pop((number, column), None)
        return list(values[self._steps[-1].reads[0]]), torch.cat(views, 1)

    def _run(self, step: _Step, values: list[Any], joined: dict[tuple[int, int], Tensor], x: Tensor) -> Any:
        """Return one value when it is the same for all columns, a _ByColumn when each has its own."""
        if step.op in ("placeholder", "output"):
            return x
        own = any(isinstance(values[each], _ByColumn) for each in step.reads)
        if not own and step.axis is None:
            return self._call(step, 0, values)
        if step.axis is not None and own:
            return _ByColumn(self._read(step, column, values, joined) for column in range(len(self.columns)))
        return _ByColumn(self._call(step, column, values) for column in range(len(self.columns)))

    def _read(self, step: _Step, column: int, values: list[Any], joined: dict[tuple[int, int], Tensor]) -> Tensor:
        """Run a layer of one column on what all columns up to it computed."""
        layer = cast(Layer, self.columns[column].get_submodule(step.target))
        if column and layer.training and _only_sums(layer):
            earlier, own = _up_to(step, column - 1, values, joined), values[step.reads[0]][column]
            if own.requires_grad and not earlier.requires_grad:
                return _in_two(layer, earlier, own)
        result: Tensor = layer(_up_to(step, column, values, joined))
        return result

    def _call(self, step: _Step, column: int, values: list[Any]) -> Any:
        def filled(arg: Any) -> Any:
            if isinstance(arg, _Value):
                value = values[arg.step]
                return value[column] if isinstance(value, _ByColumn) else value
            return arg

        args, kwargs = fx.node.map_aggregate((step.args, step.kwargs), filled)
        if step.op == "call_module":
            return self.columns[column].get_submodule(step.target)(*args, **kwargs)
        if step.op == "call_method":
            return getattr(args[0], step.target)(*args[1:], **kwargs)
        return step.target(*args, **kwargs)


class _ByColumn(tuple[Any, ...]):
    """A value for each column."""


def _up_to(step: _Step, column: int, values: list[Any], joined: dict[tuple[int, int], Tensor]) -> Tensor:
    """Return what a layer reads: of all columns up to that number, put together once for all that read it."""
    source = step.reads[0]
    parts: _ByColumn = values[source]
    if not column:
        first: Tensor = parts[0]
        return first
    if (source, column) not in joined:
        joined[source, column] = torch.cat(parts[: column + 1], cast(int, step.axis))
    return joined[source, column]


def _only_sums(layer: nn.Module) -> bool:
    """Say whether a layer is what its class says: not replaced by freezing or a mask, not padded, without hooks."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) in _SUMS and getattr(layer, "padding_mode", "zeros") == "zeros" and not any(hooks)


def _in_two(layer: Layer, earlier: Tensor, own: Tensor) -> Tensor:
    """Return what a layer makes of both, as it does of both put together, up to the order of its sums.

    Backwards it would compute the gradient of all that it has read, also where nobody asks for it: of the earlier
    columns, which are frozen, and the larger part.
    """
    run, weight, how = _SUMS[type(layer)], layer.weight, cast("tuple[Any, ...]", ())
    count = earlier.shape[-1 if isinstance(layer, nn.Linear) else 1]
    if not isinstance(layer, nn.Linear):
        if skips(layer.kernel_size, layer.stride, layer.padding, min(count, own.shape[1])):
            earlier, own = picked(earlier, layer.stride), picked(own, layer.stride)
        else:
            how = layer.stride, layer.padding, layer.dilation
    made: Tensor = run(earlier, weight[:, :count], layer.bias, *how) + run(own, weight[:, count:], None, *how)
    return made


def _program(anatomy: Anatomy) -> tuple[_Step, ...]:
    refuse_unfit(anatomy)
    graph = anatomy.graph
    layers = {each.node: graph.get_submodule(each.module) for each in anatomy.producers}
    axes = {
        node: -1 if isinstance(layer, nn.Linear) else 1
        for node, layer in layers.items()
        if not filters_by_channel(layer)
    }
    numbers = {node: number for number, node in enumerate(graph.graph.nodes)}
    steps = []
    for node in numbers:
        args, kwargs = cast(Any, fx.node.map_arg)((node.args, node.kwargs), lambda each: _Value(numbers[each]))
        reads = tuple(numbers[each] for each in node.all_input_nodes)
        # What the output reads is still wanted behind it.
        last = tuple(
            numbers[each]
            for each in node.all_input_nodes
            if node.op != "output" and max(numbers[user] for user in each.users) == numbers[node]
        )
        steps.append(_Step(node.name, node.op, node.target, args, dict(kwargs), reads, axes.get(node), last))
    return tuple(steps)


def refuse_unfit(anatomy: Anatomy) -> None:
    """Raise ExtendError for a network that cannot be done by columns."""
    graph = anatomy.graph
    nodes = list(graph.graph.nodes)
    if sum(node.op == "placeholder" for node in nodes) != 1:
        raise ExtendError("the network takes several inputs", allowed="one image")
    if nodes[-1].all_input_nodes != [anatomy.producers[-1].node]:
        raise ExtendError("the class scores do not come from a layer", allowed="a network that ends in a linear layer")
    head = {int(each) for each in anatomy.producers[-1].out_ids}
    mixed = {channel: why for channel, why in anatomy.mixed.items() if channel not in head}
    reasons = sorted({*mixed.values(), *anatomy.fixed.values()})
    reasons += [f"{node.target} is a parameter of the network itself" for node in nodes if node.op == "get_attr"]
    for producer in anatomy.producers:
        layer = graph.get_submodule(producer.module)
        if int(getattr(layer, "groups", 1)) > 1 and not filters_by_channel(layer):
            reasons.append(f"{producer.module} is a convolution in groups")
    if reasons:
        raise ExtendError(
            "this network cannot be extended: " + "; ".join(reasons),
            allowed="layers whose neurons can be added and removed one by one",
            fix="change what is named in the network: flatten maps by x.flatten(1), for example, not by a number",
        )


def read_earlier(column: nn.Module, earlier: Sequence[nn.Module], input_shape: tuple[int, int, int]) -> None:
    """Let the layers of `column`, in place, read the neurons of earlier columns too, before their own.

    column: as the factory built it, cut to its own neurons. earlier: the columns before it. Every layer, and the norms
    behind them, start anew, by the layer's own rule of initialisation (torch's seed decides).
    """
    anatomy = dissect(column, input_shape)
    for name, ids in {producer.module: producer.in_ids for producer in anatomy.producers}.items():
        if bool((ids >= 0).any()) and not filters_by_channel(column.get_submodule(name)):
            # The last of them reads all before it too.
            before = cast(Layer, earlier[-1].get_submodule(name)).weight.shape[1]
            add_inputs(cast(Layer, column.get_submodule(name)), before)
    for module in column.modules():
        if isinstance(module, (*ops.LAYERS, *ops.CHANNEL_NORMS)):
            module.reset_parameters()


def add_inputs(layer: Layer, count: int) -> None:
    """Let a layer read `count` channels (or units) more, before those that it reads now, with weight zero."""
    weight = layer.weight.detach()
    wide = weight.new_zeros(len(weight), count + weight.shape[1], *weight.shape[2:])
    wide[:, count:] = weight
    layer.weight = nn.Parameter(wide, layer.weight.requires_grad)
    if isinstance(layer, nn.Linear):
        layer.in_features = wide.shape[1]
    else:
        layer.in_channels = wide.shape[1]


@contextmanager
def last_column(network: Columns) -> Iterator[nn.Module]:
    """Hand out the last column to train, with all others frozen, and leave every mode and flag as it was.

    What is frozen takes no gradient, is not among what the caller gives an optimizer, and has its norms in evaluation
    mode, so that their running statistics stay.
    """
    modes = {module: module.training for module in network.modules()}
    flags = {parameter: parameter.requires_grad for parameter in network.parameters()}
    last = network.columns[-1]
    try:
        network.eval()
        network.requires_grad_(False)
        last.train().requires_grad_(True)
        yield last
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

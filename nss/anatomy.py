"""Find the neurons of any traceable network and which of them hang together.

Every output channel of every layer gets a number (an *id*). The network runs once on two blank images, and beside each
activation travels an integer tensor of the same shape that names, for each entry, the channel it came from (-1: none).
Operations that move numbers (cat, flatten, chunk, shuffle) move the names; adding two tensors ties their names; a
layer with weights reads names and makes new ones. So residual adds, concat offsets, depthwise layers, squeeze-excite
and channel shuffles need no case of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn

from nss import operations as ops
from nss.contexts import evaluating
from nss.coupling import Classes
from nss.errors import SiteError
from nss.mask import ChannelMask
from nss.tracing import trace

NONE = -1
# Of one image alone `x.squeeze()` would drop the axis of the images too.
BLANKS = 2
# No channel and no partner needed: one value spread over all channels of another tensor.
SPREAD = -2
TIED = "it is tied to channels that are no neurons"
GROUP_NORM = "a GroupNorm averages over it and its neighbours"
GROUPED = "a grouped convolution reads it beside channels that are no neurons"


@dataclass(frozen=True)
class Producer:
    """A call of a layer with weights: which channels it reads and makes."""

    name: str
    """the layer's path in the network, with #2, #3 .. for further calls"""
    module: str
    node: fx.Node
    out_ids: torch.Tensor
    """int64 [out channels]"""
    in_ids: torch.Tensor
    """int64 [in channels, as the weight's second axis counts them times groups]; -1 where nothing is tracked"""
    dim: int
    """the channel axis of the output: 1 for maps, the last for a linear layer"""
    places: int
    """number of positions of the output, for one image"""


@dataclass(frozen=True)
class Scaler:
    """A call of a module with one parameter for each channel (BatchNorm)."""

    module: str
    ids: torch.Tensor


@dataclass
class Anatomy:
    """What `dissect` found. `fixed` channels are never removed; `mixed` ones are no neurons at all."""

    graph: fx.GraphModule
    classes: Classes = field(default_factory=Classes)
    removal: list[tuple[int, int]] = field(default_factory=list)
    """further ties that hold for removal only: channels of a grouped convolution leave every group alike"""
    fixed: dict[int, str] = field(default_factory=dict)
    tied: set[int] = field(default_factory=set)
    """those of the fixed ones that are tied to what is no neuron, whatever else fixes them"""
    mixed: dict[int, str] = field(default_factory=dict)
    producers: list[Producer] = field(default_factory=list)
    scalers: list[Scaler] = field(default_factory=list)
    restless: list[tuple[fx.Node, torch.Tensor, int]] = field(default_factory=list)
    """(node, ids along the channel axis, that axis) after which a masked channel is not zero any more"""


def dissect(network: nn.Module, input_shape: tuple[int, ...]) -> Anatomy:
    """Trace `network` and find its channels. input_shape: (channels, height, width), without the batch.

    Raises SiteError when it cannot be traced or does not take that shape. The network is left as it was.
    """
    try:
        with evaluating(network), torch.no_grad():
            walker = _Walker(trace(network))
            first = next(network.parameters(), torch.zeros(()))
            walker.run(torch.zeros(BLANKS, *input_shape, device=first.device, dtype=first.dtype))
    except SiteError:
        raise
    except Exception as problem:
        raise SiteError(
            f"the network does not take a {input_shape} image: {problem}", where=type(network).__name__
        ) from problem
    return walker.anatomy


def head_of(anatomy: Anatomy) -> Producer | None:
    """Return the layer whose outputs are the class scores; None when something else makes them."""
    scores = next(node for node in anatomy.graph.graph.nodes if node.op == "output").all_input_nodes
    return next((each for each in anatomy.producers if scores == [each.node]), None)


class _Walker(fx.Interpreter):
    """Runs the graph on real numbers and carries the ids along."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.anatomy = Anatomy(graph)
        self.ids: dict[fx.Node, Any] = {}
        self._seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, then say where its channels come from."""
        result = super().run_node(n)
        self.ids[n] = self._ids_of(n, result)
        return result

    # -- which rule applies ------------------------------------------------------------------------------------

    def _ids_of(self, node: fx.Node, result: Any) -> Any:
        if node.op == "output":
            self._mark(self.anatomy.mixed, self._inputs(node), "it is read by the caller")
            return None
        if node.op in ("placeholder", "get_attr"):
            return _blank(result)
        module = ops.module_of(node, self.anatomy.graph)
        if isinstance(module, ops.LAYERS):
            return self._layer(node, module, result)
        return self._rule(node, module, result)

    def _rule(self, node: fx.Node, module: nn.Module | None, result: Any) -> Any:
        root, name = self.anatomy.graph, ops.name_of(node)
        first = self._first(node)
        if _blank(result) is None:
            return None
        if isinstance(module, ChannelMask):
            self._mark(self.anatomy.fixed, [first], "it is masked already")
        if ops.is_norm(node, root):
            return self._norm(node, first, module)
        if isinstance(result, torch.Tensor) and (ops.is_activation(node, root) or ops.is_passing(node, root)):
            return self._follow(node, first, result)
        if isinstance(module, nn.Flatten):
            return module(first)
        if name in ops.BINARY_NAMES and not self._divides(node):
            return self._combine(node, result)
        if name in ops.REDUCTION_NAMES:
            return self._reduce(node, first)
        if name in ops.FREE_MOVES | ops.RIGID_MOVES:
            return self._move(node, result)
        return self._opaque(node, result)

    # -- the rules ---------------------------------------------------------------------------------------------

    def _layer(self, node: fx.Node, module: nn.Module, result: torch.Tensor) -> torch.Tensor:
        convolution = isinstance(module, ops.CONVOLUTIONS)
        dim = 1 if convolution else result.dim() - 1
        source = self._first(node)
        in_ids = _along(source, dim if convolution else source.dim() - 1)
        if in_ids is None:
            self._mark(self.anatomy.mixed, [source], f"{node.target} reads positions, not channels")
            in_ids = torch.full((source.shape[dim],), NONE)
        out_ids = torch.arange(result.shape[dim]) + self.anatomy.classes.grow(result.shape[dim])
        groups = int(getattr(module, "groups", 1))
        if groups > 1:
            self._grouped(in_ids, out_ids, groups)
        self._same_module(str(node.target), in_ids, out_ids)
        module_path = str(node.target)
        call = 1 + sum(each.module == module_path for each in self.anatomy.producers)
        name = module_path if call == 1 else f"{module_path}#{call}"
        places = result.numel() // len(out_ids) // BLANKS
        self.anatomy.producers.append(Producer(name, module_path, node, out_ids, in_ids, dim, places))
        shape = [1] * result.dim()
        shape[dim] = len(out_ids)
        return out_ids.view(shape).expand(result.shape)

    def _grouped(self, in_ids: torch.Tensor, out_ids: torch.Tensor, groups: int) -> None:
        if groups == len(in_ids):  # depthwise: each output channel is its input channel, filtered
            self._tie(in_ids.repeat_interleave(len(out_ids) // groups), out_ids)
            return
        for ids in (in_ids, out_ids):
            rows = ids.view(groups, -1)
            whole = (rows >= 0).all(0)
            # Of each column, all groups lose their channel or none does.
            self._mark(self.anatomy.fixed, [rows[:, ~whole]], GROUPED)
            tracked = rows[:, whole]
            self.anatomy.removal += [
                pair for row in tracked[1:] for pair in zip(tracked[0].tolist(), row.tolist(), strict=True)
            ]

    def _same_module(self, name: str, in_ids: torch.Tensor, out_ids: torch.Tensor) -> None:
        """One set of weights used twice has one set of channels."""
        if name in self._seen:
            self._tie(self._seen[name][0], in_ids)
            self._tie(self._seen[name][1], out_ids)
        else:
            self._seen[name] = (in_ids, out_ids)

    def _norm(self, node: fx.Node, source: torch.Tensor, module: nn.Module | None) -> torch.Tensor:
        ids = _along(source, 1)
        if isinstance(module, ops.CHANNEL_NORMS) and ids is not None:
            self._same_module(str(node.target), ids, ids)
            self.anatomy.scalers.append(Scaler(str(node.target), ids))
            self.anatomy.restless.append((node, ids, 1))
        elif isinstance(module, nn.GroupNorm) and module.affine and ids is not None:
            # Its statistics need the channels that are masked: only its own weights can silence one.
            self._mark(self.anatomy.fixed, [source], GROUP_NORM)
            self.anatomy.scalers.append(Scaler(str(node.target), ids))
            self.anatomy.restless.append((node, ids, 1))
        else:
            self._mark(self.anatomy.mixed, [source], f"{node.target} averages over channels")
        return source

    def _follow(self, node: fx.Node, source: torch.Tensor, result: torch.Tensor) -> Any:
        self._disturb(node, source)
        if source.shape == result.shape:
            return source
        inner = source[(slice(None), slice(None), *[slice(0, 1)] * (source.dim() - 2))]
        if not bool((_squeezed(source) == _squeezed(inner.expand(source.shape))).all()):
            return self._opaque(node, result)
        return inner.expand(result.shape)

    def _disturb(self, node: fx.Node, source: torch.Tensor) -> None:
        """Note that zeros do not stay zeros behind this node."""
        if not ops.moves_zero(node, self.anatomy.graph):
            return
        for dim in (1, source.dim() - 1):
            ids = _along(source, dim)
            if ids is not None:
                self.anatomy.restless.append((node, ids, dim))
                return

    def _combine(self, node: fx.Node, result: torch.Tensor) -> Any:
        tracked = [self.ids[arg] for arg in node.args if isinstance(arg, fx.Node)]
        tensors = [ids for ids in tracked if isinstance(ids, torch.Tensor)]
        self._disturb(node, tensors[0])
        if len(tensors) < 2:
            return tensors[0].expand(result.shape)
        left, right = (self._spread(ids, other) for ids, other in (tensors, tensors[::-1]))
        left, right = torch.broadcast_tensors(left, right)
        self._tie_tensors(left, right)
        return torch.where(left >= 0, left, right)

    def _divides(self, node: fx.Node) -> bool:
        """Say whether the node divides by channels: none of them can be set to zero."""
        divisor = self.ids.get(node.args[1]) if isinstance(node.args[1], fx.Node) else None
        return ops.name_of(node) in ops.DIVISIONS and divisor is not None and bool((_squeezed(divisor) >= 0).any())

    def _spread(self, ids: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """One value against many channels has no partner among them; it cannot be removed either."""
        axis = 1 if other.dim() == 4 else other.dim() - 1
        single = ids.numel() == 1 or (other.dim() == ids.dim() and ids.shape[axis] == 1 < other.shape[axis])
        if not single:
            return ids
        self._mark(self.anatomy.fixed, [ids], "it is spread over all channels of another layer")
        return torch.full_like(ids, SPREAD)

    def _reduce(self, node: fx.Node, source: torch.Tensor) -> Any:
        args = [*node.args[1:]]
        axes = cast("list[int]", args[0] if args else node.kwargs.get("dim"))
        keep = bool(node.kwargs.get("keepdim", args[1] if len(args) > 1 else False))
        if axes is None:
            return self._opaque(node, source.new_zeros(()))
        low, high = torch.amin(source, axes, keep), torch.amax(source, axes, keep)
        if not torch.equal(low, high):
            self._mark(self.anatomy.mixed, [source], f"{ops.name_of(node)} adds channels up")
            return torch.full_like(low, NONE)
        return low

    def _move(self, node: fx.Node, result: Any) -> Any:
        holder = self.ids.get(node.all_input_nodes[0])
        if ops.name_of(node) == "getitem" and not isinstance(holder, torch.Tensor):
            return operator.getitem(holder, node.args[1]) if holder is not None else None
        args = fx.map_arg(node.args, self._ids_or_value)
        kwargs = fx.map_arg(node.kwargs, self._ids_or_value)
        moved = ops.move_ids(node, args, kwargs)
        if self._fixes_sizes(node, result):
            self._mark(self.anatomy.fixed, self._inputs(node), f"{ops.name_of(node)} fixes the number of channels")
        return moved

    def _fixes_sizes(self, node: fx.Node, result: Any) -> bool:
        name = ops.name_of(node)
        if name in ("view", "reshape"):
            return not ops.flattens_all(node, result)
        if name == "getitem":
            return bool(self._first(node).shape[1:2] != result.shape[1:2])
        return name in ops.RIGID_MOVES

    def _opaque(self, node: fx.Node, result: Any) -> Any:
        self._mark(self.anatomy.mixed, self._inputs(node), f"{node.target} reads it in a way that is not known")
        return _blank(result)

    # -- helpers -----------------------------------------------------------------------------------------------

    def _ids_or_value(self, node: fx.Node) -> Any:
        ids = self.ids[node]
        return self.env[node] if ids is None else ids

    def _first(self, node: fx.Node) -> torch.Tensor:
        source = next(iter(self._inputs(node)), None)
        return source if source is not None else torch.full((1, 1), NONE)

    def _inputs(self, node: fx.Node) -> list[torch.Tensor]:
        return [leaf for source in node.all_input_nodes for leaf in _leaves(self.ids[source])]

    def _mark(self, register: dict[int, str], tensors: list[torch.Tensor], reason: str) -> None:
        for ids in tensors:
            for member in _squeezed(ids).unique().tolist():
                if member >= 0:
                    register.setdefault(member, reason)

    def _tie(self, left: torch.Tensor, right: torch.Tensor) -> None:
        both = (left >= 0) & (right >= 0) & (left != right)
        self.anatomy.classes.tie(zip(left[both].tolist(), right[both].tolist(), strict=True))
        for lone, partner in ((left, right), (right, left)):
            members = lone[(lone >= 0) & (partner == NONE)]
            self._mark(self.anatomy.fixed, [members], TIED)
            self.anatomy.tied.update(members.tolist())

    def _tie_tensors(self, left: torch.Tensor, right: torch.Tensor) -> None:
        for axis in range(left.dim()):
            if left.stride(axis) == 0 and right.stride(axis) == 0:
                left, right = left.narrow(axis, 0, 1), right.narrow(axis, 0, 1)
        pairs = torch.stack([left.flatten(), right.flatten()])
        key = pairs[0] * (len(self.anatomy.classes) + 2) + pairs[1]
        _, index = torch.unique(key, return_inverse=True)
        first = torch.zeros(int(index.max()) + 1, dtype=torch.int64).scatter_(0, index, torch.arange(len(index)))
        self._tie(pairs[0, first], pairs[1, first])


def _blank(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return torch.full((1,) * result.dim(), NONE).expand(result.shape)
    if isinstance(result, (tuple, list)) and any(isinstance(part, torch.Tensor) for part in result):
        return tuple(_blank(part) for part in result)
    return None


def _leaves(ids: Any) -> Iterator[torch.Tensor]:
    if isinstance(ids, torch.Tensor):
        yield ids
    elif isinstance(ids, (tuple, list)):
        for part in ids:
            yield from _leaves(part)


def _squeezed(ids: torch.Tensor) -> torch.Tensor:
    """Drop axes along which an expanded tensor repeats itself."""
    for axis in range(ids.dim()):
        if ids.stride(axis) == 0:
            ids = ids.narrow(axis, 0, min(1, ids.shape[axis]))
    return ids


def _along(ids: torch.Tensor, dim: int) -> torch.Tensor | None:
    """Return the channel names along one axis, int64 [c], or None if they are not the same at every position."""
    if ids.dim() <= dim:
        return None
    rows = _squeezed(ids.movedim(dim, -1)) if ids.stride(dim) else ids.movedim(dim, -1)
    rows = rows.reshape(-1, ids.shape[dim])
    return rows[0].clone() if bool((rows == rows[0]).all()) else None

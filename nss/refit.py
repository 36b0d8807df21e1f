"""Refit to the original: closed-form weights that give the original's outputs from the smaller network (method.md 5).

Layer by layer in forward order, each layer of the smaller network gets the weights that rebuild, in least squares over
samples and positions, what the original's layer computed, from what the smaller network feeds it. Kernel positions are
fitted together. Errors of earlier layers are thereby corrected as far as a layer can, and do not pile up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nss import operations as ops
from nss.anatomy import Anatomy, Producer, dissect
from nss.errors import RestructureError
from nss.functional import without_inplace
from nss.merge import output_scale
from nss.model import Classifier, device_of
from nss.surgery import Layer

RIDGE = 1e-2
WIDEST = 4608
"""largest number of inputs x kernel positions that is fitted: 512 channels under 3x3"""
ROWS = 100_000
"""samples x positions that a layer's moments are taken over, at most"""


class _ReachedError(Exception):
    """The node that was wanted has run."""


class Probe(fx.Interpreter):
    """Runs a traced network up to the nodes that are wanted, by name, and hands out their values."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(without_inplace(graph))
        self._wanted: set[str] = set()
        self._found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; stop behind the last one that is wanted."""
        value = super().run_node(n)
        if n.name in self._wanted:
            self._found[n.name] = value
            if len(self._found) == len(self._wanted):
                raise _ReachedError
        return value

    def values(self, inputs: Tensor, names: Sequence[str]) -> list[Tensor]:
        """inputs: what the network reads. Returns the values of the named nodes."""
        self._wanted, self._found = set(names), {}
        try:
            self.run(inputs)
        except _ReachedError:
            self.env.clear()
        return [self._found[name] for name in names]


def refit(
    original: Classifier,
    smaller: Classifier,
    left: Mapping[str, Tensor],
    images: Tensor,
    *,
    seed: int = 0,
    ridge: float = RIDGE,
    batch_size: int = 100,
) -> None:
    """Fit the weights of `smaller`, in place, so that its layers give what those of `original` gave.

    original, smaller: models with the same forward, in evaluation mode. left: {call of a layer: bool [outputs], True =
    still in `smaller`}. images: what models take [n, c, h, w]. No gradient is taken. Layers that are wider than WIDEST,
    or whose kernels are three-dimensional, keep their weights.
    Raises RestructureError where the weights that are found, or what they are found from, are not finite in the
    precision of the layer; layers before it are fitted by then.

    >>> refit(model, smaller, {"features.0": torch.arange(32) < 16, ..}, images)
    """
    theirs, ours = (dissect(each.network, each.spec.input_shape) for each in (original, smaller))
    probes = Probe(theirs.graph), Probe(ours.graph)
    calls: dict[str, list[Producer]] = {}
    for producer in ours.producers:
        calls.setdefault(producer.module, []).append(producer)
    generator = torch.Generator().manual_seed(seed)
    changed = False
    for module, producers in calls.items():
        layer = cast(Layer, smaller.network.get_submodule(module))
        before = cast(Layer, original.network.get_submodule(module))
        changed = changed or layer.weight.shape != before.weight.shape
        if not changed or not _fits(layer):
            continue
        moments = _Moments(module, layer)
        for producer in producers:
            gather = _Gather(layer, producer, ours, left[producer.name])
            count = max(1, ROWS // max(1, len(images)) // len(producers))
            for batch in images.split(batch_size):
                with torch.no_grad():
                    inputs = original.normalise(batch.to(device_of(original)))
                    moments.add(*gather(probes, inputs, count, generator))
        norms = [ops.norm_behind(producer.node, ours.graph) for producer in producers]
        moments.solve(ridge, norms[0] if all(norm is norms[0] for norm in norms) else None)


def _fits(layer: Layer) -> bool:
    return layer.weight.dim() <= 4 and layer.weight[0].numel() <= WIDEST


class _Gather:
    """Reads, for one call of a layer, its input in the smaller network and the output that is wanted of it."""

    def __init__(self, layer: Layer, producer: Producer, anatomy: Anatomy, left: Tensor) -> None:
        self.layer, self.left, self.dim = layer, left, producer.dim
        self.node = producer.node.name
        self.source = producer.node.all_input_nodes[0].name
        self.other = _added_to(producer.node, anatomy.graph)
        self.scale = output_scale(producer, anatomy.graph).to(layer.weight.device, _wide(layer.weight.dtype))

    def __call__(
        self, probes: tuple[Probe, Probe], batch: Tensor, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return rows of inputs [n, d] and of outputs that are wanted [n, outputs], in float32 at least."""
        extra = [self.other] if self.other else []
        wanted, *theirs = probes[0].values(batch, [self.node, *extra])
        inputs, *ours = probes[1].values(batch, [self.source, *extra])
        rows = self._rows(wanted)[..., self.left]
        for their, our in zip(theirs, ours, strict=True):
            # What the path around has lost is made up for here.
            if their.shape == wanted.shape:
                lost = self._rows(their)[..., self.left] - self._rows(our)
                rows = rows + torch.where(self.scale.abs() > 0.1 * self.scale.abs().max(), lost / self.scale, 0)
        places = torch.randperm(rows.shape[1], generator=generator)[:count]
        read = _patches(inputs, self.layer, places).flatten(0, 1)
        return read.to(_wide(read.dtype)), rows[:, places].flatten(0, 1)

    def _rows(self, x: Tensor) -> Tensor:
        """Outputs by sample and position. Returns [n, positions, outputs]."""
        x = x.to(_wide(x.dtype))
        if self.dim == 1 and x.dim() > 2:
            return x.flatten(2).transpose(1, 2)
        return x.reshape(len(x), -1, x.shape[-1])


def _added_to(node: fx.Node, graph: fx.GraphModule) -> str | None:
    """Return the name of what a layer's output is added to, behind its own norm and dropout at most, or None.

    A sum with a factor (`alpha`) is none: what is made up for would have to be scaled.
    """
    user = next(iter(node.users), node)
    if ops.norm_behind(node, graph) is not None:
        node, user = user, next(iter(user.users), user)
    while len(node.users) == 1 and ops.is_dropout(user, graph):
        node, user = user, next(iter(user.users), user)
    if len(node.users) != 1 or ops.name_of(user) not in ("add", "iadd") or user.kwargs.get("alpha", 1) != 1:
        return None
    return next((each.name for each in user.all_input_nodes if each is not node), None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Half precision is for the network's own work: sums of squares overflow in it, or lose what they are made of."""
    return torch.promote_types(dtype, torch.float32)


def _patches(x: Tensor, layer: Layer, places: Tensor) -> Tensor:
    """What the output positions at `places` read, and no others: all of them take gigabytes of large maps.

    places: int64 [places], of the map of the outputs row by row. Returns [n, places, channels x kernel positions].
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1])[:, places]
    kernel, stride, dilation = (
        (1,) * (2 - len(each)) + each for each in (layer.kernel_size, layer.stride, layer.dilation)
    )
    padding = layer._reversed_padding_repeated_twice
    x = F.pad(x, padding, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    x = x if x.dim() == 4 else x.unsqueeze(2)
    width = x.shape[3]
    across = (width - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    corners = places // across * stride[0] * width + places % across * stride[1]
    window = torch.arange(kernel[0])[:, None] * dilation[0] * width + torch.arange(kernel[1]) * dilation[1]
    read = corners[:, None] + window.flatten()
    return x.flatten(2)[:, :, read.to(x.device)].transpose(1, 2).flatten(2)


class _Moments:
    """Second moments of a layer's inputs and of wanted outputs with them, for each group of a grouped convolution.

    They are taken about the means of the first rows: products of what hardly varies lose its variation otherwise.
    Products are taken where the rows are, and added up and solved with on the CPU.
    """

    def __init__(self, name: str, layer: Layer) -> None:
        self.name, self.layer, self.groups = name, layer, int(getattr(layer, "groups", 1))
        self.size, self.outputs = layer.weight[0].numel(), len(layer.weight) // self.groups
        self.count = 0
        self.origin: tuple[Tensor, Tensor] | None = None
        self.inputs = torch.zeros(self.groups, self.size, dtype=torch.float64)
        self.wanted = torch.zeros(self.groups, self.outputs, dtype=torch.float64)
        self.square = torch.zeros(self.groups, self.size, self.size, dtype=torch.float64)
        self.cross = torch.zeros(self.groups, self.outputs, self.size, dtype=torch.float64)

    def add(self, inputs: Tensor, wanted: Tensor) -> None:
        """inputs: [n, groups x size], wanted: [n, groups x outputs]; products are taken in their precision."""
        x = inputs.view(len(inputs), self.groups, self.size).transpose(0, 1)
        y = wanted.reshape(len(wanted), self.groups, self.outputs).transpose(0, 1)
        self.origin = self.origin or (x.mean(1, keepdim=True), y.mean(1, keepdim=True))
        x, y = x - self.origin[0], y - self.origin[1]
        self.count += len(inputs)
        self.inputs += x.sum(1).cpu().double()
        self.wanted += y.sum(1).cpu().double()
        self.square += (x.transpose(1, 2) @ x).cpu().double()
        self.cross += (y.transpose(1, 2) @ x).cpu().double()

    def solve(self, ridge: float, norm: nn.BatchNorm2d | None) -> None:
        """Move the layer's weights to the least squares solution; the ridge pulls towards those it has.

        The mean is met by the bias, or else by the norm behind: what it takes for the mean moves along.
        Raises RestructureError for what is not finite.
        """
        weight = self.layer.weight.detach().cpu().double().reshape(self.groups, self.outputs, self.size)
        mean_in, mean_out, square, cross = self._centred()
        if self.layer.bias is None and norm is None:
            square = square + mean_in[:, :, None] * mean_in[:, None]
            cross = cross + mean_out[:, :, None] * mean_in[:, None]
        level = square.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        inner = square + ridge * level[:, None, None] * torch.eye(self.size, dtype=torch.float64)
        self._check(inner, cross)
        moved = weight + torch.linalg.solve(inner, (cross - weight @ square).transpose(1, 2)).transpose(1, 2)
        missing = (mean_out - (moved @ mean_in[:, :, None])[..., 0]).flatten()
        self._check(moved.to(self.layer.weight.dtype), missing.to(self.layer.weight.dtype))
        with torch.no_grad():
            self.layer.weight.copy_(moved.reshape(self.layer.weight.shape))
            if self.layer.bias is not None:
                self.layer.bias.copy_(missing)
            elif norm is not None and norm.running_mean is not None:
                norm.running_mean -= missing.to(norm.running_mean)

    def _check(self, *found: Tensor) -> None:
        if not all(bool(each.isfinite().all()) for each in found):
            raise RestructureError(
                f"no finite weights rebuild what the layer {self.name!r} of the original computes",
                where=f"{self.name}, in {str(self.layer.weight.dtype).removeprefix('torch.')}",
                allowed="a model whose layers compute finite numbers on the images, and weights that its type can hold",
                fix="look for weights or images that are not finite; of a model in half precision restructure "
                "model.float(), with a profile of that",
            )

    def _centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the means of inputs and wanted outputs, and their second moments about them."""
        assert self.origin is not None, "moments of no rows"
        x, y = self.inputs / self.count, self.wanted / self.count
        square = self.square / self.count - x[:, :, None] * x[:, None]
        cross = self.cross / self.count - y[:, :, None] * x[:, None]
        mean_in, mean_out = (each[:, 0].cpu().double() for each in self.origin)
        return mean_in + x, mean_out + y, square, cross

"""One pass over samples: a tapped copy of the network whose activations and gradients are added up (method.md 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from threadpoolctl import ThreadpoolController
from torch import Tensor, fx, nn

from nss.anatomy import Producer
from nss.deeplift import Way, in_parts, refer, rescaling
from nss.errors import ProfileError
from nss.functional import with_norms_folded, without_inplace
from nss.operations import is_depthwise
from nss.precision import in_double
from nss.sites import Site, Sites
from nss.surgery import Layer
from nss.taps import Tap, with_modules
from nss.windows import chosen_by_content, correlations, positions_of, together

# Bytes that the allocator keeps from one batch to the next, see `_keep_memory`.
KEPT = 62 << 20
# With fewer rows at a time, kernels lose more than memory that is kept gains.
FEWEST = 32


@dataclass(frozen=True)
class Reader:
    """A layer with weights and the channels that enter it, for the Gram matrix of its input."""

    name: str
    node: fx.Node
    dim: int
    ids: torch.Tensor
    """names of the channels in the anatomy, int64 [channels]"""


@dataclass(frozen=True)
class Window:
    """A layer with weights, for what its window sees together."""

    name: str
    node: fx.Node
    layer: Layer
    channels: int


class Gatherer:
    """Adds up what each neuron contributes to each category.

    `sums` {sum: {layer: float64 [classes, neurons]}}, `grams` {reader: float64 [channels, channels]}, `positions`
    {reader: number of positions that were added up}, `counts` int64 [classes], `reads` {site: (reader, places)};
    `windows` {layer: float64 [lags, groups, channels + 1, channels + 1]} of one image in so many, `window_positions`
    {layer: number of positions that were added up}.
    Raises ProfileError for a network that normalises an image by others of its batch.
    """

    def __init__(self, sites: Sites, sums: Sequence[str], classes: int, *, gram: bool, windows: int = 0) -> None:
        _refuse_batch_statistics(sites.anatomy.graph)
        _keep_memory()
        self._way = Way(watched={site.node.name: partial(_summed, site) for site in sites})
        self._sites, self._readers = list(sites), list(readers(sites)) if gram else []
        self.counts = torch.zeros(classes, dtype=torch.int64)
        self.sums = {
            name: {site.name: torch.zeros(classes, len(site), dtype=torch.float64) for site in sites} for name in sums
        }
        self.grams = {
            each.name: torch.zeros(len(each.ids), len(each.ids), dtype=torch.float64) for each in self._readers
        }
        self.positions = dict.fromkeys(self.grams, 0)
        self.reads = _reads(sites, self._readers)
        self._one_in, self._windows = windows, list(_windows(sites)) if windows else []
        self.windows: dict[str, Tensor] = {}
        self.window_positions = {window.name: 0 for window in self._windows}
        self._seen: dict[str, Tensor] = {}
        self._bases: dict[str, Tensor] = {}
        self._rows = 0
        watched: list[fx.Node] = [site.node for site in sites]
        watched += [*(each.node for each in self._readers), *(each.node for each in self._windows)]
        nodes = dict.fromkeys(node.name for node in watched)
        graph = with_norms_folded(without_inplace(sites.anatomy.graph), nodes)
        by_name = {node.name: node for node in graph.graph.nodes}
        tapped = with_modules(graph, {by_name[name]: Tap(self._keeper(name)) for name in nodes}, "tap")
        self._graph = rescaling(tapped, self._way) if "deeplift" in sums else tapped

    def _keeper(self, name: str) -> Callable[[Tensor], Tensor]:
        def see(x: Tensor) -> Tensor:
            self._seen[name] = x
            return x

        return see

    def see(self, inputs: Tensor, labels: Tensor, reference: Tensor, size: int) -> None:
        """Add one batch. inputs: what the network reads [n, c, h, w]; labels: int64 [n]; reference: [1, c, h, w].

        It goes through in pieces that are filled up with the reference: kernels are chosen by shape, and with one shape
        an image's numbers are the same in whatever batch it comes. size: of the largest batch.
        """
        if not self._rows:
            self._rows = self._refer(reference, size)
        for piece, own in zip(inputs.split(self._rows), labels.split(self._rows), strict=True):
            self._see(piece, own, reference)

    def _refer(self, reference: Tensor, size: int) -> int:
        """Put the reference through on its own: what it makes of each layer is the same for all batches.

        Returns how many rows go through at a time.
        """
        refer(self._graph, self._way, reference)
        held = 2 * sum(each.nbytes for each in self._seen.values())  # before and behind each nonlinearity
        if "deeplift" in self.sums:
            self._bases = dict(self._seen)
        self._seen.clear()
        return _rows_at_a_time(size, held) if reference.device.type == "cpu" else size

    def _see(self, inputs: Tensor, labels: Tensor, reference: Tensor) -> None:
        lifted = "deeplift" in self.sums
        missing = self._rows - len(inputs)
        rows = torch.cat([inputs, reference.expand(missing, *reference.shape[1:])]) if missing else inputs
        self._way.rescale = False
        with torch.set_grad_enabled(bool({"taylor", "deeplift"} & self.sums.keys())):
            logits = self._graph(rows.requires_grad_())[: len(labels)]
            if logits.shape[1] < len(self.counts):
                raise ProfileError(f"{len(self.counts)} classes, but the model has {logits.shape[1]} logits")
            chosen = labels.to(logits.device)[:, None]
            log_probability = F.log_softmax(logits, 1).gather(1, chosen).sum()
            logit = logits.gather(1, chosen).sum()
        activations = [self._seen[site.node.name] for site in self._sites]
        if "taylor" in self.sums:
            self._contribute("taylor", activations, log_probability, labels, keep_graph=lifted)
        if lifted:
            self._way.rescale = True
            self._contribute("deeplift", activations, logit, labels, keep_graph=False)
        self._add_levels(activations, labels)
        self._add_grams(len(labels))
        self._add_windows(inputs)
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        self._seen.clear()

    def _contribute(
        self, name: str, activations: list[Tensor], target: Tensor, labels: Tensor, *, keep_graph: bool
    ) -> None:
        """Add |sum over the map of (a - a0) * multiplier|; for Taylor a0 is zero and the multiplier the gradient."""
        self._way.sums.clear()
        multipliers = torch.autograd.grad(target, activations, allow_unused=True, retain_graph=keep_graph)
        for site, activation, multiplier in zip(self._sites, activations, multipliers, strict=True):
            if multiplier is None:
                continue
            found = self._way.sums.get(site.node.name)
            if found is None:
                bases = [self._bases[site.node.name]] if name == "deeplift" else []
                found = _products(activation.detach(), multiplier, site, *bases)
            self._add(name, site, found.abs(), labels)

    def _add_levels(self, activations: list[Tensor], labels: Tensor) -> None:
        if not {"abs", "mean", "square"} & self.sums.keys():
            return
        for site, activation in zip(self._sites, activations, strict=True):
            mean = _over_map(activation.detach(), site, torch.mean)
            for name, values in (("abs", mean.abs()), ("mean", mean), ("square", mean.square())):
                self._add(name, site, values, labels)

    def _add(self, name: str, site: Site, values: Tensor, labels: Tensor) -> None:
        """values: of all rows, since the order of additions within one may depend on how many there are."""
        if name in self.sums:
            self.sums[name][site.name].index_add_(0, labels, values[: len(labels)])

    def _add_grams(self, count: int) -> None:
        for reader in self._readers:
            table = _channel_table(self._seen[reader.node.name].detach()[:count], reader)
            self.grams[reader.name] += _second_moment(table)
            self.positions[reader.name] += len(table)

    def _add_windows(self, inputs: Tensor) -> None:
        if not self._windows:
            return
        chosen = chosen_by_content(inputs, self._one_in).nonzero()[:, 0].to(inputs.device)
        for window in self._windows if len(chosen) else ():
            x = self._seen[window.node.name].detach()[chosen]
            added = correlations(x, window.layer, window.channels)
            self.windows[window.name] = added + self.windows.get(window.name, 0)
            self.window_positions[window.name] += positions_of(x, window.layer, window.channels)


def _refuse_batch_statistics(graph: fx.GraphModule) -> None:
    """What such a norm makes of an image is another thing in every batch: sums over batches would say nothing of it."""
    for name, module in graph.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ProfileError(
                f"the norm {name!r} keeps no statistics: an image's numbers depend on the others of its batch",
                where=name,
                allowed="BatchNorm with running statistics (track_running_stats=True), or a norm of each image alone",
                fix="give it running statistics, by training it on, or use GroupNorm",
            )


def _keep_memory() -> None:
    """Let the allocator keep what a batch gives back for the next one: getting it anew takes up to a third of the time.

    The C library of Linux hands memory back beyond twice the largest block that was freed so far, blocks of 32 MB and
    more not counted (mallopt(3), M_MMAP_THRESHOLD). So one block just below that is taken, never touched, and freed.
    """
    torch.empty(KEPT // 2, dtype=torch.uint8)


def _rows_at_a_time(size: int, held: int) -> int:
    """Halve a batch until what is held of its rows, `held` bytes of each, is kept; leave it whole when it never is."""
    rows = size
    while rows * held > KEPT:
        if rows // 2 < FEWEST:
            return size
        rows = -(-rows // 2)
    return rows


def _summed(site: Site, products: Tensor) -> Tensor:
    return _over_map(products, site, torch.sum)


def _products(activation: Tensor, multiplier: Tensor, site: Site, *bases: Tensor) -> Tensor:
    """Sum (activation - base) * multiplier over the map, or without a base. Returns float64 [n, neurons]."""
    found = []
    for part, base in in_parts(activation, *bases):
        moved = activation[part] - base[0] if base else activation[part]
        found.append(_summed(site, moved * multiplier[part]))
    return torch.cat(found)


def _over_map(x: Tensor, site: Site, reduce: Callable[..., Tensor]) -> Tensor:
    places = [axis for axis in range(1, x.dim()) if axis != site.dim]
    # Half precision is for the network's own work: sums of it would lose what variances are made of.
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return (reduce(wide, places) if places else wide).cpu().double()


def _channel_table(x: Tensor, reader: Reader) -> Tensor:
    """Channels that enter a reader, over samples and positions. Returns float64 [positions, channels]."""
    if reader.dim == 1:
        x = (x if x.dim() > 2 else x.unflatten(1, (len(reader.ids), -1))).movedim(1, -1)
    return in_double(x.flatten(0, -2))


def _second_moment(table: Tensor) -> Tensor:
    """Sum of x x^T over the rows of a table.

    NumPy sees that the product is symmetric and computes half of it. Its library has threads of its own, which wait for
    the cores that PyTorch's threads keep busy: it gets one, and PyTorch multiplies where it has more than two.
    """
    if table.device.type != "cpu" or torch.get_num_threads() > 2:
        return (table.T @ table).cpu()
    array = table.numpy()
    with _numpy_threads().limit(limits=1):
        return torch.from_numpy(array.T @ array)


@cache
def _numpy_threads() -> Any:
    # What NumPy brought along, found once: looking through the libraries of a process takes milliseconds.
    return ThreadpoolController().select(user_api="blas")


def readers(sites: Sites) -> Iterator[Reader]:
    """Yield every layer that mixes the channels of some site, with the node that feeds it; depthwise ones do not."""
    own = torch.zeros(len(sites.anatomy.classes), dtype=torch.bool)
    for site in sites:
        own[site.ids] = True
    for producer in sites.anatomy.producers:
        ids = producer.in_ids
        mixes = not is_depthwise(sites.anatomy.graph.get_submodule(producer.module))
        if mixes and bool((ids >= 0).any()) and bool(own[ids.clamp_min(0)].any()):
            yield _reader(producer, sites)


def _windows(sites: Sites) -> Iterator[Window]:
    """Yield every layer with weights, the node that feeds it, and how many channels are taken together."""
    for producer in sites.anatomy.producers:
        layer = cast(Layer, sites.anatomy.graph.get_submodule(producer.module))
        reader = _reader(producer, sites)
        yield Window(producer.name, reader.node, layer, together(layer, len(reader.ids)))


def _reader(producer: Producer, sites: Sites) -> Reader:
    """A linear layer behind a flattened map reads each channel at several positions: one channel all the same."""
    ids = producer.in_ids
    source = producer.node.all_input_nodes[0]
    linear = isinstance(sites.anatomy.graph.get_submodule(producer.module), nn.Linear)
    repeats = int((ids == ids[0]).sum()) if linear and producer.dim == 1 else 1
    # Behind maps of several sizes each input counts for itself.
    if repeats > 1 and len(ids) % repeats == 0:
        rows = ids.view(-1, repeats)
        ids = rows[:, 0] if bool((rows == rows[:, :1]).all()) else ids
    return Reader(producer.name, source, producer.dim, ids)


def _reads(sites: Sites, readers: Sequence[Reader]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For each site, the first reader that all its neurons (or those they are coupled with) enter, and where."""
    roots = sites.anatomy.classes.roots()
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for reader in readers:
        place = {int(roots[channel]): index for index, channel in enumerate(reader.ids.tolist()) if channel >= 0}
        for site in sites:
            own = roots[site.ids].tolist()
            if site.name not in found and all(root in place for root in own):
                found[site.name] = (reader.name, tuple(place[root] for root in own))
    return found

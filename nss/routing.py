"""Not being told the task: which column's classes an image belongs to, from statistics of features that never move.

The features are what the first column computes, at several depths: frozen, so what was added up over the old classes
when they were learned stays true without an old image. With class means under one covariance, shrunken, the odds of
"a new class" against "an old one" are a function of the features; they shift the new logits alone, so the old ones stay
bit for bit what they were, whatever is learned later. Which of the new classes it is, the same statistics know too:
what they say and what the new column says is weighed by images that neither has seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from nss.anatomy import dissect
from nss.contexts import evaluating

SHRINKAGES = (1e-4, 1e-3, 1e-2, 1e-1)
LEAST = 1e-4
FEATURES = 1536
"""number of features that the router looks at, about; twice as many cost four times the room"""
PLAIN = (1.0, 0.0, 0.0, 0.0)
"""a gate that goes by its features alone"""
PULL, LEAST_PULL = 50.0, 0.3
"""how strongly other evidence is held back: PULL over the number of images, at least LEAST_PULL"""
BLEND, FEW = (1.0, 0.2), 10
"""what a column's logits and the scores by features, which are far larger, weigh where no image tells; half of the
second for means of so few images of a class, which are hardly known"""
RIDGE = 1e-3
"""keeps the odds by features from growing without end where they make no mistake"""
FINEST = 4
"""side of the finest grid that a map is averaged over"""


class Router(nn.Module):
    """Joins the logits of columns to one set, and keeps the statistics that it does so by.

    views: {name of a value of the first column: side of the grid that its maps are averaged to, 0 for what is no map}.
    features: their number in all. classes: number of classes of each column.

    >>> Router({"relu": 0}, 256, [5, 5])
    """

    mixes: Tensor
    """for each gate, what its odds are made of: weights of what `evidence` gives, and a constant"""
    blends: Tensor
    """for each gate, what its column's logits and the scores of their classes by features weigh"""
    counts: Tensor
    """images that each class was seen in, int64 [classes]"""
    means: Tensor
    """[classes, features]"""
    scatter: Tensor
    """sum over all images of the products of features about their class's mean: the upper triangle, row by row"""

    def __init__(self, views: Mapping[str, int], features: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.views, self.features, self.classes = dict(views), features, tuple(classes)
        known = torch.tensor(self.classes).cumsum(0).tolist()
        self.gates = nn.ModuleList(nn.utils.skip_init(nn.Linear, features, count) for count in known[1:])
        for parameter in self.gates.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("mixes", torch.tensor([PLAIN] * len(self.gates)).view(-1, len(PLAIN)))
        self.register_buffer("blends", torch.tensor([BLEND] * len(self.gates)).view(-1, len(BLEND)))
        self.register_buffer("counts", torch.zeros(known[-1], dtype=torch.int64))
        self.register_buffer("means", torch.zeros(known[-1], features))
        self.register_buffer("scatter", torch.zeros(features * (features + 1) // 2))

    def view(self, name: str, value: Tensor) -> Tensor:
        """value: what the first column computed, [n, c, h, w] or [n, c]. Returns its features [n, d]."""
        grid = self.views[name]
        return F.adaptive_avg_pool2d(value, grid).flatten(1) if grid else value

    def forward(self, logits: Sequence[Tensor], features: Tensor) -> Tensor:
        """logits: of each column alone [n, its classes]; features: [n, features]. Returns logits [n, all classes].

        P(class) = P(column) P(class | column): each column's classes are shifted to the odds that its gate gives it
        against all columns before. The first column's logits are handed on as they are.
        """
        joined = logits[0]
        for own, gate, mix, blend in zip(logits[1:], self.gates, self.mixes, self.blends, strict=True):
            scores = gate(features)
            level = joined.logsumexp(1, keepdim=True)
            odds = evidence(scores, joined, own) @ mix[:-1, None] + mix[-1]
            within = blend[0] * own + blend[1] * scores[:, joined.shape[1] :]
            joined = torch.cat([joined, within.log_softmax(1) + level + odds], 1)
        return joined

    def evidence(self, logits: Sequence[Tensor], features: Tensor, gate: int = -1) -> Tensor:
        """Return what speaks for the classes of a gate's column against all before, [n, 3].

        logits, features: as of `forward`. gate: its number, of the second column 0; default the last.
        """
        column = range(1, len(self.classes))[gate]
        joined = self(logits, features)[:, : sum(self.classes[:column])]
        return evidence(self.gates[gate](features), joined, logits[column])

    def take_over(self, earlier: Router) -> None:
        """Copy gates and statistics of a router with fewer columns."""
        with torch.no_grad():
            self.mixes[: len(earlier.mixes)] = earlier.mixes
            self.blends[: len(earlier.blends)] = earlier.blends
            for gate, old in zip(self.gates, earlier.gates, strict=False):
                gate.load_state_dict(old.state_dict())
            known = len(earlier.counts)
            self.counts[:known], self.means[:known] = earlier.counts, earlier.means
            self.scatter.copy_(earlier.scatter)

    def learn(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Add up what classes look like that were not seen before; all of a class's images must be among the batches.

        batches: features [n, features] and labels int64 [n].
        """
        known = len(self.counts)
        counts = torch.zeros(known, dtype=torch.int64)
        sums = torch.zeros(known, self.features, dtype=torch.float64)
        products = sums.new_zeros(self.features, self.features)
        for features, labels in batches:
            wide = features.cpu().double()
            counts += torch.bincount(labels, minlength=known)
            sums.index_add_(0, labels, wide)
            products += wide.T @ wide
        new = counts > 0
        means = sums[new] / counts[new, None].to(sums)
        scatter = products - sums[new].T @ means
        rows, columns = torch.triu_indices(self.features, self.features)
        self.counts[new], self.means[new] = counts[new].to(self.counts.device), means.to(self.means)
        self.scatter += scatter[rows, columns].to(self.scatter)

    def learn_anew(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Forget all images, learn those of all classes, and set every gate by the shrinkage that suits their number.

        batches: features [n, features] and labels int64 [n]. What the gates are mixed with stays.
        """
        for statistic in (self.counts, self.means, self.scatter):
            statistic.zero_()
        self.learn(batches)
        linear = self.scores(self.shrinkage())
        for gate in cast(Iterable[nn.Linear], self.gates):
            _set(gate, linear)

    def scores(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """Return weight [classes, features] and bias [classes] of each class's log likelihood, up to a common term.

        Gaussians about the means under (1 - s) S + s trace(S)/d I, S the covariance within classes and s the shrinkage
        (FeCAM, arXiv 2309.14062, with one covariance for all).
        """
        inner, means = self._covariance(), self.means.cpu().double()
        level = inner.diagonal().mean().clamp_min(1e-12)
        inner = (1 - shrinkage) * inner + shrinkage * level * torch.eye(len(inner)).to(inner)
        weight = torch.linalg.solve(inner, means.T).T
        return weight, -(weight * means).sum(1) / 2

    def _covariance(self) -> Tensor:
        """Return the covariance within classes, float64 [features, features]."""
        rows, columns = torch.triu_indices(self.features, self.features)
        upper = torch.zeros(self.features, self.features, dtype=torch.float64)
        upper[rows, columns] = self.scatter.cpu().double() / int(self.counts.sum())
        return upper + upper.triu(1).T

    def shrinkage(self) -> float:
        """Return the shrinkage that suits the number of images (oracle approximating, Chen et al. 2010)."""
        inner, count = self._covariance(), int(self.counts.sum())
        spread, level = float(inner.square().mean()), float(inner.diagonal().mean()) ** 2
        excess = (count + 1) * (spread - level / self.features)
        return min(1.0, max(LEAST, (spread + level) / excess)) if excess > 0 else 1.0

    def open_gate(self, held_out: Tensor, labels: Tensor) -> float:
        """Set the last column's gate from the statistics. Returns the shrinkage.

        held_out: features [n, features] and labels int64 [n] of images that were not trained on. The shrinkage is the
        one that suits the number of images, unless there are old and new ones among the held out and one of SHRINKAGES
        answers them better, both kinds alike heavy.
        """
        known = len(self.counts) - self.classes[-1]
        both = bool((labels < known).any()) and bool((labels >= known).any())
        # The first of those that answer equally well is chosen: what a few images cannot tell is left to their number.
        shrinkages: tuple[float, ...] = (self.shrinkage(), *SHRINKAGES) if both else (self.shrinkage(),)
        candidates = {each: self.scores(each) for each in shrinkages}
        chosen = max(candidates, key=lambda each: _judge(held_out, labels, candidates[each], known) if both else 0.0)
        _set(cast(nn.Linear, self.gates[-1]), candidates[chosen])
        return chosen


def _set(gate: nn.Linear, linear: tuple[Tensor, Tensor]) -> None:
    """Give a gate the scores of the classes that it knows, less what they have in common.

    Only differences between classes count, and the common part is a hundred times larger: in float32 they would be lost
    in it, and other kernels, as those of an export, would answer otherwise.
    """
    weight, bias = (each[: gate.out_features] for each in linear)
    with torch.no_grad():
        gate.weight.copy_(weight - weight.mean(0))
        gate.bias.copy_(bias - bias.mean())


def evidence(scores: Tensor, joined: Tensor, own: Tensor) -> Tensor:
    """Return what speaks for a column's classes against those before: log odds by features, levels of the logits.

    scores: of the gate [n, classes so far], joined: logits of the earlier classes [n, .], own: of the column [n, .].
    Returns [n, 3].
    """
    old = joined.shape[1]
    odds = scores[:, old:].logsumexp(1) - scores[:, :old].logsumexp(1)
    return torch.stack([odds, joined.logsumexp(1), own.logsumexp(1)], 1)


def fit_blend(own: Tensor, scores: Tensor, labels: Tensor, learned: int) -> Tensor:
    """Return what a column's logits and the scores of its classes by features weigh: BLEND, and what images say of it.

    own, scores: [n, classes of the column], labels: int64 [n], of images that neither learned from. learned: the fewest
    images that the mean of any of the classes is of. The most likely weights when the logarithm of each is BLEND's up
    to a standard deviation of 1 before any image is seen: from some hundred images on they decide alone, few of them
    hardly count.
    """
    own, scores, labels = own.cpu().double(), scores.cpu().double(), labels.cpu()
    start = torch.tensor((BLEND[0], BLEND[1] * learned / (learned + FEW)), dtype=torch.float64)
    free = torch.zeros(len(BLEND), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        blend = start * free.exp()
        misfit = F.cross_entropy(blend[0] * own + blend[1] * scores, labels, reduction="sum")
        total = misfit + free.square().sum() / 2
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return (start * free.detach().exp()).float()


def _judge(features: Tensor, labels: Tensor, linear: tuple[Tensor, Tensor], known: int) -> float:
    """Return the mean of the accuracies of old and of new images, with all classes to choose from."""
    right = ((features.cpu().double() @ linear[0].T + linear[1]).argmax(1) == labels).double()
    return float(right[labels < known].mean() + right[labels >= known].mean()) / 2


def fit_mix(seen: Tensor, new: Tensor) -> Tensor:
    """Return the weights that tell new from old images by the evidence: logistic regression, both kinds alike heavy.

    seen: what `evidence` gives [n, 3], new: bool [n], some of each. The odds by features have the right sign long
    before they have the right size, so their weight is any that is positive. A penalty on the other weights, in units
    of their evidence, makes a few images decide as PLAIN does.
    """
    seen, new = seen.cpu().double(), new.cpu()
    fewer = int(torch.minimum(new.sum(), (~new).sum()))
    weight = torch.where(new, fewer / int(new.sum()), fewer / int((~new).sum())).to(seen)
    middle, scale = _units(seen, weight / weight.sum())
    rows = F.pad((seen - middle) / scale, (0, 1), value=1.0)
    free = torch.zeros(len(PLAIN)).to(rows).requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        misfit = F.binary_cross_entropy_with_logits(rows @ _positive(free), new.to(rows), weight, reduction="sum")
        total = misfit + max(LEAST_PULL, PULL / fewer) * free[1:].square().sum() + RIDGE * free[0].exp().square()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    found = _positive(free.detach())
    weights = found[:-1] / scale
    return torch.cat([weights, found[-1:] - (weights @ middle)[None]]).float()


def _units(seen: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each evidence is measured from, and by: levels from their mean, odds from zero, by their spread."""
    middle = (weight @ seen) * torch.tensor([0.0, 1.0, 1.0]).to(seen)
    return middle, (weight @ (seen - middle).square()).sqrt().clamp_min(1e-6)


def _positive(free: Tensor) -> Tensor:
    """Return weights of which the first, that of the odds by features, is positive."""
    return torch.cat([free[:1].exp(), free[1:]])


def choose_views(column: nn.Module, input_shape: tuple[int, int, int]) -> tuple[dict[str, int], int]:
    """Return what the router looks at, {name of a value: side of its grid}, and the number of features that makes.

    That is what enters the head, and each map from which a smaller one is made, averaged over as fine a grid as
    FEATURES allow. column: the first, whole. input_shape: (channels, height, width).
    """
    anatomy = dissect(column, input_shape)
    shapes = _shapes(anatomy.graph, column, input_shape)
    made = {each.node for each in anatomy.producers}
    head = anatomy.producers[-1].node.all_input_nodes[0]
    maps: dict[str, list[int]] = {}
    for node in anatomy.graph.graph.nodes:
        for source in node.all_input_nodes:
            if source in made and source is not head and _shrinks(shapes[source], shapes[node]):
                maps[source.name] = shapes[source]
        if made & set(node.all_input_nodes):
            made.add(node)
    grids = _grids(maps, FEATURES - shapes[head][1])
    count = shapes[head][1] + sum(maps[name][1] * grid**2 for name, grid in grids.items())
    return {**grids, head.name: 0}, count


def _shrinks(source: list[int], made: list[int]) -> bool:
    """Say whether a map is made smaller, by the shapes before and after."""
    if len(source) != 4:
        return False
    if len(made) == 4:
        return math.prod(made[2:]) < math.prod(source[2:])
    return len(made) == 2 and made[1] < math.prod(source[1:])


def _grids(maps: Mapping[str, list[int]], room: int) -> dict[str, int]:
    """Return as fine a grid for each map as there is room for, the smallest number of features first.

    maps: {name: shape [1, c, h, w]}, room: number of features. Maps that do not fit in at all are left out.
    """
    grids = dict.fromkeys(maps, 0)
    while True:
        finer = {
            name: maps[name][1] * (grid + 1) ** 2
            for name, grid in grids.items()
            if grid < min(FINEST, *maps[name][2:]) and room >= maps[name][1] * ((grid + 1) ** 2 - grid**2)
        }
        if not finer:
            return {name: grid for name, grid in grids.items() if grid}
        name = min(finer, key=finer.__getitem__)
        room -= finer[name] - maps[name][1] * grids[name] ** 2
        grids[name] += 1


def _shapes(graph: fx.GraphModule, column: nn.Module, input_shape: tuple[int, int, int]) -> dict[fx.Node, list[int]]:
    """Return the shape of each value for one image; [] for what is no tensor."""
    with evaluating(column), torch.no_grad():
        ShapeProp(graph).propagate(torch.zeros(1, *input_shape, device=next(column.parameters()).device))
    return {node: list(getattr(node.meta.get("tensor_meta"), "shape", [])) for node in graph.graph.nodes}

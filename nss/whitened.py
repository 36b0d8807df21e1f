"""Adam in the units of the guard: steps that are as long in what layers computed on old data as they look."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from nss.guard import Term, root_of, rows_with_bias, weight_and_bias
from nss.rows import FreeRows, Movable


class _Rows:
    """The free rows x of a layer in coordinates v = (x - start) L, L L^T the damped moment of what they read."""

    def __init__(self, layer: FreeRows, moment: Tensor, decay: float) -> None:
        self.entries: Movable = layer.movable()
        self._decay = decay
        weight, shift = self.entries.weight, self.entries.shift
        self._start = [None if each is None else each.detach().clone() for each in (weight, shift)]
        self._inputs = moment.shape[-1] - 1
        if shift is None:
            moment = moment[..., :-1, :-1]
        self._root = root_of(moment.cpu().float()).to(weight.device)
        rows = self._rows(weight.detach(), None if shift is None else shift.detach())
        self.values = nn.Parameter(torch.zeros_like(rows))

    def pull(self) -> None:
        """Make the gradients of the entries those of the coordinates, with that of decay / 2 * |v|^2."""
        weight, shift = self.entries.weight, self.entries.shift
        of_weight = _over(_gradient(weight), self.entries.weight_unit)
        of_shift = None if shift is None else _over(_gradient(shift), self.entries.shift_unit)
        found = self._solved(self._rows(of_weight, of_shift), upper=False)
        self.values.grad = found.add_(self.values, alpha=self._decay)

    def push(self) -> None:
        """Move the entries to where the coordinates are."""
        weight, shift = self.entries.weight, self.entries.shift
        change = self._solved(self.values.detach(), upper=True)
        if shift is None:
            change = torch.cat([change, torch.zeros_like(change[..., :1])], -1)
        of_weight, of_shift = weight_and_bias(change, weight.shape)
        moved = cast(Tensor, self._start[0]) + _over(of_weight, self.entries.weight_unit)
        weight.copy_(moved if self.entries.unmasked is None else moved * self.entries.unmasked)
        if shift is not None:
            shift.copy_(cast(Tensor, self._start[1]) + _over(of_shift, self.entries.shift_unit))

    def _rows(self, weight: Tensor, shift: Tensor | None) -> Tensor:
        rows = rows_with_bias((weight.float(), shift), self._inputs)
        return rows[..., :-1] if shift is None else rows

    def _solved(self, rows: Tensor, *, upper: bool) -> Tensor:
        """Return L^-1 x, or where `upper` L^-T x, for each row x; L is one for all rows, or one for each."""
        triangle = self._root.mT if upper else self._root
        columns = rows[..., None] if triangle.dim() == 3 else rows.reshape(-1, rows.shape[-1]).mT
        found: Tensor = torch.linalg.solve_triangular(triangle, columns, upper=upper)
        return found[..., 0] if triangle.dim() == 3 else found.mT.reshape(rows.shape)


class WhitenedAdam(torch.optim.Adam):
    """Adam over the free rows of a frozen model, in coordinates of which a unit is one spread of what a row computes.

    What a kernel reads hangs together: neighbouring pixels are alike, channels go with each other. Entry by entry, the
    same step then changes a layer's output by much or by next to nothing. In coordinates in which what it reads on old
    data is white, every direction counts alike: the loss falls in fewer steps, and the same fall costs less of the old.
    There the guard, with the damping of the moments, is a weight decay: it takes no time.
    terms: of the guard. learning_rate: in spreads of an output, root mean square over old data. guard: its weight in
    the loss. Of a norm that is folded into the layer before it the shift moves, not the gain: the weights do the same.
    Sources: whitened inputs: arXiv 1507.00210; the input's factor of K-FAC: arXiv 1503.05671.

    >>> optimizer = WhitenedAdam(guard.terms, 0.002, guard=1.0)
    """

    def __init__(self, terms: Iterable[Term], learning_rate: float, guard: float) -> None:
        layers: dict[FreeRows, list[Term]] = defaultdict(list)
        for term in terms:
            layers[term.layer].append(term)
        self._layers = list(layers)
        self._each = [
            # A layer that is called again has a term for each call.
            _Rows(layer, torch.stack([each.moment for each in own]).sum(0), 2 * guard / own[0].outputs)
            for layer, own in layers.items()
        ]
        super().__init__([each.values for each in self._each], learning_rate)

    @property
    def count(self) -> int:
        """How many entries of the model move."""
        kinds = [(each.entries.weight, each.entries.shift) for each in self._each]
        return sum(entry.numel() for pair in kinds for entry in pair if entry is not None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the model's entries."""
        for layer in self._layers:
            layer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step against the gradients of the model's entries."""
        for each in self._each:
            each.pull()
        super().step()
        for each in self._each:
            each.push()


def _gradient(entry: nn.Parameter) -> Tensor:
    """Return the gradient, float32; zeros where the loss does not depend on the entry."""
    return torch.zeros(entry.shape, device=entry.device) if entry.grad is None else entry.grad.float()


def _over(rows: Tensor, units: Tensor) -> Tensor:
    """Divide each row by its unit; one without any moves nothing."""
    units = units.float().view(-1, *[1] * (rows.dim() - 1))
    return torch.where(units == 0, 0, rows / units)

"""Adam in the units of the guard: steps that are as long in what layers computed on old data as they look."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from nss.guard import Term, metric_of, root_of, rows_with_bias, weight_and_bias
from nss.rows import FreeRows, Movable, over


class _Rows:
    """The free rows x of a layer in coordinates v = (x - start) L, L L^T the damped moment of what they read."""

    def __init__(self, layer: FreeRows, moment: Tensor, decay: float) -> None:
        self.entries: Movable = layer.movable()
        self._decay = decay
        weight, shift = self.entries.weight, self.entries.shift
        self._start = [None if each is None else each.detach().clone() for each in (weight, shift)]
        self._inputs = moment.shape[-1] - 1
        self._root = root_of(metric_of(moment, weight, shift).cpu().float()).to(weight.device)
        places = self._places()
        self.values = nn.Parameter(torch.zeros_like(places))
        self._movable = None if self.entries.is_whole() else places

    def pull(self) -> None:
        """Make the gradients of the entries those of the coordinates, with that of decay / 2 * |v|^2."""
        weight, shift = self.entries.weight, self.entries.shift
        of_weight = over(_gradient(weight), self.entries.weight_unit.float())
        of_shift = None if shift is None else over(_gradient(shift), self.entries.shift_unit.float())
        found = self._solved(self._rows(of_weight, of_shift), upper=False)
        self.values.grad = found.add_(self._held(), alpha=self._decay)

    def push(self) -> None:
        """Move the entries to where the coordinates are."""
        weight, shift = self.entries.weight, self.entries.shift
        change = self._change()
        if shift is None:
            change = torch.cat([change, torch.zeros_like(change[..., :1])], -1)
        of_weight, of_shift = weight_and_bias(change, weight.shape)
        weight.copy_(cast(Tensor, self._start[0]) + over(of_weight, self.entries.weight_unit.float()))
        if shift is not None:
            shift.copy_(cast(Tensor, self._start[1]) + over(of_shift, self.entries.shift_unit.float()))

    def _places(self) -> Tensor:
        """Return for each row and input 1 where it moves what the row computes, 0 where masked or not handed on."""
        weight, shift = self.entries.weight, self.entries.shift
        ones = torch.ones_like(weight) if self.entries.unmasked is None else self.entries.unmasked.to(weight)
        of_weight = (over(ones, self.entries.weight_unit) != 0).float()
        of_shift = None if shift is None else (over(torch.ones_like(shift), self.entries.shift_unit) != 0).float()
        return self._rows(of_weight, of_shift)

    def _change(self) -> Tensor:
        """Return how far the entries are from where they began, in what the rows compute."""
        change = self._solved(self.values.detach(), upper=True)
        return change if self._movable is None else change * self._movable

    def _held(self) -> Tensor:
        """Return half of the gradient of |v|^2, v that of what moved: what cannot move must not make up for it."""
        if self._movable is None:
            return self.values.detach()
        change = self._change()[:, None] if self._root.dim() == 3 else self._change()
        weighed = (change @ self._root @ self._root.mT).reshape(self._movable.shape)
        return self._solved(weighed * self._movable, upper=False)

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
    """Adam over the free rows of a frozen model, in coordinates of which a unit moves what a row computes by one.

    What a kernel reads hangs together: neighbouring pixels are alike, channels go with each other. Entry by entry, the
    same step then changes a layer's output by much or by next to nothing. In coordinates in which what it reads on old
    data is white, every direction counts alike: the loss falls in fewer steps, and the same fall costs less of the old.
    There the guard, with the damping of the moments, is a weight decay: it takes no time.
    terms: of the guard. learning_rate: of a unit, root mean square over old data, behind the norm. guard: its weight in
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

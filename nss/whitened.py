"""Adam in the units of the guard: steps that are as long in what layers computed on old data as they look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nss.guard import Term
from nss.moments import flat_rows
from nss.rows import Movable, over


class _Rows:
    """The free rows x of a layer in coordinates v = L^T (x - start), L of `moments.Moments`."""

    def __init__(self, term: Term, decay: float) -> None:
        self.entries: Movable = term.layer.movable()
        self._decay = decay
        weight, shift = self.entries.weight, self.entries.shift
        self._start = flat_rows(weight.detach().float(), None if shift is None else shift.detach().float()).clone()
        is_bare = shift is None and term.layer.effective()[1] is not None
        self._moments = term.moments.bare() if is_bare else term.moments
        self._per_unit = self._shares()
        self.values = nn.Parameter(torch.zeros_like(self._per_unit))
        places = self._per_unit != 0
        self._movable = None if bool(places.all()) else places.float()

    def pull(self) -> None:
        """Make the gradients of the entries those of the coordinates, with that of decay / 2 * |v|^2."""
        weight, shift = self.entries.weight, self.entries.shift
        gradient = flat_rows(_gradient(weight), None if shift is None else _gradient(shift))
        self.values.grad = self._moments.whiten(gradient * self._per_unit).add_(self._held(), alpha=self._decay)

    def push(self) -> None:
        """Move the entries to where the coordinates are."""
        weight, shift = self.entries.weight, self.entries.shift
        moved = self._start + self._change() * self._per_unit
        weight.copy_(moved[:, : weight[0].numel()].view_as(weight))
        if shift is not None:
            shift.copy_(moved[:, -1])

    def _shares(self) -> Tensor:
        """Return for each row and input how much of an entry makes one of what its row computes more.

        0 where that is nothing at all: the entry is masked, or next to nothing of its row is handed on.
        """
        weight, units = self.entries.weight, self.entries.weight_unit.float()
        kept = torch.ones_like(weight) if self.entries.unmasked is None else self.entries.unmasked
        of_weight = over(kept.detach().float(), units)
        if self.entries.shift is None:
            return flat_rows(of_weight, None)
        return flat_rows(of_weight, over(torch.ones_like(units), self.entries.shift_unit.float()))

    def _change(self) -> Tensor:
        """Return how far the entries are from where they began, in what the rows compute."""
        change = self._moments.colour(self.values.detach())
        return change if self._movable is None else change * self._movable

    def _held(self) -> Tensor:
        """Return half of the gradient of |v|^2, v that of what moved: what cannot move must not make up for it."""
        if self._movable is None:
            return self.values.detach()
        return self._moments.whiten(self._moments.damped_times(self._change()) * self._movable)


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

    def __init__(self, terms: Sequence[Term], learning_rate: float, guard: float) -> None:
        self._layers = [term.layer for term in terms]
        self._each = [_Rows(term, 2 * guard / term.outputs) for term in terms]
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
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # the stub has one with a closure and one without
        """Take a step against the gradients of the model's entries."""
        for each in self._each:
            each.pull()
        super().step()
        for each in self._each:
            each.push()


def _gradient(entry: nn.Parameter) -> Tensor:
    """Return the gradient, float32; zeros where the loss does not depend on the entry."""
    return torch.zeros(entry.shape, device=entry.device) if entry.grad is None else entry.grad.float()

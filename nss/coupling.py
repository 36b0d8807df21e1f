"""Equivalence classes over integers: which neurons can only be kept or removed together."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Classes:
    """Union-find over 0..n-1 that grows on demand; the smallest member stands for its class.

    >>> classes = Classes(); classes.grow(3); classes.tie([(0, 2)])
    >>> classes.roots().tolist()
    [0, 1, 0]
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._roots: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._parent)

    def grow(self, count: int) -> int:
        """Add `count` members, each a class of its own. Returns the first one's number."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        self._roots = None
        return first

    def find(self, member: int) -> int:
        """Return the representative of the member's class."""
        while self._parent[member] != member:
            self._parent[member] = self._parent[self._parent[member]]
            member = self._parent[member]
        return member

    def tie(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Put both members of each pair into one class."""
        self._roots = None
        for left, right in pairs:
            low, high = sorted((self.find(left), self.find(right)))
            self._parent[high] = low

    def roots(self) -> torch.Tensor:
        """Return the representative of every member, int64 [n], not to be changed: it is kept until a class changes."""
        if self._roots is None:
            self._roots = torch.tensor([self.find(member) for member in range(len(self))], dtype=torch.int64)
        return self._roots

    def copy(self) -> Classes:
        """Return an independent copy."""
        other = Classes()
        other._parent = list(self._parent)
        return other


def lookup(values: torch.Tensor, ids: torch.Tensor, otherwise: bool | int) -> torch.Tensor:
    """Return `values[ids]`, and `otherwise` where an id is below 0: no name. values: [n], ids: int64 of any shape."""
    return torch.where(ids >= 0, values[ids.clamp_min(0)], otherwise)


def any_in_class(flags: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """Say for each member whether any of its class is flagged. flags: bool [n], roots: int64 [n]. Returns bool [n]."""
    found = torch.zeros_like(flags)
    found[roots[flags]] = True
    return found[roots]

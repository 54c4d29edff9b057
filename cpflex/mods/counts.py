"""How many elements of a bool table are true in boxes of indices: exactly, however a box lies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


class CountTable:
    """Sums of a bool table over all its corners (a summed-area table): the count of a box is made of as many of them as
    the box has corners. Four bytes an element.
    """

    def __init__(self, elements: np.ndarray) -> None:
        self._dims = [dim for dim, size in enumerate(elements.shape) if size > 1]
        elements = elements.squeeze()
        self._sums = np.zeros([size + 1 for size in elements.shape], np.int32 if elements.size < 2**31 else np.int64)
        self._sums[tuple(slice(1, None) for _ in elements.shape)] = elements
        for dim in range(elements.ndim):
            np.cumsum(self._sums, axis=dim, out=self._sums)

    def __call__(self, boxes: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """Whether all elements of each box are true, and whether any is.

        Args:
            boxes: first and last index of each dim, within the table; mutually broadcastable.
        """
        edges = [(boxes[dim][0], boxes[dim][1] + 1) for dim in self._dims]
        count = np.zeros((), np.int64)
        size = np.ones((), np.int64)
        for corner in itertools.product((0, 1), repeat=len(edges)):
            sign = -1 if (len(edges) - sum(corner)) % 2 else 1
            count = count + sign * self._sums[tuple(edge[side] for edge, side in zip(edges, corner, strict=True))]
        for low, high in edges:
            size = size * (high - low)
        return np.equal(count, size), np.greater(count, 0)

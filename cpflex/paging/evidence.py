"""Evidence: why an evicted page is not missed."""

from __future__ import annotations

import copy

import numpy as np

from cpflex.mods.intervals import EMPTY
from cpflex.paging.mask import TracedMask


class Evidence:
    """Under which masks, and from which query position on, the evicted pages of a sequence are hidden for ever."""

    def __init__(self) -> None:
        self._proofs: list[tuple[frozenset[str], int]] = []
        self._by_page = np.zeros(0, np.int32)
        self._known: tuple[frozenset[str], int] | None = None

    def copy(self) -> Evidence:
        made = copy.copy(self)
        made._proofs, made._by_page = list(self._proofs), self._by_page.copy()
        return made

    def grow(self, num_pages: int) -> None:
        self._by_page = np.append(self._by_page, np.full(num_pages, -1, np.int32))

    def cut(self, num_pages: int) -> None:
        self._by_page = self._by_page[:num_pages]

    def is_known(self, keys: frozenset[str], start: int) -> bool:
        """Whether pages were looked at for just this."""
        return self._known == (keys, start)

    def add(self, keys: frozenset[str], start: int, pages: np.ndarray) -> None:
        """``pages`` are hidden from every query at ``start`` or later, under all masks of these keys."""
        self._known = keys, start
        if not len(pages):
            return
        known = [place for place, proof in enumerate(self._proofs) if proof[0] == keys]
        place = known[0] if known else len(self._proofs)
        if known:  # of one mask, the later start holds for all pages
            self._proofs[place] = keys, max(start, self._proofs[place][1])
        else:
            self._proofs.append((keys, start))
        self._by_page[pages] = place

    def hides(self, key: str, start: int, pages: np.ndarray) -> np.ndarray:
        """Of evicted ``pages``: whether one is proven hidden from queries at ``start`` or later, bool [pages]."""
        holds = np.array([key in keys and start >= since for keys, since in self._proofs], bool)
        return holds[self._by_page[pages]]


def seen_from_on(mask: TracedMask, place: int, start: int, pages: np.ndarray, page_size: int) -> np.ndarray:
    """Of each page: whether a query at ``start`` or later may see a key of it, bool [pages]."""
    first = pages.astype(np.int64) * page_size
    last_query = np.int64(2**31 - 2)
    verdicts = mask.classify(np.int64(start), last_query, first, first + page_size - 1, b=(place, place))
    return np.broadcast_to(verdicts != EMPTY, pages.shape)

"""Windows along the paths of a tree, as two bounds of every token: which of its path it sees, and who sees it.

Both are looked up on lines: every segment goes on to at most one of its children, so that a tree is lines from top to
bottom, and the tokens of a line at depths that follow one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Lines(NamedTuple):
    """Tokens of a tree, line by line."""

    token: np.ndarray  # where each is stored, int64 [S]
    place: np.ndarray  # the other way round, int64 [S]
    head: np.ndarray  # place of the first token of each token's line, int64 [S]
    end: np.ndarray  # place after the last token of each token's line, int64 [S]


def lines_of(parents: Sequence[int], lengths: Sequence[int], goes_on_to: np.ndarray) -> Lines:
    """``goes_on_to``: row of the child with which each segment's line goes on, -1 for none; int64 [N]."""
    tokens, onward = np.array(lengths), goes_on_to.tolist()
    head, before = list(range(len(parents))), [0] * len(parents)  # tokens of the line above the segment
    for row, parent in enumerate(parents):
        if parent >= 0 and onward[parent] == row:
            head[row], before[row] = head[parent], before[parent] + lengths[parent]
    size = np.bincount(head, tokens, len(parents)).astype(np.int64)
    first = (np.cumsum(size) - size)[head]
    segment = np.repeat(np.arange(len(parents)), tokens)
    within = np.arange(len(segment)) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    place = (first + before)[segment] + within
    token = np.empty_like(place)
    token[place] = np.arange(len(place))
    return Lines(token, place, first[segment], (first + size[head])[segment])


def sizes_below(parents: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Tokens of each segment and of all that continues it."""
    sizes = list(lengths)
    for row in reversed(range(len(parents))):
        if parents[row] >= 0:
            sizes[parents[row]] += sizes[row]
    return sizes


def first_seen(
    parents: Sequence[int], lengths: Sequence[int], before: np.ndarray, depths: np.ndarray, window: int
) -> np.ndarray:
    """Where the first of the ``window`` latest tokens of each token's path is stored, int64 [S].

    Args:
        before, depths: of each token, as `Tree` has them, int64 [S].
    """
    # on to the largest child: lines to the root are few, as each is below a tree at least twice as large
    lines = lines_of(parents, lengths, _last_of(parents, np.argsort(sizes_below(parents, lengths), kind="stable")))
    at, steps = np.arange(len(depths)), np.minimum(depths, window - 1)
    todo = np.arange(len(depths))
    while len(todo):
        todo = todo[steps[todo] > lines.place[at[todo]] - lines.head[at[todo]]]
        head = lines.token[lines.head[at[todo]]]
        steps[todo] -= lines.place[at[todo]] - lines.head[at[todo]] + 1
        at[todo] = before[head]
    return lines.token[lines.place[at] - steps]


def last_to_see(parents: Sequence[int], lengths: Sequence[int], enter: np.ndarray, window: int) -> np.ndarray:
    """When a walk that goes depth first comes to the last token that has each token among the ``window`` latest of its
    path, int64 [S]: it lies below the last child of every segment on the way.
    """
    lines = lines_of(parents, lengths, _last_of(parents, np.arange(len(parents))))
    return enter[lines.token[np.minimum(lines.place + window, lines.end) - 1]]


def _last_of(parents: Sequence[int], order: np.ndarray) -> np.ndarray:
    """Of each segment, the child that comes last in an order of all rows; -1 for none. int64 [N]."""
    found, parent = np.full(len(parents), -1), np.array(parents)[order]
    found[parent[parent >= 0]] = order[parent >= 0]
    return found

"""Longest shared prefixes: sequences to the tree that stores each of them once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpflex.trees.tree import Tree

# C sequences, N segments, S tokens of all segments

Nodes = tuple[list[int], list[int], list[int]]
"""Of each segment: the one that it continues (0 is the empty beginning of all), where it ends, counted from the root,
and a sequence in which it is found.
"""


def share_prefixes(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, Tree, np.ndarray]:
    """Sequences as paths of one forest, depth first; what comes first in their list comes first.

        sequences      segments (parent)

        7 1 2 5        7 1 (-)   2 5 (0)   3 (0)   4 4 (2)   8 (-)
        7 1 3
        7 1 3 4 4
        8

    Every sequence ends where a segment ends; equal ones end at the same.

    Args:
        sequences: int64 [length] each, not below 0 and not empty.

    Returns:
        tokens int64 [S], the tree, and int64 [C], at the end of which segment each sequence ends.
    """
    nodes, last = _nodes(sequences)
    parent, end, source = nodes
    order = _depth_first(nodes, last)
    row_of = np.full(len(parent), -1)
    row_of[order] = np.arange(len(order))
    starts = [end[parent[node]] for node in order]
    tokens = [sequences[source[node]][start : end[node]] for node, start in zip(order, starts, strict=True)]
    tree = Tree(row_of[[parent[node] for node in order]], [len(part) for part in tokens])
    return np.concatenate(tokens), tree, row_of[last]


def _nodes(sequences: Sequence[np.ndarray]) -> tuple[Nodes, np.ndarray]:
    """The segments in any order, and int64 [C], which one each sequence ends with.

    In sorted order, a sequence shares most with the one before it; ``way`` are that one's segments from the root.
    """
    sorts_as = [sequence.astype(">u8").tobytes() for sequence in sequences]
    parent, end, source = [-1], [0], [-1]
    last, way = np.zeros(len(sequences), np.int64), [0]

    def go_on(until: int, found_in: int) -> None:
        parent.append(way[-1])
        end.append(until)
        source.append(found_in)
        way.append(len(parent) - 1)

    before = np.zeros(0, np.int64)
    for index in sorted(range(len(sequences)), key=sorts_as.__getitem__):
        sequence, above = sequences[index], 0
        shared = _shared(before, sequence)
        while end[way[-1]] > shared:
            above = way.pop()
        if end[way[-1]] < shared:  # they part within a segment: cut it
            go_on(shared, source[above])
            parent[above] = way[-1]
        if len(sequence) > shared:
            go_on(len(sequence), index)
        last[index], before = way[-1], sequence
    return (parent, end, source), last


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens that both begin with."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def _depth_first(nodes: Nodes, last: np.ndarray) -> list[int]:
    """All segments, each after the one it continues, and of several continuations the earliest sequence's first."""
    parent, end, _ = nodes
    first = np.full(len(parent), len(last))  # sequence that a segment is part of
    np.minimum.at(first, last, np.arange(len(last)))
    for node in sorted(range(1, len(parent)), key=end.__getitem__, reverse=True):
        first[parent[node]] = min(first[parent[node]], first[node])
    children: list[list[int]] = [[] for _ in parent]
    for node in sorted(range(1, len(parent)), key=first.__getitem__, reverse=True):
        children[parent[node]].append(node)
    order, pending = [], list(children[0])
    while pending:
        order.append(pending.pop())
        pending += children[order[-1]]
    return order

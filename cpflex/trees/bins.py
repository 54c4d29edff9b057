"""Trees to sequences: which of many go together, so that no sequence is too long and all are equal work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpflex.masks import is_count
from cpflex.sharding.packed import pairs_of_prefix
from cpflex.trees.tree import Tree


def pairs_of(tree: Tree, window: int | None = None) -> int:
    """(query, key) pairs of the tree's mask, within a window along the paths if one is given."""
    first = tree.depths[tree.starts].numpy()  # of each segment
    end = first + np.array(tree.lengths)
    return int((pairs_of_prefix(end, window) - pairs_of_prefix(first, window)).sum())


def deal_trees(
    trees: Sequence[Tree],
    max_tokens: int,
    *,
    window: int | None = None,
    multiple_of: int = 1,
) -> list[list[int]]:
    """Which trees to pack into one sequence, for as few sequences of at most ``max_tokens`` as are found, with pairs
    dealt evenly: the heaviest tree first, to the sequence with least work that has room. Pure: the same on every rank.

    Equal tokens are unequal work: a tree of short completions has a fraction of the pairs of one long completion.

    >>> trees = [cpflex.trees.pack([group]).tree for group in groups]
    >>> parts = deal_trees(trees, 131072, multiple_of=data_parallel_size)
    >>> packs = [cpflex.trees.pack([groups[i] for i in part]) for part in parts]

    Args:
        window: tokens along the path that a query sees, if all layers have that window.
        multiple_of: sequences are a multiple of this: each data parallel rank gets as many.

    Returns:
        Of each sequence its trees, by their place in the list, rising.

    Raises:
        ValueError: a tree of more than ``max_tokens``, or fewer trees than ``multiple_of``.
    """
    for name, value in (
        ("max_tokens", max_tokens),
        ("multiple_of", multiple_of),
        ("window", 1 if window is None else window),
    ):
        if not is_count(value, 1):
            raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
    tokens = [tree.num_tokens for tree in trees]
    for index, count in enumerate(tokens):
        if count > max_tokens:
            raise ValueError(
                f"tree {index} has {count} tokens, more than max_tokens={max_tokens}; split its completions"
            )
    if len(trees) < multiple_of:
        raise ValueError(f"there must be at least multiple_of={multiple_of} trees; got {len(trees)}")
    pairs = [pairs_of(tree, window) for tree in trees]
    by_work = sorted(range(len(trees)), key=lambda i: (-pairs[i], i))
    by_tokens = sorted(range(len(trees)), key=lambda i: (-tokens[i], i))  # fills sequences that work alone does not
    least = -(-sum(tokens) // max_tokens)
    for count in range(-(-least // multiple_of) * multiple_of, len(trees) + multiple_of, multiple_of):
        for order in (by_work, by_tokens):
            parts = _dealt(order, min(count, len(trees)), tokens, pairs, max_tokens)
            if parts is not None and len(parts) % multiple_of == 0:
                return parts
    raise ValueError(
        f"{len(trees)} trees fill no multiple of {multiple_of} sequences of {max_tokens} tokens; add trees, or raise "
        "max_tokens"
    )


def _dealt(
    order: Sequence[int], count: int, tokens: Sequence[int], pairs: Sequence[int], max_tokens: int
) -> list[list[int]] | None:
    """None where one finds no room."""
    parts: list[list[int]] = [[] for _ in range(count)]
    room, work = [max_tokens] * count, [0] * count
    for index in order:
        fits = [part for part in range(count) if room[part] >= tokens[index]]
        if not fits:
            return None
        part = min(fits, key=lambda p: (work[p], p))
        parts[part].append(index)
        room[part] -= tokens[index]
        work[part] += pairs[index]
    return [sorted(part) for part in parts] if all(parts) else None

"""A tree of segments of tokens, and its mask: a query sees its own path, from the root to itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from cpflex.masks import MaskFn, MaskMod, is_count, is_integral
from cpflex.trees.reach import first_seen, last_to_see, sizes_below

Integers = Tensor | np.ndarray | Sequence[int]


@dataclass(frozen=True, init=False, repr=False)
class Tree:
    """Segments of tokens in the order in which they are stored, each the continuation of one that is stored earlier.

    A prompt of 3 tokens with two completions, of 2 tokens and of 1, is ``Tree([-1, 0, 0], [3, 2, 1])``; several roots
    make a forest: a pack of prompts. Segments need not be stored depth first.

    Args:
        parents: [N]; of each segment, the row of the segment that it continues, or -1 for a root.
        lengths: [N]; tokens of each segment, at least 1. One each if None: a tree of single tokens, as drafts are.
        seq_len: tokens of all segments, to be checked.

    Raises:
        ValueError: naming the row: a parent that does not exist, stands after its child or is its descendant; a length
            below 1; lengths that do not sum to ``seq_len``; what are no integers [N].
    """

    parents: tuple[int, ...]
    lengths: tuple[int, ...]

    def __init__(self, parents: Integers, lengths: Integers | None = None, *, seq_len: int | None = None) -> None:
        rows = _integers(parents, "parents")
        object.__setattr__(self, "parents", rows)
        object.__setattr__(self, "lengths", (1,) * len(rows) if lengths is None else _integers(lengths, "lengths"))
        _check(self.parents, self.lengths, seq_len)

    def __reduce__(self) -> tuple[type[Tree], tuple[tuple[int, ...], tuple[int, ...]]]:
        return Tree, (self.parents, self.lengths)  # without what was computed from them

    def __repr__(self) -> str:
        return f"Tree({self.num_segments} segments, {self.num_tokens} tokens)"

    @property
    def num_segments(self) -> int:
        return len(self.parents)

    @cached_property
    def num_tokens(self) -> int:
        """S: tokens of the stored sequence."""
        return sum(self.lengths)

    @cached_property
    @torch.inference_mode(False)
    def starts(self) -> Tensor:
        """int64 [N]: where each segment is stored."""
        lengths = torch.tensor(self.lengths)
        return lengths.cumsum(0) - lengths

    @cached_property
    def segment_ids(self) -> Tensor:
        """int64 [S]: the row of each token's segment."""
        return self._of_segments(range(self.num_segments))

    @cached_property
    def depths(self) -> Tensor:
        """int64 [S]: how many tokens come before each on its path; the ``position_ids`` of the sequence."""
        first: list[int] = []
        for parent in self.parents:
            first.append(first[parent] + self.lengths[parent] if parent >= 0 else 0)
        return self._of_tokens(first)

    @cached_property
    @torch.inference_mode(False)
    def before(self) -> Tensor:
        """int64 [S]: where the token before each on its path is stored, which predicts it; -1 at roots."""
        lengths, parents, starts = np.array(self.lengths), np.array(self.parents), self.starts.numpy()
        before = np.arange(self.num_tokens) - 1
        before[starts] = np.where(parents < 0, -1, (starts + lengths - 1)[parents])
        return torch.from_numpy(before)

    @cached_property
    def roots(self) -> Tensor:
        """int64 [S]: the row of the root above each token, by which trees of a forest differ."""
        top: list[int] = []
        for row, parent in enumerate(self.parents):
            top.append(top[parent] if parent >= 0 else row)
        return self._of_segments(top)

    @cached_property
    def enter(self) -> Tensor:
        """int64 [S]: when a walk that goes depth first comes to each token. It starts with the first root, and from any
        segment goes on to the continuation that is stored first. The token is its own place if stored depth first.
        """
        return self._of_tokens(self._walk[0])

    @cached_property
    def leave(self) -> Tensor:
        """int64 [S]: when that walk has seen all that continues the token's segment. Token k comes before token q on
        its path, or is q, where ``enter[k] <= enter[q] < leave[k]``.
        """
        return self._of_segments(self._walk[1])

    @torch.inference_mode(False)
    def reach(self, window: int) -> tuple[Tensor, Tensor]:
        """int64 [S] each: where the first of the ``window`` latest tokens of each token's path is stored; and `leave`
        as far as windows reach: when the walk has seen the last token that has this one among its latest.

        Token k is among the ``window`` latest of the path of q where ``first[q] <= k`` and ``enter[k] <= enter[q] <
        leave[k]``: those of a path are stored in its order.
        """
        window = min(window, self.num_tokens)
        before, depths, enter = (x.numpy() for x in (self.before, self.depths, self.enter))
        first = first_seen(self.parents, self.lengths, before, depths, window)
        last = last_to_see(self.parents, self.lengths, enter, window)
        return torch.from_numpy(first), torch.from_numpy(last) + 1

    @property
    def is_depth_first(self) -> bool:
        """Whether segments are stored in the order of the walk."""
        return self._walk[0] == self.starts.tolist()

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Rows of the segments that none continues."""
        inner = set(self.parents)
        return tuple(row for row in range(self.num_segments) if row not in inner)

    @torch.inference_mode(False)
    def path(self, row: int) -> Tensor:
        """int64: where the tokens from the root to the end of segment ``row`` are stored."""
        rows = [row]
        while self.parents[rows[-1]] >= 0:
            rows.append(self.parents[rows[-1]])
        starts = self.starts
        return torch.cat([torch.arange(self.lengths[x]) + starts[x] for x in reversed(rows)])

    def paths(self) -> Iterator[Tensor]:
        """`path` of each of the `leaves`: the sequences that the tree holds."""
        return map(self.path, self.leaves)

    @cached_property
    def _walk(self) -> tuple[list[int], list[int]]:
        """Of each segment: when the walk comes to its first token, and when to the first that does not continue it."""
        size = sizes_below(self.parents, self.lengths)
        enter: list[int] = []
        free = [0] * (self.num_segments + 1)  # where the next child of a segment enters; at -1, the next root
        for row, parent in enumerate(self.parents):
            enter.append(free[parent])
            free[parent] += size[row]
            free[row] = enter[row] + self.lengths[row]
        return enter, [first + tokens for first, tokens in zip(enter, size, strict=True)]

    @torch.inference_mode(False)
    def _of_segments(self, values: Sequence[int]) -> Tensor:
        """A number of each segment, for each of its tokens."""
        return torch.repeat_interleave(torch.tensor(values), torch.tensor(self.lengths))

    @torch.inference_mode(False)
    def _of_tokens(self, first: Sequence[int]) -> Tensor:
        """Numbers that count on from the first token of each segment."""
        return self._of_segments(first) + torch.arange(self.num_tokens) - self._of_segments(self.starts.tolist())


@torch.inference_mode(False)
def tree(parents: Tree | Integers, lengths: Integers | None = None, *, window: int | None = None) -> MaskMod:
    """Causal along the paths of a tree: a query sees itself and what comes before it on the way from its root.

    ``tree([-1, 0, 0], [3, 2, 1])`` is a prompt of 3 tokens with completions of 2 and 1, and draws

        1.....
        11....
        111...
        1111..
        11111.
        111..1

    Args:
        parents: a `Tree`; or, of each segment, the row of the earlier one that it continues, or -1 for a root.
        lengths: with rows of parents, tokens of each segment; one each if None.
        window: how many tokens of its path a query sees, itself included; all if None. It sees what it sees with
            ``sliding_window(window, positions=depths)``, and the planner is told where windows end.

    Raises:
        ValueError: what `Tree` refuses; a `Tree` with ``lengths``, which it has; a window below 1.
    """
    if isinstance(parents, Tree) and lengths is not None:
        raise ValueError("a Tree has its lengths; pass it alone, or rows of parents and lengths")
    if window is not None and not is_count(window, 1):
        raise ValueError(f"window must be an integer of at least 1; got {window!r}")
    found = parents if isinstance(parents, Tree) else Tree(parents, lengths)
    path = _path(found, found.leave) if window is None else _latest(found, *found.reach(window))
    return MaskMod(path, "tree" if window is None else f"tree(window={window})", [found.num_tokens])


def _path(found: Tree, leave: Tensor) -> MaskFn:
    """Token k comes before q on its path, or is q; q is among those up to ``leave``."""
    if found.is_depth_first:
        return lambda b, h, q, k: (k <= q) & (q < leave[k])
    enter = found.enter
    # an ancestor is stored earlier: said again, for the planner, to which it empties half the tiles
    return lambda b, h, q, k: (k <= q) & (enter[k] <= enter[q]) & (enter[q] < leave[k])


def _latest(found: Tree, first: Tensor, leave: Tensor) -> MaskFn:
    """Either bound would do; of tiles where one branch ends and another begins, the planner needs both."""
    path = _path(found, leave)
    return lambda b, h, q, k: path(b, h, q, k) & (first[q] <= k)


def _integers(given: Integers, name: str) -> tuple[int, ...]:
    if isinstance(given, Tensor | np.ndarray):
        found = torch.as_tensor(given)
        if found.ndim != 1 or not is_integral(found):
            raise ValueError(f"{name} must be integers [N]; got {found.dtype} {tuple(found.shape)}")
        return tuple(found.tolist())
    for row, value in enumerate(given):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(f"{name} must be integers; row {row} is {value!r}")
    return tuple(int(value) for value in given)


def _check(parents: tuple[int, ...], lengths: tuple[int, ...], seq_len: int | None) -> None:
    if not parents or len(parents) != len(lengths):
        raise ValueError(
            f"parents and lengths must be of the same segments, one or more; got {len(parents)} and {len(lengths)} rows"
        )
    for row, parent in enumerate(parents):
        if not -1 <= parent < row:
            _refuse_parent(parents, row)
    for row, tokens in enumerate(lengths):
        if tokens < 1:
            raise ValueError(f"each segment must have at least 1 token; row {row} has {tokens} - leave it out")
    if seq_len is not None and sum(lengths) != seq_len:
        end = np.cumsum(lengths)
        beyond = int(np.searchsorted(end, seq_len, side="right"))
        where = f"row {beyond} ends at {end[beyond]}" if beyond < len(end) else f"row {len(end) - 1} is the last"
        raise ValueError(f"lengths must sum to seq_len={seq_len}; they sum to {end[-1]}: {where}")


def _refuse_parent(parents: tuple[int, ...], row: int) -> NoReturn:
    parent = parents[row]
    if not -1 <= parent < len(parents):
        raise ValueError(
            f"a parent must be one of the rows 0 .. {len(parents) - 1}, or -1 for a root; row {row} has {parent}"
        )
    way = [row]
    while 0 <= parents[way[-1]] < len(parents) and parents[way[-1]] not in way:
        way.append(parents[way[-1]])
    if parents[way[-1]] in way:
        ring = way[way.index(parents[way[-1]]) :]
        said = " -> ".join(map(str, [*ring, ring[0]]))
        raise ValueError(f"no segment may continue itself; these rows do, each with the next as its parent: {said}")
    raise ValueError(
        f"a parent must be stored before its children; row {row} has parent {parent} - sort the segments, parents first"
    )

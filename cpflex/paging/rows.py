"""Who brings which queries to a step, and gets their results. A strategy is a function, passed as a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """``counts``: how many of the packed new tokens each rank has, if they are divided, in the order of ranks;
    ``by_head``: each rank has some of the heads of all tokens. Neither: every rank has all.
    """

    name: str
    counts: tuple[int, ...] | None = None
    by_head: bool = False

    @property
    def is_everyone(self) -> bool:
        return self.counts is None and not self.by_head


RowsFn = Callable[[Sequence[int], int], Rows]


def everyone(new_tokens: Sequence[int], world_size: int) -> Rows:
    """Every rank has all new tokens and all heads, and gets all results: one message to each other rank. Each has the
    whole model.
    """
    return Rows("everyone")


def by_sequence(new_tokens: Sequence[int], world_size: int) -> Rows:
    """Each rank has the new tokens of its own sequences, about as many as the others, in the order of the plan, and
    gets their results: queries travel, and results return.
    """
    total, before, counts = sum(new_tokens), 0, [0] * world_size
    for count in new_tokens:
        counts[min(world_size - 1, (2 * before + count) * world_size // (2 * total))] += count
        before += count
    return Rows("by_sequence", counts=tuple(counts))


def by_token(new_tokens: Sequence[int], world_size: int) -> Rows:
    """Each rank has equally many of the packed new tokens, whatever their sequences, but for one: a chunk of a prompt
    is computed by all ranks, its queries travel to where keys are kept, and results return.
    """
    whole, rest = divmod(sum(new_tokens), world_size)
    return Rows("by_token", counts=tuple(whole + (rank < rest) for rank in range(world_size)))


def by_head(new_tokens: Sequence[int], world_size: int) -> Rows:
    """Each rank has equally many query heads of all new tokens, in the order of ranks, as in tensor parallelism, and
    gets their results. Keys and values have all heads on every rank, or are divided alike.
    """
    return Rows("by_head", by_head=True)

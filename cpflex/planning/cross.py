"""Mask kinds whose keys are others than the queries' tokens: those of another sequence, with a layout of their own, or
of earlier chunks of the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch.nn.attention.flex_attention import BlockMask

from cpflex.masks import MaskFn, is_count
from cpflex.planning.plan import Plan
from cpflex.sharding.layout import Layout, cut_shards


@dataclass(frozen=True)
class Cross:
    """What `cross` says."""

    mask: MaskFn | BlockMask
    keys: Layout
    ulysses_size: int
    on_every_rank: bool

    def shards(self, kind: str, world_size: int, ulysses_size: int) -> Layout:
        """The keys' shards for a mask kind on so many ranks; one shard if every rank holds all keys.

        Raises:
            ValueError: the keys' plan is of other ranks, or they exchange heads otherwise.
            NotImplementedError: keys on every rank where heads are exchanged.
        """
        if self.on_every_rank:
            if ulysses_size > 1:
                raise NotImplementedError(
                    f"mask kind {kind!r} has all its keys on every rank, of which {ulysses_size} would exchange heads; "
                    "this is not supported - give the kind ulysses_size 1, or pass the plan of the keys to cpflex.cross"
                )
            return self.keys
        if (found := self.keys.world_size * self.ulysses_size) != world_size:
            raise ValueError(
                f"mask kind {kind!r}: the queries are shared by {world_size} ranks and the keys by {found}; make both "
                "plans on one group, or pass the number of keys to cpflex.cross if every rank holds all of them"
            )
        if self.ulysses_size % ulysses_size:
            raise ValueError(
                f"mask kind {kind!r} exchanges heads among {ulysses_size} ranks, and the plan of its keys among "
                f"{self.ulysses_size}; make both with one ulysses_size"
            )
        return cut_shards(self.keys, self.ulysses_size // ulysses_size)


def cross(mask: MaskFn | BlockMask, keys: Plan | int) -> Cross:
    """A mask kind for `make_plan` whose keys are another sequence: ``mask`` at positions of both.

    Args:
        mask: a mask_mod on (b, h, q_idx, kv_idx), where kv_idx counts the keys' sequence.
        keys: the plan that shards the keys, on the same ranks; or how many there are, if every rank holds all of them:
            then nothing travels, and each rank gets its own part of their gradients, to be summed like a parameter's.

    >>> encoder = cpflex.make_plan(cpflex.full(), source_len, group)
    >>> masks = {"self": cpflex.causal(), "cross": cpflex.cross(cpflex.full(), encoder)}
    >>> decoder = cpflex.make_plan(masks, target_len, group)
    """
    if isinstance(keys, Plan):
        return Cross(mask, keys.outer, keys.ulysses_size, on_every_rank=False)
    if not is_count(keys, 1) or keys >= 2**31:
        raise ValueError(f"keys must be a plan, or a number of keys from 1 to 2**31 - 1; got {keys!r}")
    return Cross(mask, Layout(keys, keys, ((0,),), "on every rank"), 1, on_every_rank=True)


@dataclass(frozen=True)
class Cached:
    """What `cached` says."""

    mask: MaskFn | BlockMask
    earlier: tuple[Layout, ...]
    """Shards of the earlier chunks, those of single ranks."""

    def require(self, kind: str, start: int, world_size: int) -> None:
        """
        Raises:
            ValueError: the earlier chunks are of other ranks, or do not end before this one starts.
        """
        if any(layout.world_size != world_size for layout in self.earlier):
            found = sorted({layout.world_size for layout in self.earlier})
            raise ValueError(
                f"mask kind {kind!r}: the queries are shared by {world_size} ranks and keys of earlier chunks by "
                f"{found}; make all plans on one group"
            )
        if self.earlier and self.earlier[-1].end > start:
            raise ValueError(
                f"mask kind {kind!r}: earlier chunks end at {self.earlier[-1].end} and this one starts at {start}; "
                "give cpflex.cached the plans of chunks before this one alone"
            )


def cached(mask: MaskFn | BlockMask, earlier: Sequence[Plan]) -> Cached:
    """A mask kind for the plan of a chunk of a sequence, whose keys are those of earlier chunks and then the chunk's
    own: each rank holds its keys of each, one after the other, pads included, as ``torch.cat([cache, k], dim=2)``. What
    comes after the chunk is not seen.

    Args:
        mask: a mask_mod at positions of the whole sequence; what it captures may be made for more tokens than there are
            so far.
        earlier: the plans of the chunks whose keys are held, in order; none for the first chunk. A chunk that the mask
            does not reach any more may be left out, with its keys; if it is the last one, say where this one begins:
            ``make_plan(start=)``.

    >>> plan = cpflex.make_plan(cpflex.cached(cpflex.causal(), plans), chunk_len, group)

    Raises:
        ValueError: the chunks are not in order.
    """
    if isinstance(earlier, Plan) or not all(isinstance(plan, Plan) for plan in earlier):
        raise TypeError("earlier must be a list of the plans of earlier chunks, made by cpflex.make_plan")
    layouts = tuple(plan.layout for plan in earlier)
    if any(a.end > b.start for a, b in pairwise(layouts)):
        spans = ", ".join(f"{layout.start} to {layout.end}" for layout in layouts)
        raise ValueError(f"earlier chunks must follow one another; got tokens {spans} - make plans with start=")
    return Cached(mask, layouts)

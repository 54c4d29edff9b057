"""Cross: a mask kind whose keys are another sequence than its queries, with a layout of their own."""

from __future__ import annotations

from dataclasses import dataclass

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

"""A plan of one rank for a torch BlockMask, made when the BlockMask is first used and kept as long as it lives."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from cpflex.mods.trace import trace_mask_mod
from cpflex.planning.cross import cross
from cpflex.planning.make import make_plan
from cpflex.planning.plan import Plan
from cpflex.sharding.layout import ChunkWork, Layout

_made: WeakKeyDictionary[BlockMask, tuple[Any, Plan]] = WeakKeyDictionary()
"""By BlockMask: what its plan was made of, and the plan."""


def plan_of(block_mask: BlockMask, batch_size: int, num_heads: int) -> Plan:
    """The plan of one rank. Made anew when the BlockMask or a tensor that its mask_mod captured was changed since.

    Raises:
        ValueError, UnsupportedMod: as `masks_from.block_mask` and `make_plan`.
    """
    q_len, kv_len = block_mask.seq_lengths
    *batch, _, _ = block_mask.kv_indices.shape
    if batch and (batch[0] not in (1, batch_size) or batch[1] not in (1, num_heads)):
        raise ValueError(
            f"the BlockMask is of {batch[0]} x {batch[1]} batches and heads; query is of {batch_size} x {num_heads}"
        )
    mod = trace_mask_mod(block_mask.mask_mod)  # anew in each call: what it captured may be other tensors by now
    tables = (
        block_mask.kv_num_blocks,
        block_mask.kv_indices,
        block_mask.full_kv_num_blocks,
        block_mask.full_kv_indices,
    )
    held = [x for x in (*tables, *mod.captured) if x is not None]
    sizes = batch_size, num_heads, (q_len, kv_len), tuple(block_mask.BLOCK_SIZE)
    if any(x.is_inference() for x in held):  # of which nobody knows when they were changed
        return _planned(block_mask, batch_size, num_heads)
    state = sizes, mod.key, [(x, x._version) for x in held]
    known = _made.get(block_mask)
    if known is None or not _same(known[0], state):
        known = state, _planned(block_mask, batch_size, num_heads)
        _made[block_mask] = known
    return known[1]


def _planned(block_mask: BlockMask, batch_size: int, num_heads: int) -> Plan:
    q_len, kv_len = block_mask.seq_lengths
    mask = block_mask if q_len == kv_len else cross(block_mask, kv_len)
    return make_plan(mask, q_len, batch_size=batch_size, num_heads=num_heads, layout=_as_it_is)


def _as_it_is(seq_len: int, world_size: int, work: ChunkWork | None = None) -> Layout:
    """All tokens in order and no pads: what is in the call."""
    return Layout(seq_len, seq_len, ((0,),), "as it is")


def _same(a: Any, b: Any) -> bool:
    tensors: list[tuple[tuple[Tensor, int], tuple[Tensor, int]]] = list(zip(a[2], b[2], strict=False))
    same = len(a[2]) == len(b[2]) and all(x is y and old == new for (x, old), (y, new) in tensors)
    return a[:2] == b[:2] and same

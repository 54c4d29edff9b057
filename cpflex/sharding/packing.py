"""pack: an order of documents, and a layout for it, in which short documents stay whole on one rank.

`balanced` takes the tokens as they come, and documents lie across the borders of its chunks. Here the order is free:

    documents longer, or heavier, than a rank's share       the others, whole, one region of consecutive tokens a rank
    [== 0 ==|== 0 ==|== 1 ==|== 1 ==|= 2 =|... shorter ][region of rank 0][region of rank 1][region of rank 2] ...
     cut into chunks, dealt to few ranks each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from cpflex.sharding.dealing import TAIL, Batch, Deal, best_deal
from cpflex.sharding.layout import ALIGNMENT, STRIPE, Layout, aligned_chunk_len
from cpflex.sharding.packed import PAD, Packed

MAX_CHUNKS_PER_RANK, MAX_CHUNKS = 32, 8192
"""Of a layout in which documents are cut."""

PADDING = 64
"""At most one token in so many is a pad for the sake of documents that are then all whole."""


def pack(
    lengths: Sequence[int] | Tensor,
    world_size: int,
    *,
    window: int | None = None,
    local_len: int | None = None,
) -> Packed:
    """Arrange the documents of a global batch on the ranks of one large group, instead of a batch for each of many
    small groups: equal tokens and about equal work everywhere, short documents whole on one rank, long ones on few
    neighbours. The mask stays an ordinary one on the packed sequence. Pure: the same on every rank.

    Args:
        lengths: tokens of each document, at least 1.
        world_size: ranks of the group.
        window: latest tokens that a query sees (`sliding_window`); None: all of its document before it. Of a model
            with both kinds of layers, None.
        local_len: tokens of each rank, a multiple of 16, for shapes that do not change from batch to batch; the least
            that is enough if None.

    >>> packed = cpflex.pack([len(document) for document in documents], world_size=64)
    >>> tokens = packed.arrange(documents, pad_value=0)
    >>> mask = cpflex.causal() & cpflex.document(cu_seqlens=packed.cu_seqlens)
    >>> plan = cpflex.make_plan(mask, packed.seq_len, group, layout=packed.layout)

    Raises:
        ValueError: lengths that are not counts, or more tokens than the ranks hold.
    """
    documents = np.asarray(lengths)
    if documents.ndim != 1 or not len(documents) or documents.dtype.kind not in "iu" or documents.min() < 1:
        raise ValueError(f"lengths must be at least one integer of at least 1 each; got {lengths!r:.80}")
    for name, value in (("world_size", world_size), ("window", 1 if window is None else window)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
    documents, num_tokens = documents.astype(np.int64), int(documents.sum())
    if local_len is not None and (local_len < 1 or local_len % ALIGNMENT or local_len * world_size < num_tokens):
        least = aligned_chunk_len(num_tokens, world_size)
        raise ValueError(
            f"local_len must be a multiple of {ALIGNMENT}, for {num_tokens} tokens on {world_size} ranks at least "
            f"{least}; got {local_len}"
        )
    if max(num_tokens, world_size * (local_len or 0)) * (PADDING + 1) // PADDING >= 2**31:
        raise ValueError(f"a sequence has less than 2**31 tokens; got {num_tokens} for {world_size} ranks")
    per_rank, chunk_len = _chunks(num_tokens, world_size, local_len)
    batch = Batch(documents, world_size, per_rank, chunk_len, window)
    deal = best_deal(batch)
    if not deal.cut and local_len is None:
        batch, deal = _with_whole_ones_only(batch, deal)
    return _packed(batch, deal)


def _with_whole_ones_only(batch: Batch, deal: Deal) -> tuple[Batch, Deal]:
    """As few tokens a rank as do without chunks; or a few pads more, if then nothing has to travel at all."""
    least = aligned_chunk_len(int(batch.lengths.sum()), batch.world_size)
    for chunk_len in (least, least * (PADDING + 1) // PADDING // ALIGNMENT * ALIGNMENT):
        other = replace(batch, per_rank=1, chunk_len=chunk_len)
        others = best_deal(other)
        if not others.cut and (chunk_len == least or not others.borders):
            batch, deal = other, others
        if not deal.borders:
            break
    return batch, deal


def _chunks(num_tokens: int, world_size: int, local_len: int | None) -> tuple[int, int]:
    """Chunks of each rank, and their tokens: as many as need few more pads and no more than a tenth more tiles."""

    def chunk_len(count: int) -> int:
        return aligned_chunk_len(num_tokens, world_size * count) if local_len is None else local_len // count

    most = max(1, min(MAX_CHUNKS_PER_RANK, MAX_CHUNKS // world_size))
    counts = [n for n in range(1, most + 1) if local_len is None or local_len % (n * ALIGNMENT) == 0]
    tiles = {n: n * -(-chunk_len(n) // STRIPE) for n in counts}
    most_len = chunk_len(1) * (PADDING + 1) // PADDING
    count = max(n for n in counts if n * chunk_len(n) <= most_len and tiles[n] * 10 <= min(tiles.values()) * 11)
    return count, chunk_len(count)


def _packed(batch: Batch, deal: Deal) -> Packed:
    """The order of documents and pads, and the layout."""
    order: list[int] = []
    ends = [0]

    def lay(documents: Sequence[int], region: int, until: int) -> None:
        for d in [*documents, *([deal.borders[region]] if region in deal.borders else [])]:
            order.append(d)
            ends.append(ends[-1] + int(batch.lengths[d]))
        while ends[-1] < until:
            order.append(PAD)
            ends.append(min(until, ends[-1] + STRIPE))

    num_chunks = sum(map(len, deal.chunks))
    lay([*deal.cut, *deal.tail], TAIL, num_chunks * batch.chunk_len)
    chunks = [tuple(sorted(held)) for held in deal.chunks]
    for rank in deal.regions:
        region_end = num_chunks + batch.per_rank - len(chunks[rank])
        lay(sorted(deal.whole[rank]), rank, region_end * batch.chunk_len)
        chunks[rank] += tuple(range(num_chunks, region_end))
        num_chunks = region_end
    chunk_len = batch.chunk_len
    if not deal.cut:
        chunk_len = batch.local_len
        chunks = [(deal.regions.index(rank),) for rank in range(batch.world_size)]
    table = Layout(batch.world_size * batch.local_len, chunk_len, tuple(chunks), "packed")
    return Packed(tuple(order), tuple(np.diff(ends).tolist()), table, batch.window)

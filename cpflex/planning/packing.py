"""pack: an order of documents, and a layout for it: of several ways, the one with the least estimated time.

The documents as they come, under `balanced`, are one of them. In the others short documents are whole on one rank and
heavy ones on a few neighbours, more or fewer of them cut into more or fewer parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from cpflex.masks import is_count
from cpflex.planning.document_work import DocumentWork
from cpflex.sharding.balance import balanced
from cpflex.sharding.dealing import Ranks, deal
from cpflex.sharding.layout import ALIGNMENT, STRIPE, Layout, aligned_chunk_len
from cpflex.sharding.nodes import estimated_ns
from cpflex.sharding.packed import PAD, Packed
from cpflex.topology import Device, Heads, Machine, Topology

COUNTS = (4, 8, 16, 32)
"""Chunks per rank where documents are cut: the two largest numbers are tried whose tiles are filled."""

MAX_CHUNKS = 8192
"""Of all ranks."""

PADDING = 64
"""At most one token in so many is a pad, for the sake of fewer messages."""

CUTS = (2.5, 1.6, 1.0, 0.5, 0.2)
"""Documents are cut that have more than so many times the mean work of a rank."""

UNKNOWN = Machine(replace(Topology.named("h100-ib"), gpus_per_node=1), Device(), Heads())
"""Without a topology all rows are taken to cross a network."""


def pack(
    lengths: Sequence[int] | Tensor,
    world_size: int,
    *,
    window: int | None = None,
    local_len: int | None = None,
    topology: Topology | None = None,
    device: Device | None = None,
    heads: Heads | None = None,
) -> Packed:
    """Arrange the documents of a global batch on the ranks of one large group, instead of a batch for each of many
    small groups: equal tokens everywhere, short documents whole on one rank, heavy ones on few neighbours, as far as
    that is estimated to be faster than the documents as they come under `balanced`. The mask stays an ordinary one on
    the packed sequence. Pure: the same on every rank.

    Args:
        lengths: tokens of each document, at least 1.
        world_size: ranks of the group.
        window: latest tokens that a query sees (`sliding_window`); None: all of its document before it. Of a model
            with both kinds of layers, None.
        local_len: tokens of each rank, a multiple of 16, for shapes that do not change from batch to batch; about the
            least that is enough if None.
        topology, device, heads: as `make_plan` takes them, for the estimate. All ranks must give the same.

    >>> packed = cpflex.pack([len(document) for document in documents], world_size=64)
    >>> tokens = packed.arrange(documents, pad_value=0)
    >>> mask = cpflex.causal() & cpflex.document(cu_seqlens=packed.cu_seqlens)
    >>> plan = cpflex.make_plan(mask, packed.seq_len, group, layout=packed.layout)

    Raises:
        ValueError: lengths that are not counts, or more tokens than the ranks hold; a device or heads without a
            topology.
        TypeError: a topology, device or heads of another type.
    """
    documents = _checked(lengths, world_size, window, local_len)
    batch = Batch(documents, world_size, window, local_len, Machine.of(topology, device, heads))
    return min(candidates(batch), key=batch.estimated_ns)


def _checked(lengths: Sequence[int] | Tensor, world_size: object, window: object, local_len: int | None) -> np.ndarray:
    """The lengths, int64."""
    documents = np.asarray(lengths)
    if documents.ndim != 1 or not len(documents) or documents.dtype.kind not in "iu" or documents.min() < 1:
        raise ValueError(f"lengths must be at least one integer of at least 1 each; got {lengths!r:.80}")
    for name, value in (("world_size", world_size), ("window", 1 if window is None else window)):
        if not is_count(value, 1):
            raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
    assert isinstance(world_size, int)
    documents, num_tokens = documents.astype(np.int64), int(documents.sum())
    if local_len is not None and (local_len < 1 or local_len % ALIGNMENT or local_len * world_size < num_tokens):
        least = aligned_chunk_len(num_tokens, world_size)
        raise ValueError(
            f"local_len must be a multiple of {ALIGNMENT}, for {num_tokens} tokens on {world_size} ranks at least "
            f"{least}; got {local_len}"
        )
    if max(num_tokens, world_size * (local_len or 0)) * (PADDING + 1) // PADDING >= 2**31:
        raise ValueError(f"a sequence has less than 2**31 tokens; got {num_tokens} for {world_size} ranks")
    return documents


@dataclass(frozen=True)
class Batch:
    """What is to be packed, and for what."""

    lengths: np.ndarray  # int64 [documents]
    world_size: int
    window: int | None = None
    local_len: int | None = None
    machine: Machine | None = None

    @cached_property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def least_len(self) -> int:
        """Tokens of a rank."""
        return self.local_len or aligned_chunk_len(self.num_tokens, self.world_size)

    @property
    def most_len(self) -> int:
        with_pads = self.least_len * (PADDING + 1) // PADDING // ALIGNMENT * ALIGNMENT
        return self.local_len or max(self.least_len, with_pads)

    @cached_property
    def links(self) -> Machine:
        """In nodes of equally many ranks."""
        machine = self.machine or UNKNOWN
        size = machine.topology.gpus_per_node
        size = self.world_size if self.world_size <= size else math.gcd(size, self.world_size)
        rate = machine.topology.nic_gb_per_s
        topology = replace(machine.topology, gpus_per_node=size, nics_per_node=None, inter_gb_per_s=rate)
        return machine._replace(topology=topology)

    def work(self, lengths: Sequence[int] | np.ndarray) -> DocumentWork:
        return DocumentWork(lengths, self.window, self.machine)

    def estimated_ns(self, packed: Packed) -> int:
        """Forward and backward of one layer."""
        work = self.work(packed.lengths)
        needs = work(packed.table.chunk_len, packed.table.num_chunks)
        return estimated_ns(packed.table, needs, work.weights, self.links)

    def chunkings(self) -> list[tuple[int, int]]:
        """(chunks per rank, tokens of a chunk): with few pads, and tiles that are filled; rising."""
        found = []
        for count in (n for n in COUNTS if n * self.world_size <= MAX_CHUNKS):
            chunk_len = -(-self.least_len // (count * ALIGNMENT)) * ALIGNMENT
            tile_tokens = count * -(-chunk_len // STRIPE) * STRIPE
            if count * chunk_len <= self.most_len and tile_tokens * 10 <= self.most_len * 11:
                found.append((count, chunk_len))
        return found


def candidates(batch: Batch) -> Iterator[Packed]:
    """The plainest first: of those that are estimated to be equal, the first is taken."""
    yield from _as_they_come(batch)
    # all whole, with as few pads as can be, or with more, for nothing to travel at all
    for local_len in sorted({batch.least_len, batch.most_len}):
        yield _dealt(batch, _ranks(batch, 1, local_len), math.inf)
    for count, chunk_len in batch.chunkings()[-2:]:
        ranks, seen = _ranks(batch, count, chunk_len), set()
        for most in CUTS:
            what = max(most, 1.0), len(ranks.heavy(most))
            if what not in seen:
                seen.add(what)
                yield _dealt(batch, ranks, most)


def _as_they_come(batch: Batch) -> Iterator[Packed]:
    """`balanced`, if its shards have the length that is wanted."""
    seq_len = (batch.local_len or 0) * batch.world_size or batch.num_tokens
    table = balanced(seq_len, batch.world_size, batch.work(batch.lengths))
    if batch.local_len in (None, table.local_len):
        seq_len = table.local_len * batch.world_size
        pads = seq_len - batch.num_tokens
        runs = [min(STRIPE, pads - done) for done in range(0, pads, STRIPE)]
        order = (*range(len(batch.lengths)), *[PAD] * len(runs))
        yield Packed(order, (*batch.lengths.tolist(), *runs), replace(table, seq_len=seq_len), batch.window)


def _ranks(batch: Batch, count: int, chunk_len: int) -> Ranks:
    per_node = batch.links.topology.gpus_per_node
    return Ranks(batch.lengths, batch.window, batch.world_size, count, chunk_len, per_node)


def _dealt(batch: Batch, ranks: Ranks, most: float) -> Packed:
    found = deal(ranks, most)
    table = Layout(ranks.count * ranks.local_len, ranks.chunk_len, tuple(found.chunks), "packed")
    return Packed(tuple(found.order), tuple(found.lengths), table, batch.window)

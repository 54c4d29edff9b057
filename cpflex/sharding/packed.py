"""Packed: documents in the order that `pack` chose, with what a training step needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cpflex.sharding.layout import ChunkWork, Layout

PAD = -1
"""In place of a document's number: tokens that are none of its, between documents."""


def pairs_of_prefix(length: np.ndarray, window: int | None) -> np.ndarray:
    """(query, key) pairs of the first ``length`` tokens of a document, causal and within the window."""
    seen = length if window is None else np.minimum(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen


@dataclass(frozen=True)
class Packed:
    """A sequence of whole documents, with pads between some of them, and who holds which tokens."""

    order: tuple[int, ...]
    """The documents one after the other, by their place in the list of lengths; -1: pads."""
    lengths: tuple[int, ...]
    """Tokens of each of these."""
    table: Layout
    window: int | None = None

    @property
    def seq_len(self) -> int:
        """Tokens of the packed sequence, pads included."""
        return self.table.seq_len

    @property
    def local_len(self) -> int:
        """Tokens of each rank."""
        return self.table.local_len

    def layout(self, seq_len: int, world_size: int, work: ChunkWork | None = None) -> Layout:
        """The layout function that `make_plan` takes: ``layout=packed.layout``.

        Raises:
            ValueError: the plan is of another length, or for another number of ranks.
        """
        if (seq_len, world_size) != (self.seq_len, self.table.world_size):
            raise ValueError(
                f"this batch was packed to {self.seq_len} tokens for {self.table.world_size} ranks; got "
                f"seq_len={seq_len} for {world_size} - pass packed.seq_len to make_plan, or pack again"
            )
        return self.table

    @cached_property
    @torch.inference_mode(False)
    def cu_seqlens(self) -> Tensor:
        """Where documents and runs of pads start, and the end, int64 [num_segments + 1]: what `document` takes. Pads
        are documents of their own, of at most 128 tokens.
        """
        return torch.tensor([0, *np.cumsum(self.lengths).tolist()])

    @cached_property
    @torch.inference_mode(False)
    def doc_ids(self) -> Tensor:
        """The document of each token, -1 at pads; int64 [seq_len]."""
        return torch.tensor(self.order).repeat_interleave(torch.tensor(self.lengths))

    @cached_property
    @torch.inference_mode(False)
    def position_ids(self) -> Tensor:
        """The place of each token in its document, int64 [seq_len]."""
        starts = self.cu_seqlens[:-1].repeat_interleave(torch.tensor(self.lengths))
        return torch.arange(self.seq_len) - starts

    def arrange(self, documents: Sequence[Tensor], pad_value: float | int | bool) -> Tensor:
        """The packed sequence of what each document has at its tokens.

        Args:
            documents: [length, ...] each, in the order of the lengths given to `pack`.
            pad_value: at pads: for instance 0 for token ids and -100 for labels.

        Returns:
            [seq_len, ...], on the device of the documents.

        Raises:
            ValueError: other documents than were packed.
        """
        known = {d: length for d, length in zip(self.order, self.lengths, strict=True) if d != PAD}
        found = dict(enumerate(map(len, documents)))
        if known != found:
            raise ValueError(
                f"documents must have the lengths that were packed, {[known[d] for d in sorted(known)]!s:.80}; got "
                f"{list(found.values())!s:.80}"
            )
        like = documents[0]
        parts = [
            documents[d] if d != PAD else like.new_full((length, *like.shape[1:]), pad_value)
            for d, length in zip(self.order, self.lengths, strict=True)
        ]
        return torch.cat(parts)

    def split(self, x: Tensor) -> list[Tensor]:
        """Of a tensor on the packed sequence, [seq_len, ...], the part of each document: `arrange` backwards."""
        if len(x) != self.seq_len:
            raise ValueError(f"dim 0 must have the packed sequence's {self.seq_len} tokens; got {tuple(x.shape)}")
        parts = zip(self.order, x.split(list(self.lengths)), strict=True)
        return [part for d, part in sorted((pair for pair in parts if pair[0] != PAD), key=lambda pair: pair[0])]

    @cached_property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that hold each document."""
        held: dict[int, set[int]] = {}
        for rank, pieces in enumerate(self._pieces):
            for segment, _, _ in pieces:
                held.setdefault(self.order[segment], set()).add(rank)
        return tuple(tuple(sorted(held[d])) for d in sorted(held.keys() - {PAD}))

    @cached_property
    def work(self) -> tuple[int, ...]:
        """(query, key) pairs of each rank, causal and within the window."""
        return tuple(
            sum(int(np.diff(pairs_of_prefix(np.array([begin, end]), self.window))[0]) for _, begin, end in pieces)
            for pieces in self._pieces
        )

    @cached_property
    def received(self) -> tuple[int, ...]:
        """K/V rows that each rank needs of others, in one forward."""
        rows = []
        for pieces in self._pieces:
            seen_until: dict[int, int] = {}
            count = 0
            for segment, begin, end in pieces:  # rising
                first = 0 if self.window is None else max(0, begin - self.window + 1)
                count += begin - min(begin, max(first, seen_until.get(segment, 0)))
                seen_until[segment] = end
            rows.append(count)
        return tuple(rows)

    @cached_property
    def _pieces(self) -> list[list[tuple[int, int, int]]]:
        """What each rank holds: (segment, first token within it, end), rising."""
        bounds = np.concatenate([[0], np.cumsum(self.lengths)])
        found: list[list[tuple[int, int, int]]] = []
        for runs in self.table.fragments:
            pieces = []
            for start, stop in runs:
                first, last = np.searchsorted(bounds, [start, stop - 1], side="right") - 1
                edges = [start, *bounds[first + 1 : last + 1].tolist(), stop]
                for segment, (begin, end) in zip(range(first, last + 1), pairwise(edges), strict=True):
                    pieces.append((segment, int(begin - bounds[segment]), int(end - bounds[segment])))
            found.append(pieces)
        return found

    def explain(self) -> str:
        """The batch in words: documents, pads, who shares which, work and rows received."""
        ranks, work, rows = self.table.world_size, self.work, self.received
        pads = sum(length for d, length in zip(self.order, self.lengths, strict=True) if d == PAD)
        lengths = dict(zip(self.order, self.lengths, strict=True))
        shared = sorted((d for d, on in enumerate(self.holders) if len(on) > 1), key=lambda d: (-lengths[d], d))
        lines = [
            f"{len(self.holders):,} documents of {self.seq_len - pads:,} tokens on {ranks} ranks",
            f"local      {self.local_len:,} tokens a rank; {pads:,} pads ({pads / self.seq_len:.2%})",
            f"whole      {len(self.holders) - len(shared):,} documents on one rank each",
            f"shared     {len(shared):,} documents, of {sum(lengths[d] for d in shared):,} tokens",
        ]
        for d in shared[:8]:
            on = self.holders[d]
            lines.append(f"           document {d}, {lengths[d]:,} tokens: {len(on)} ranks, {on[0]} to {on[-1]}")
        lines += [f"           and {len(shared) - 8:,} shorter"] if len(shared) > 8 else []
        mean, alone = sum(work) / ranks, sum(count == 0 for count in rows)
        lines += [
            f"work       {max(work) / mean:.3f} x the mean at most",
            f"received   {max(rows):,} K/V rows at most, {sum(rows) / ranks:,.0f} on average; {alone} ranks need none",
        ]
        return "\n".join(lines)

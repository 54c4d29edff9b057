"""Heads: all-to-all of heads and tokens among the ranks of a row, before the loops and after them.

A rank comes with all heads of its own tokens, and computes some heads of the tokens of its whole row: the outer shard
(DeepSpeed-Ulysses, arXiv:2309.14509; in two dimensions USP, arXiv:2405.07719). With fewer heads of keys than ranks each
goes to as many ranks as it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cpflex.links.protocol import Links, swap
from cpflex.mods.graph import Graph, Mod
from cpflex.tile_mask import Idle

# B batch, H heads, S tokens of this rank, A ranks of the row; trailing dims are any


def why_not_divided(query_heads: int, kv_heads: int, size: int) -> str:
    """Why heads cannot be divided among so many ranks; "" if they can."""
    if _divides(query_heads, kv_heads, size):
        return ""
    sizes = [n for n in range(1, query_heads + 1) if _divides(query_heads, kv_heads, n)]
    return (
        f"{query_heads} query heads and {kv_heads} heads of keys cannot be exchanged among {size} ranks: these must "
        "divide the query heads, and divide the heads of keys or be a multiple of them - use one of "
        f"{', '.join(map(str, sizes))} ranks for heads"
    )


def _divides(query_heads: int, kv_heads: int, size: int) -> bool:
    return query_heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


@dataclass
class HeadExchange:
    """Between all heads of a rank's tokens, and its heads of all tokens of its row.

    Args:
        size: ranks of the row; with 1 nothing is moved or copied.
        rank: this one's place in it.
        links: the row; None with one rank, or where nothing will be exchanged.
    """

    size: int = 1
    rank: int = 0
    links: Links | None = None
    _first: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict, repr=False)

    @property
    def place(self) -> str:
        """Of this rank, for errors of its row or its column, which number ranks in their own way."""
        return f"at place {self.rank} of {self.size} ranks that exchange heads (ranks named below are numbered by row)"

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """[B, H, S, ...] each -> [B, H / A, A S, ...], or [B, 1, A S, ...] if there are more ranks than heads."""
        if self.size == 1:
            return tensors
        sent = [[x[:, _share(x.shape[1], self.size, peer)] for x in tensors] for peer in range(self.size)]
        arrived = self._exchanged(sent)
        return tuple(torch.cat(parts, dim=2) for parts in zip(*arrived, strict=True))

    def to_tokens(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """[B, H / A, A S, ...] each -> [B, H, S, ...]; of heads that several ranks have, one after the other."""
        if self.size == 1:
            return tensors
        sent = [[x.chunk(self.size, dim=2)[peer] for x in tensors] for peer in range(self.size)]
        arrived = self._exchanged(sent)
        return tuple(torch.cat(parts, dim=1) for parts in zip(*arrived, strict=True))

    def _exchanged(self, sent: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Each rank gets its tensors, all in one message, and sends as many of the same shapes."""
        assert self.links is not None, "heads are exchanged with the ranks of a group"
        messages = [_packed(parts) if peer != self.rank else parts[0].new_empty(0) for peer, parts in enumerate(sent)]
        received = [torch.empty_like(message) for message in messages]
        swap(messages, received, self.links)
        mine = sent[self.rank]
        return [list(mine) if peer == self.rank else _unpacked(x, mine) for peer, x in enumerate(received)]

    def first_head(self, num_heads: int, device: torch.device) -> Tensor:
        """The first of this rank's ``num_heads`` query heads, int64 []."""
        if (device, num_heads) not in self._first:
            with torch.inference_mode(False):
                self._first[device, num_heads] = torch.tensor(self.rank * num_heads, device=device)
        return self._first[device, num_heads]

    def of_scores(
        self, mod: Mod, captured: tuple[Tensor, ...], num_heads: int, device: torch.device
    ) -> tuple[Graph, tuple[Tensor, ...]]:
        """A score_mod of all heads, for the ``num_heads`` of this rank."""
        if self.size == 1 or not mod.uses("h"):
            return mod.graph, captured
        return mod.of_later_heads, (*captured, self.first_head(num_heads, device))

    def of_mask(self, mask: Mod, num_heads: int | None) -> Mod:
        """A mask of ``num_heads`` heads, for those of this rank."""
        if self.size == 1 or not mask.uses("h"):
            return mask
        assert num_heads is not None, "the plan of a mask that depends on h knows the heads"
        first = self.first_head(num_heads // self.size, torch.device("cpu"))
        return replace(mask, graph=mask.of_later_heads, captured=(*mask.captured, first))

    def of_idle(self, idle: Idle) -> Idle:
        """Idle tokens for this rank's heads: what is in the table for one of them, or for all at once."""
        return Idle(*(x[:, _share(x.shape[1], self.size, self.rank)] if x.ndim == 3 else x for x in idle))


def summed(
    grad: Tensor,  # [B, A, S, D] fp32 if A is more than H, else [B, H, S, D]
    num_heads: int,  # H
) -> Tensor:  # [B, H, S, D]
    """Gradients of heads of which several ranks had a copy, added in the order of the ranks."""
    parts = grad.unflatten(1, (num_heads, -1)).unbind(dim=2)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _share(num_heads: int, size: int, rank: int) -> slice:
    """A rank's heads; one that several ranks share, if there are fewer heads than ranks."""
    if num_heads < size:
        return slice(rank * num_heads // size, rank * num_heads // size + 1)
    return slice(rank * num_heads // size, (rank + 1) * num_heads // size)


def _packed(parts: Sequence[Tensor]) -> Tensor:
    """As bytes, those of the widest elements first, so that all lie where such elements may."""
    message = torch.empty(sum(part.nbytes for part in parts), dtype=torch.uint8, device=parts[0].device)
    for part, room in zip(parts, _unpacked(message, parts), strict=True):
        room.copy_(part)
    return message


def _unpacked(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts, begin = dict[int, Tensor](), 0
    for place in sorted(range(len(like)), key=lambda place: -like[place].element_size()):
        end = begin + like[place].nbytes
        parts[place] = message[begin:end].view(like[place].dtype).view(like[place].shape)
        begin = end
    return [parts[place] for place in range(len(like))]

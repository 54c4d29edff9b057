"""Moves K/V and dK/dV between ranks as a plan's steps say, the next step's messages in flight while the caller
computes.

Every rank runs the same sequence: post step t + 1, compute step t, post step t's gradients. One packed contiguous
message per (source, destination, step, direction), so the messages between two ranks match in number, order and size on
both ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.profiler import record_function

from cpflex.links.protocol import Links, Message, Work
from cpflex.ring.schedule import Exchange, Rows, Step, Transfer, last_uses

# B batch, H heads of keys and values, R rows, D head dim of keys, Dv of values


class Pair(NamedTuple):
    """K and V of a block, or their gradients."""

    k: Tensor  # [B, H, R, D]
    v: Tensor  # [B, H, R, Dv]


class _Arrival(NamedTuple):
    step: int
    work: Work
    transfers: Sequence[Transfer]
    buffers: list[Tensor]


class Transport:
    """One pass over the steps, forward or backward.

    Args:
        links: the group; None with one rank.
        steps: the rank's steps.
        shard: the rank's own K and V: block 0.
        is_part: dK and dV of the shard are added to elsewhere.
    """

    def __init__(self, links: Links | None, steps: Sequence[Step], shard: Pair, *, is_part: bool = False) -> None:
        self.links = links
        self.rank = links.rank if links is not None else 0
        self.steps = steps
        self.shard = shard
        self.is_part = is_part
        self.bytes_sent = 0
        self._sums: dict[int, Pair] = {}  # dK/dV that are here, by block
        self._grads: dict[int, list[_Arrival]] = {}  # by the block that they are added to
        self._sent: list[Work] = []
        self._last_uses = last_uses([step.exchange for step in steps])

    def circulate(self) -> Iterator[tuple[int, Step, Pair]]:
        """(index, step, its K and V) for each step, in order; while the caller computes one, the next is on its way.

        A caller that lets go of K and V before it asks for the next has at most `most_rows` of other ranks in memory:
        two blocks, and those that are passed on.
        """
        blocks = {0: self.shard}
        packed: dict[int, Tensor] = {}  # a block that arrived as one message travels on as it came
        first = self.steps[0].exchange
        arrival = self._post(0, blocks, packed) if first.sends or first.receives else None
        for index, step in enumerate(self.steps):
            if arrival is not None:
                self._wait(arrival, "K/V")
                self._deliver(arrival, blocks, packed)
            arrival = None  # its buffers are gone before the next ones are made
            if index + 1 < len(self.steps):
                arrival = self._post(index + 1, blocks, packed)
            block = blocks[index] if index in blocks else self._join([])
            for done in self._last_uses[index]:
                blocks.pop(done, None)
                packed.pop(done, None)
            with _shown(index, "attend"):
                yield index, step, block
                del block

    def _post(self, index: int, blocks: dict[int, Pair], packed: dict[int, Tensor]) -> _Arrival:
        exchange = self.steps[index].exchange
        sends = []
        for transfer in exchange.sends:
            block = blocks[transfer.block]
            whole = transfer.rows == ((0, block.k.shape[2]),)
            if whole and transfer.block not in packed:
                packed[transfer.block] = _pack(block, transfer.rows)
            sends.append((transfer.peer, packed[transfer.block] if whole else _pack(block, transfer.rows)))
        return self._start(index, sends, exchange.receives, self.shard)

    def _deliver(self, arrival: _Arrival, blocks: dict[int, Pair], packed: dict[int, Tensor]) -> None:
        parts: dict[int, list[tuple[Transfer, Tensor]]] = {}
        for transfer, buffer in zip(arrival.transfers, arrival.buffers, strict=True):
            parts.setdefault(transfer.block, []).append((transfer, buffer))
        for block, messages in parts.items():
            blocks[block] = self._join(messages)
            if len(messages) == 1:
                packed[block] = messages[0][1]

    def give_back(self, index: int, grads: Pair) -> None:
        """Hand over dK, dV (fp32, unless `is_alone`) of step ``index``'s block; they travel to the owner of its rows.

        What arrived for a block is added before it leaves. Parts for the rank's own shard are added one step after
        they were sent for, in a fixed order: the rank's own, then by step, then as the step lists them.
        """
        self._sums[index] = grads
        if index:
            self._return(index, self.steps[index].exchange)

    def _return(self, step: int, exchange: Exchange) -> None:
        for block, rows in _extents(exchange.grad_sends).items():
            self._add_arrived(block, rows)
        sends = [(t.peer, _pack(self._sums[t.block], t.rows)) for t in exchange.grad_sends]
        arrival = self._start(step, sends, exchange.grad_receives, self._sums[0])
        for block in {step, *(t.block for t in exchange.grad_sends)}:
            self._sums.pop(block, None)
        self._add_arrived(0, 0)
        for transfer, buffer in zip(exchange.grad_receives, arrival.buffers, strict=True):
            self._grads.setdefault(transfer.block, []).append(_Arrival(step, arrival.work, [transfer], [buffer]))
        self._sent.append(arrival.work)

    @property
    def is_alone(self) -> bool:
        """One step, and no gradients from elsewhere: what it computes is not added to."""
        return not self.is_part and len(self.steps) == 1 and not self.steps[0].exchange.grad_receives

    def home(self) -> Pair:
        """dK, dV of the rank's own shard, all ranks' parts added."""
        for step, exchange in enumerate(self.steps[-1].exchange.after, len(self.steps)):
            self._return(step, exchange)
        self._add_arrived(0, 0)
        for work in self._sent:
            work.wait()
        return self._sums.pop(0)

    def _add_arrived(self, block: int, num_rows: int) -> None:
        """What arrived for a block, which begins as zeros of so many rows if nothing of it was computed here."""
        if block not in self._sums:
            self._sums[block] = Pair(*(x.new_zeros(*x.shape[:2], num_rows, x.shape[3]) for x in self._sums[0]))
        total = self._sums[block]
        for arrival in self._grads.pop(block, []):
            transfer, buffer = arrival.transfers[0], arrival.buffers[0]
            if transfer.peer != self.rank:
                self._wait(arrival, "dK/dV")
            part = _split(buffer, transfer.num_rows, total)
            offset = 0
            for start, stop in transfer.rows:
                for mine, arrived in zip(total, part, strict=True):
                    _rows(mine, start, stop).add_(_rows(arrived, offset, offset + stop - start))
                offset += stop - start

    def _start(self, step: int, sends: list[Message], receives: Sequence[Transfer], like: Pair) -> _Arrival:
        """Post a step's messages. What a rank sends itself stays where it is."""
        width = _row_elements(like)
        kept = iter([tensor for peer, tensor in sends if peer == self.rank])
        buffers = [next(kept) if t.peer == self.rank else like.k.new_empty(t.num_rows * width) for t in receives]
        outgoing = [message for message in sends if message[0] != self.rank]
        incoming = [(t.peer, buffer) for t, buffer in zip(receives, buffers, strict=True) if t.peer != self.rank]
        for _, tensor in outgoing:
            self.bytes_sent += tensor.numel() * tensor.element_size()
        assert self.links is not None or not (outgoing or incoming), "one rank has nobody to exchange with"
        work = self.links.exchange(outgoing, incoming) if self.links is not None else _Done()
        return _Arrival(step, work, receives, buffers)

    def _wait(self, arrival: _Arrival, what: str) -> None:
        try:
            with _shown(arrival.step, "wait", what):
                arrival.work.wait()
        except (ConnectionError, TimeoutError) as error:
            peers = sorted({t.peer for t in arrival.transfers} - {self.rank})
            failed = f"from group ranks {peers} did not arrive" if peers else "did not leave"
            raise type(error)(f"group rank {self.rank}: {what} of step {arrival.step} {failed}: {error}") from error

    def _join(self, messages: Sequence[tuple[Transfer, Tensor]]) -> Pair:
        """The block whose rows the messages hold."""
        like = self.shard
        parts = [(t.rows, _split(buffer, t.num_rows, like)) for t, buffer in messages]
        if not parts:
            return Pair(like.k[:, :, :0], like.v[:, :, :0])
        if len(parts) == 1 and len(parts[0][0]) == 1:
            return parts[0][1]
        pieces = []
        for rows, part in parts:
            offset = 0
            for start, stop in rows:
                pieces.append((start, part, offset, stop - start))
                offset += stop - start
        pieces.sort(key=lambda piece: piece[0])
        return Pair(
            torch.cat([part.k.narrow(2, offset, length) for _, part, offset, length in pieces], dim=2),
            torch.cat([part.v.narrow(2, offset, length) for _, part, offset, length in pieces], dim=2),
        )


class _Done:
    def wait(self) -> None:
        return


def _extents(transfers: Sequence[Transfer]) -> dict[int, int]:
    """Rows of each block that leaves whole, in several messages."""
    found: dict[int, int] = {}
    for t in transfers:
        found[t.block] = max(found.get(t.block, 0), *(stop for _, stop in t.rows))
    return found


_UNSEEN = contextlib.nullcontext()


def _shown(index: int, *words: str) -> contextlib.AbstractContextManager:
    """A name in the trace of a profiler, if there is one: names cost as much as messages."""
    if profiler._is_profiler_enabled:
        return record_function(" ".join([f"cpflex::step[{index}]", *words]))
    return _UNSEEN


def _row_elements(pair: Pair) -> int:
    batch, heads, _, k_dim = pair.k.shape
    return batch * heads * (k_dim + pair.v.shape[-1])


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    return x if stop - start == x.shape[2] else x.narrow(2, start, stop - start)


def _pack(pair: Pair, rows: Rows) -> Tensor:
    """All K rows, then all V rows, as one contiguous 1-D message."""
    num_rows = sum(stop - start for start, stop in rows)
    message = pair.k.new_empty(num_rows * _row_elements(pair))
    for x, packed in zip(pair, _split(message, num_rows, pair), strict=True):
        if len(rows) == 1:
            packed.copy_(_rows(x, *rows[0]))
        else:
            torch.cat([_rows(x, start, stop) for start, stop in rows], dim=2, out=packed)
    return message


def _split(message: Tensor, num_rows: int, like: Pair) -> Pair:
    batch, heads, _, k_dim = like.k.shape
    v_dim, begin = like.v.shape[3], int(message.storage_offset())

    def part(dim: int, offset: int) -> Tensor:
        strides = (heads * num_rows * dim, num_rows * dim, dim, 1)
        return message.as_strided((batch, heads, num_rows, dim), strides, offset)

    return Pair(part(k_dim, begin), part(v_dim, begin + batch * heads * num_rows * k_dim))

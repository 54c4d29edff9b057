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
from cpflex.ring.schedule import Rows, Step, Transfer

# B batch, H heads of keys and values, R rows, D head dim of keys, Dv of values


class Pair(NamedTuple):
    """K and V of a block, or their gradients."""

    k: Tensor  # [B, H, R, D]
    v: Tensor  # [B, H, R, Dv]


class _Arrival(NamedTuple):
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
        self.steps = steps
        self.shard = shard
        self.is_part = is_part
        self.bytes_sent = 0
        self._grads: dict[int, list[_Arrival]] = {}  # by the block that they are added to
        self._sent: list[Work] = []
        self._last_uses = _last_uses(steps)

    def circulate(self) -> Iterator[tuple[int, Step, Pair]]:
        """(index, step, its K and V) for each step, in order; while the caller computes one, the next is on its way.

        A caller that lets go of K and V before it asks for the next has two blocks in memory at most, besides its own.
        """
        blocks = {0: self.shard}
        packed: dict[int, Tensor] = {}  # a block that arrived as one message travels on as it came
        arrival = None
        for index, step in enumerate(self.steps):
            if arrival is not None:
                self._wait(arrival, index, "K/V")
                blocks[index] = self._unpack(arrival, self.shard)
                if len(arrival.buffers) == 1:
                    packed[index] = arrival.buffers[0]
            arrival = None  # its buffers are gone before the next ones are made
            if index + 1 < len(self.steps):
                arrival = self._post(index + 1, blocks, packed)
            block = blocks[index]
            for done in self._last_uses[index]:
                blocks.pop(done)
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
        return self._start(sends, exchange.receives, self.shard)

    def give_back(self, index: int, grads: Pair) -> None:
        """Hand over dK, dV (fp32, unless `is_alone`) of step ``index``'s block; they travel to the owner of its rows.

        What arrived for the block is added first. Parts for the rank's own shard are added one step after they were
        sent for, in a fixed order: the rank's own, then by step, then by peer.
        """
        exchange = self.steps[index].exchange
        if index == 0:
            self._home = grads
            return
        grads = self._add_arrived(index, grads)
        sends = [(t.peer, _pack(grads, t.rows)) for t in exchange.grad_sends]
        arrival = self._start(sends, exchange.grad_receives, self._home)
        self._home = self._add_arrived(0, self._home)
        for transfer, buffer in zip(exchange.grad_receives, arrival.buffers, strict=True):
            self._grads.setdefault(transfer.block, []).append(_Arrival(arrival.work, [transfer], [buffer]))
        self._sent.append(arrival.work)

    @property
    def is_alone(self) -> bool:
        """One step, and no gradients from elsewhere: what it computes is not added to."""
        return not self.is_part and len(self.steps) == 1 and not self.steps[0].exchange.grad_receives

    def home(self) -> Pair:
        """dK, dV of the rank's own shard, all ranks' parts added."""
        total = self._add_arrived(0, self._home)
        for work in self._sent:
            work.wait()
        return total

    def _add_arrived(self, block: int, grads: Pair) -> Pair:
        for arrival in self._grads.pop(block, []):
            self._wait(arrival, block, "dK/dV")
            part = self._unpack(arrival, grads)
            offset = 0
            for start, stop in arrival.transfers[0].rows:
                for mine, arrived in zip(grads, part, strict=True):
                    _rows(mine, start, stop).add_(_rows(arrived, offset, offset + stop - start))
                offset += stop - start
        return grads

    def _start(self, sends: list[Message], receives: Sequence[Transfer], like: Pair) -> _Arrival:
        width = _row_elements(like)
        buffers = [like.k.new_empty(t.num_rows * width) for t in receives]
        for _, tensor in sends:
            self.bytes_sent += tensor.numel() * tensor.element_size()
        assert self.links is not None or not (sends or receives), "one rank has nobody to exchange with"
        incoming = [(t.peer, buffer) for t, buffer in zip(receives, buffers, strict=True)]
        work = self.links.exchange(sends, incoming) if self.links is not None else _Done()
        return _Arrival(work, receives, buffers)

    def _wait(self, arrival: _Arrival, index: int, what: str) -> None:
        try:
            with _shown(index, "wait", what):
                arrival.work.wait()
        except (ConnectionError, TimeoutError) as error:
            rank = self.links.rank if self.links is not None else 0
            peers = sorted({t.peer for t in arrival.transfers})
            raise type(error)(
                f"group rank {rank}: {what} of step {index} from group ranks {peers} did not arrive: {error}"
            ) from error

    def _unpack(self, arrival: _Arrival, like: Pair) -> Pair:
        parts = [_split(b, t.num_rows, like) for b, t in zip(arrival.buffers, arrival.transfers, strict=True)]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Pair(like.k[:, :, :0], like.v[:, :, :0])
        return Pair(torch.cat([p.k for p in parts], dim=2), torch.cat([p.v for p in parts], dim=2))


class _Done:
    def wait(self) -> None:
        return


def _last_uses(steps: Sequence[Step]) -> list[list[int]]:
    """The blocks that no message needs any more once that of step i + 1 is posted, for each step i."""
    last = list(range(len(steps)))
    for index, step in enumerate(steps):
        for transfer in step.exchange.sends:
            last[transfer.block] = max(last[transfer.block], index - 1)
    ended: list[list[int]] = [[] for _ in steps]
    for block, index in enumerate(last):
        ended[index].append(block)
    return ended


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
        offset = 0
        for start, stop in rows:
            _rows(packed, offset, offset + stop - start).copy_(_rows(x, start, stop))
            offset += stop - start
    return message


def _split(message: Tensor, num_rows: int, like: Pair) -> Pair:
    batch, heads, _, k_dim = like.k.shape
    v_dim, begin = like.v.shape[3], int(message.storage_offset())

    def part(dim: int, offset: int) -> Tensor:
        strides = (heads * num_rows * dim, num_rows * dim, dim, 1)
        return message.as_strided((batch, heads, num_rows, dim), strides, offset)

    return Pair(part(k_dim, begin), part(v_dim, begin + batch * heads * num_rows * k_dim))

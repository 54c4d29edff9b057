"""A grid of ranks: heads are exchanged inside, within a row, and keys outside, within a column.

Rank r of the whole group is ``(r // size, r % size)``: ``size`` ranks next to each other are a row. The grid is made of
one group, of which rows and columns are views, or of two groups, which together are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cpflex.links.comparing import Comparisons
from cpflex.links.protocol import Apart, Links, Message, Words, Work

APART = 2**63 - 1
"""What a rank tells its column when the numbers of its row differ."""


class Lanes(NamedTuple):
    """The row and the column of one rank."""

    inner: Links
    outer: Links


def lanes_of(links: Links, size: int) -> Lanes:
    """Rows of ``size`` ranks, and the columns across them.

    Raises:
        ValueError: the two groups that ``links`` consists of have other sizes.
    """
    if isinstance(links, GridLinks):
        if links.inner.world_size != size:
            raise ValueError(f"heads are exchanged in groups of {size} ranks; got one of {links.inner.world_size}")
        return Lanes(links.inner, links.outer)
    row, place = divmod(links.rank, size)
    return Lanes(
        PeerLinks(links, tuple(range(row * size, (row + 1) * size))),
        PeerLinks(links, tuple(range(place, links.world_size, size))),
    )


class PeerLinks:
    """Some ranks of a group, numbered anew; messages travel in the group's own lane. Calls are compared in the whole
    group, and never here.
    """

    def __init__(self, links: Links, peers: tuple[int, ...]) -> None:
        self.links = links
        self.peers = peers
        self.rank = peers.index(links.rank)
        self.world_size = len(peers)
        self.agreed = links.agreed

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work:
        return self.links.exchange(*([(self.peers[peer], x) for peer, x in both] for both in (sends, receives)))

    def compare(
        self,
        number: int,
        plan: str,
        device: torch.device | None = None,
        tell: Callable[[list[int]], None] | None = None,
    ) -> None:
        raise AssertionError("calls are compared in the whole group")

    def settle(self) -> None:
        self.links.settle()

    @property
    def opening_bytes(self) -> int:
        return self.links.opening_bytes

    @opening_bytes.setter
    def opening_bytes(self, count: int) -> None:
        self.links.opening_bytes = count

    @property
    def waits(self) -> bool:
        return self.links.waits

    @waits.setter
    def waits(self, waits: bool) -> None:
        self.links.waits = waits

    def apart(self) -> list[int] | None:
        return self.links.apart()

    def say(self, number: int, words: Words) -> None:
        self.links.say(number, words)

    def find(self, numbers: Iterable[int]) -> dict[int, Words]:
        return self.links.find(numbers)


class GridLinks:
    """Two groups as one: a rank's row, ``inner``, and its column, ``outer``."""

    def __init__(self, inner: Links, outer: Links, comparisons: Comparisons | None = None) -> None:
        self.inner = inner
        self.outer = outer
        self.comparisons = comparisons
        self.rank = outer.rank * inner.world_size + inner.rank
        self.world_size = outer.world_size * inner.world_size
        self.agreed = inner.agreed if comparisons is None else comparisons.known.agreed
        self._opening_bytes = 0
        self._device: torch.device | None = None

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work:
        """Messages go along the row to the receiver's column, and then along that. All ranks take part."""
        for _, tensor in (*sends, *receives):
            self._device = tensor.device
            break
        passing = self._across_row(sends)
        width, mine = self.inner.world_size, self.outer.rank
        arriving: dict[int, list[Tensor]] = {}  # by source
        for peer, buffer in receives:
            arriving.setdefault(peer, []).append(buffer)
        sizes = [
            [sum(x.nbytes for x in arriving.get(row * width + place, [])) for place in range(width)]
            for row in range(self.outer.world_size)
        ]
        buffers = [self._bytes(sum(row)) for row in sizes]
        buffers[mine] = passing[mine]
        work = self.outer.exchange(
            [(row, x) for row, x in enumerate(passing) if row != mine and x.numel()],
            [(row, x) for row, x in enumerate(buffers) if row != mine and x.numel()],
        )
        targets = [
            [x for place in range(width) for x in arriving.get(row * width + place, [])]
            for row in range(self.outer.world_size)
        ]
        return _Delivery(work, list(zip(buffers, targets, strict=True)))

    def _across_row(self, sends: Sequence[Message]) -> list[Tensor]:
        """What this rank is to pass on along its column, by row of the receiver; there, by sender."""
        width, height = self.inner.world_size, self.outer.world_size
        leaving: list[list[list[Tensor]]] = [[[] for _ in range(height)] for _ in range(width)]
        for peer, tensor in sends:
            row, place = divmod(peer, width)
            leaving[place][row].append(tensor.view(torch.uint8))
        sizes = [torch.tensor([sum(x.nbytes for x in part) for part in to], device=self._device) for to in leaving]
        arrived_sizes = _swapped(sizes, [torch.empty_like(x) for x in sizes], self.inner)
        counts = [x.tolist() for x in arrived_sizes]
        whole = [torch.cat([self._bytes(0), *(x for part in to for x in part)]) for to in leaving]
        arrived = _swapped(whole, [self._bytes(sum(of)) for of in counts], self.inner)
        parts = [x.split(of) for x, of in zip(arrived, counts, strict=True)]
        return [torch.cat([of[row] for of in parts]) for row in range(height)]

    def _bytes(self, number: int) -> Tensor:
        return torch.empty(number, dtype=torch.uint8, device=self._device)

    def compare(
        self,
        number: int,
        plan: str,
        device: torch.device | None = None,
        tell: Callable[[list[int]], None] | None = None,
    ) -> None:
        """As one group would: along the row, then along the column. Without ``comparisons`` the host always waits, and
        a column hears of a row that differs.
        """
        self._device = device or self._device
        if self.comparisons is not None:
            self.comparisons.compare(number, plan, device, tell)
            return
        row = _numbers(self.inner, number, plan, device)
        alike = all(other == number for other in row)
        column = _numbers(self.outer, number if alike else APART, plan, device)
        if all(other == number for other in column):
            return
        by_place = [_numbers(self.outer, one, plan, device) for one in row]
        raise Apart([numbers[row] for row in range(self.outer.world_size) for numbers in by_place])

    def settle(self) -> None:
        if self.comparisons is not None:
            self.comparisons.settle()

    def apart(self) -> list[int] | None:
        return None if self.comparisons is None else self.comparisons.apart()

    @property
    def opening_bytes(self) -> int:
        return self._opening_bytes if self.comparisons is None else self.comparisons.known.opening_bytes

    @opening_bytes.setter
    def opening_bytes(self, count: int) -> None:
        if self.comparisons is None:
            self._opening_bytes = count
        else:
            self.comparisons.known.opening_bytes = count

    @property
    def waits(self) -> bool:
        return self.inner.waits

    @waits.setter
    def waits(self, waits: bool) -> None:
        self.inner.waits = self.outer.waits = waits
        if self.comparisons is not None:
            self.comparisons.known.waits = waits

    def say(self, number: int, words: Words) -> None:
        self.inner.say(number, words)

    def find(self, numbers: Iterable[int]) -> dict[int, Words]:
        return self.inner.find(numbers)


class _Delivery:
    def __init__(self, work: Work, arriving: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> None:
        self.work = work
        self.arriving = arriving

    def wait(self) -> None:
        self.work.wait()
        for buffer, targets in self.arriving:
            for part, target in zip(buffer.split([x.nbytes for x in targets]), targets, strict=True):
                target.view(torch.uint8).copy_(part)
        self.arriving = ()


def _numbers(links: Links, number: int, plan: str, device: torch.device | None) -> list[int]:
    """Every rank's number, by rank; the host waits."""
    try:
        links.compare(number, plan, device)
    except Apart as apart:
        return apart.numbers
    return [number] * links.world_size


def _swapped(sent: Sequence[Tensor], received: list[Tensor], links: Links) -> list[Tensor]:
    """What each rank of a row sent here, this one included."""
    received[links.rank] = sent[links.rank]
    others = [peer for peer in range(links.world_size) if peer != links.rank]
    links.exchange(
        [(peer, sent[peer]) for peer in others if sent[peer].numel()],
        [(peer, received[peer]) for peer in others if received[peer].numel()],
    ).wait()
    return received

"""Ledger: comparisons that the device makes while the host runs ahead, and what came of them.

The extremes of a call's numbers are taken there, on the stream, before the call's exchange. If they differ, the stream
stops: else ranks would wait for messages that nobody sends. On their way the extremes are copied to the host, so that
they can be read when the device is gone; who has which number the hosts then ask one another.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LINES = 64
"""Comparisons that may be under way at once; a host that is further ahead waits."""

POLL = 0.05
"""Seconds between two looks of the thread that tells what differs."""

Tell = Callable[[list[int]], None]


class _Line(NamedTuple):
    """A comparison under way."""

    number: int
    extremes: Tensor  # int64 [2], of the host
    learn: Callable[[], list[int]]
    tell: Tell


class Ledger:
    """The comparisons of one group on one device.

    Args:
        device: where it compares.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # it is written to in any mode
            pinned = device.type == "cuda"
            self._lines = torch.zeros(LINES, 2, dtype=torch.int64, device="cpu", pin_memory=pinned)
        self._open: deque[_Line] = deque()
        self.num_entered = 0
        self._lock = threading.Lock()
        self.apart: list[int] | None = None
        """Every rank's number, once they have differed."""
        threading.Thread(target=_look_again_and_again, args=(weakref.ref(self),), daemon=True).start()

    def compare(
        self,
        extremes: Tensor,  # int64 [2], the largest of all ranks' (number, -number), on the device
        number: int,
        learn: Callable[[], list[int]],
        tell: Tell,
    ) -> None:
        """Stop the device unless all numbers are equal, and then `learn` and `tell` them; the host does not wait."""
        if len(self._open) >= LINES:
            extremes.tolist()  # waits until the device is here: all lines have arrived
            self.look()
        line = self._lines[self.num_entered % LINES]
        self.num_entered += 1
        line.zero_()  # no number is 0
        line.copy_(extremes, non_blocking=True)
        with self._lock:
            self._open.append(_Line(number, line, learn, tell))
        self._stop_unless(extremes.sum() == 0)

    def look(self) -> list[int] | None:
        """Numbers that differed, if any have; the device, which may have stopped, is not asked."""
        told = None
        with self._lock:
            while self._open and (extremes := self._open[0].extremes.tolist()) and all(extremes):
                line = self._open.popleft()
                if extremes != [line.number, -line.number]:
                    self.apart, told = line.learn(), line.tell
                    self._open.clear()
        if told is not None and self.apart is not None:
            told(self.apart)
        return self.apart

    def _stop_unless(self, equal: Tensor) -> None:
        said = "the ranks disagree about this attention call; each rank's log says in what, and so does its next call"
        torch.ops.aten._assert_async.msg(equal, said)


def _look_again_and_again(found: weakref.ref[Ledger]) -> None:
    """As long as the ledger lives, or until there is something to tell."""
    while (ledger := found()) is not None and ledger.look() is None:
        del ledger
        time.sleep(POLL)

"""Ledger: comparisons that the device makes while the host runs ahead, and what came of them.

A group of NCCL alone has no way for hosts to meet that does not wait for the device. The numbers of a call are compared
there, on the stream, before the call's exchange. If they differ, the stream stops: else ranks would wait for messages
that nobody sends. On their way the numbers are copied to the host, so that they can be read when the device is gone.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

LINES = 64
"""Comparisons that may be under way at once; a host that is further ahead waits."""

POLL = 0.05
"""Seconds between two looks of the thread that tells what differs."""

Tell = Callable[[list[int]], None]


class Ledger:
    """The comparisons of one group on one device.

    Args:
        like: numbers of all ranks, on the device.
    """

    def __init__(self, like: Tensor) -> None:
        with torch.inference_mode(False):  # it is written to in any mode
            self._lines = torch.zeros(LINES, len(like), dtype=torch.int64, device="cpu", pin_memory=like.is_cuda)
        self._open: deque[tuple[int, Tensor, Tell]] = deque()
        self.num_entered = 0
        self._lock = threading.Lock()
        self.apart: list[int] | None = None
        """Numbers that differed, once they have."""
        threading.Thread(target=_look_again_and_again, args=(weakref.ref(self),), daemon=True).start()

    def compare(self, numbers: Tensor, value: int, tell: Tell) -> None:
        """Stop the device unless all ``numbers`` are ``value``, and then tell the numbers; the host does not wait."""
        if len(self._open) >= LINES:
            numbers.tolist()  # waits until the device is here: all lines have arrived
            self.look()
        line = self._lines[self.num_entered % LINES]
        self.num_entered += 1
        line.zero_()  # no number is 0
        line.copy_(numbers, non_blocking=True)
        with self._lock:
            self._open.append((value, line, tell))
        self._stop_unless((numbers == value).all())

    def look(self) -> list[int] | None:
        """Numbers that differed, if any have arrived; the device, which may have stopped, is not asked."""
        told = None
        with self._lock:
            while self._open and (numbers := self._open[0][1].tolist()) and all(numbers):
                value, _, tell = self._open.popleft()
                if any(number != value for number in numbers):
                    self.apart, told = numbers, tell
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

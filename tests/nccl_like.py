"""Links over gloo that behave as NCCL's do, where there is no GPU: tensors on the CPU stand for those on GPUs.

The communicator is made in the first operation, by all ranks together; until then whoever is in an operation waits. The
host does not wait for what the device does: a comparison comes to its end later, and the device stops if it failed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cpflex.links.comparing import Comparisons
from cpflex.links.ledger import Ledger
from cpflex.links.processes import ProcessLinks
from cpflex.links.protocol import Message
from cpflex.links.whereabouts import Meeting, Watch
from patience import patience

CPU = torch.device("cpu")
LAG = 0.15
"""Seconds by which the device is behind the host."""


class LateLedger(Ledger):
    """Of a device that is behind the host."""

    stopped = False

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = ThreadPoolExecutor(max_workers=1)

    def compare(self, *arguments: Any) -> None:
        then = time.monotonic() + LAG

        def later() -> None:
            time.sleep(max(0.0, then - time.monotonic()))
            super(LateLedger, self).compare(*arguments)

        self._stream.submit(later)

    def _stop_unless(self, equal: Tensor) -> None:
        self.stopped |= not equal

    def synchronize(self) -> None:
        self._stream.submit(lambda: None).result()
        if self.stopped:
            raise RuntimeError("CUDA error: device-side assert triggered")


def nccl_like(ranks: Sequence[int], alone: bool) -> Any:
    """`NcclLike` links between ``ranks``, None on others. All ranks of the job call it together."""
    groups = [dist.new_group(ranks, timeout=timedelta(seconds=patience(seconds))) for seconds in (20, 6)]
    return NcclLike(*groups, alone) if dist.get_rank() in ranks else None


class NcclLike(ProcessLinks):
    """A group of NCCL ``alone``, or of gloo and NCCL."""

    def __init__(self, group: dist.ProcessGroup, communicator: dist.ProcessGroup, alone: bool) -> None:
        super().__init__(group)
        self.comparisons = LikeNccl([group], communicator, alone)
        self.ledger = self.comparisons.known.ledgers[CPU]

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Any:
        if sends or receives:
            self.comparisons.operate()
        return _Enqueued(self.ledger, super().exchange(sends, receives))


class LikeNccl(Comparisons):
    """CPU tensors are on devices; hosts have two numbers and a flag to compare, devices two numbers."""

    def __init__(self, groups: Sequence[dist.ProcessGroup], communicator: dist.ProcessGroup, alone: bool) -> None:
        super().__init__(groups)
        self._communicator = communicator
        self.has_nccl, self.has_gloo = True, not alone
        self.num_host_waits = 0
        self.num_on_devices = 0
        self.known.ledgers[CPU] = LateLedger(CPU)
        self._made = False

    def operate(self) -> None:
        """The first time, all ranks make the communicator."""
        if not self._made:
            dist.barrier(group=self._communicator)
        self._made = True

    def _reaches(self, device: torch.device | None) -> bool:
        return device is not None

    def _own_device(self, device: torch.device | None, plan: str) -> torch.device:
        if not self.known.connected:
            for group in self.groups:
                Watch(group, plan).until_done(Meeting(group))
            self.known.connected.append(CPU)
        return CPU

    def _start(self, extremes: Tensor, place: int) -> dist.Work:
        if len(extremes) == 2:
            self.num_on_devices += 1
            self.operate()
        return super()._start(extremes, place)

    def _wait(self, *arguments: Any) -> None:
        self.num_host_waits += 1
        super()._wait(*arguments)


class _Enqueued:
    def __init__(self, ledger: LateLedger, work: Any) -> None:
        self.ledger, self.work = ledger, work

    def wait(self) -> None:
        """The reference backend looks at what arrived, as a host does that waits for its device."""
        self.ledger.synchronize()
        self.work.wait()

"""Comparing: whether all ranks are about to do the same, told from the extremes of their numbers.

One all-reduce of (n, -n), by the largest: where gathering would take as many hops as there are ranks, this takes about
their logarithm. Only if the extremes differ do hosts ask one another, in the store of the job, who has which number.

Hosts compare over gloo, devices over NCCL. In a group that has both, hosts meet until all ranks have come with tensors
on CUDA devices once. From then on devices compare whatever comes, also for a rank that refuses or that has a new kind
of call, whose host waits for its device: so all ranks are in one operation, whatever each of them knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from cpflex.links.ledger import Ledger
from cpflex.links.protocol import Apart, Words
from cpflex.links.whereabouts import Meeting, Watch
from cpflex.links.words import gather


class Comparisons:
    """Those of the ranks of one group, or of a grid of ranks, each of which is in one group along each dim.

    What the ranks know of one another lives as long as the group does, whatever plans come and go.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup]) -> None:
        self.groups = tuple(groups)
        backends = dist.get_backend_config(self.groups[0])
        self.has_nccl = "nccl" in backends
        self.has_gloo = not self.has_nccl or "gloo" in backends
        names = tuple(group.group_name for group in self.groups)
        self.known = _acquaintances.setdefault(self.groups[-1], {}).setdefault(names, Acquaintance())

    def compare(
        self,
        number: int,
        plan: str,
        device: torch.device | None,
        tell: Callable[[list[int]], None] | None,
    ) -> None:
        self.settle()
        known = self.known
        known.num_compared += 1
        known.tag = self._tag(number)
        later = None if known.waits else tell
        if self.hosts_meet:
            lacks = self._reaches(device)
            extremes = torch.tensor([number, -number, lacks], device="cpu")
            known.open = _Open(number, plan, extremes, self._start(extremes, 0), device)
            if later is None or self.has_nccl or len(self.groups) > 1:
                self.settle()
        elif later is not None and self._reaches(device):
            extremes = self._on_device(number, self._own_device(device, plan))
            for place in range(len(self.groups)):
                self._start(extremes, place).wait()
            learn = partial(self._numbers, number, known.num_compared)
            self._ledger(extremes.device).compare(extremes, number, learn, later)
        else:
            extremes = self._on_device(number, self._own_device(device, plan))
            self._wait(plan, extremes)
            self._require_equal(number, extremes)

    def settle(self) -> None:
        opened, self.known.open = self.known.open, None
        if opened is None:
            return
        posted, self.known.posted = self.known.posted, []
        try:
            self._wait(opened.plan, opened.extremes, opened.work)
            self._require_equal(opened.number, opened.extremes)
        except BaseException:
            # parts of these may be on their way, and gloo would stop in the middle if nobody held them
            self.known.kept += posted
            raise
        if opened.extremes[2]:
            self._connect(opened.device)

    def apart(self) -> list[int] | None:
        return next(filter(None, (ledger.look() for ledger in self.known.ledgers.values())), None)

    @property
    def hosts_meet(self) -> bool:
        """Hosts compare numbers among themselves; else devices do."""
        return self.has_gloo and not self.known.connected

    def _start(self, extremes: Tensor, place: int) -> dist.Work:
        """Begin to take the largest over the ranks of a group."""
        work = dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.groups[place], async_op=True)
        assert work is not None, "this process is a member of the group"
        return work

    def _wait(self, plan: str, extremes: Tensor, first: dist.Work | None = None) -> None:
        """Return when the extremes are those of all ranks."""
        for place, group in enumerate(self.groups):
            work = first if first is not None and place == 0 else self._start(extremes, place)
            # ranks of a grid that wait along its second dim are no strangers to those along its first
            Watch(group, f"{plan} {place}" if len(self.groups) > 1 else plan).until_done(work)

    def _require_equal(self, number: int, extremes: Tensor) -> None:
        if extremes[:2].tolist() != [number, -number]:
            self.known.tag = self._tag(0)
            raise Apart(self._numbers(number, self.known.num_compared))

    def _numbers(self, number: int, num_compared: int) -> list[int]:
        """Every rank's number, where they are known to differ; of a grid, the last dim varies slowest."""
        numbers = [number]
        for place, group in enumerate(self.groups):
            ranks = dist.get_process_group_ranks(group)
            name = f"cpflex/numbers/{group.group_name}/{ranks}/{place} of {len(self.groups)}/{num_compared}"
            numbers = list(chain.from_iterable(gather(name, group.rank(), group.size(), numbers)))
        return numbers

    def _tag(self, number: int) -> int:
        """Of the messages of one call, so that gloo takes none of another one for them; 0 for NCCL, which has none."""
        if self.has_nccl or len(self.groups) > 1:
            return 0
        return 1 + (number ^ number >> 31 ^ self.known.num_compared * 2654435761) % (2**31 - 2)

    # -- devices

    def _reaches(self, device: torch.device | None) -> bool:
        """NCCL carries tensors on ``device``."""
        return self.has_nccl and device is not None and device.type == "cuda"

    def _own_device(self, device: torch.device | None, plan: str) -> torch.device:
        """Where this rank's numbers lie; a rank that refuses may have tensors in the wrong place, or none."""
        known = self.known.connected
        if not self._reaches(device):
            device = known[-1] if known else self.groups[0].bound_device_id
            device = device or torch.device("cuda", torch.cuda.current_device())
        assert device is not None
        if not known:
            # NCCL's first collective waits for all ranks where nothing can be seen: who is missing shows here
            for group in self.groups:
                Watch(group, plan).until_done(Meeting(group))
        if device not in known:
            known.append(device)
        return device

    def _connect(self, device: torch.device | None) -> None:
        """Make NCCL's communicators, which it makes in the first operation and only if all ranks take part: a rank
        without messages in an exchange would not.
        """
        assert device is not None, "the numbers of all ranks say that they have tensors on devices"
        self.known.connected.append(device)
        extremes = self._on_device(0, device)
        for place in range(len(self.groups)):
            self._start(extremes, place).wait()

    def _on_device(self, number: int, device: torch.device) -> Tensor:
        """int64 [2], made there: the host waits for a copy."""
        extremes = torch.full((2,), number, dtype=torch.int64, device=device)
        extremes[1].neg_()
        return extremes

    def _ledger(self, device: torch.device) -> Ledger:
        if device not in self.known.ledgers:
            self.known.ledgers[device] = Ledger(device)
        return self.known.ledgers[device]


@dataclass
class _Open:
    """A comparison of hosts under way."""

    number: int
    plan: str
    extremes: Tensor  # int64 [3], the third: some rank's NCCL is not connected
    work: dist.Work
    device: torch.device | None


@dataclass
class Acquaintance:
    """What the ranks of a group know of one another."""

    agreed: dict[int, Words] = field(default_factory=dict)
    num_compared: int = 0
    """The same on all ranks."""
    waits: bool = False
    opening_bytes: int = 0
    connected: list[torch.device] = field(default_factory=list)
    """Devices of this rank from which NCCL reaches the others, by when they were first used."""
    ledgers: dict[torch.device, Ledger] = field(default_factory=dict)
    open: _Open | None = None
    tag: int = 0
    posted: list[Any] = field(default_factory=list)
    """Transfers that began while a comparison was open."""
    kept: list[Any] = field(default_factory=list)
    """Transfers of calls in which the ranks differed."""


_acquaintances: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[str, ...], Acquaintance]] = WeakKeyDictionary()

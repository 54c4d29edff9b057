"""Ranks as processes, over `torch.distributed`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

# before there is a group: imported after, it would hold the group until Python exits, and gloo threads abort then
import torch.distributed.nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cpflex.links.ledger import Ledger
from cpflex.links.protocol import Links, Message, Words, Work
from cpflex.links.whereabouts import Meeting, Watch
from cpflex.links.words import find, say

Group = dist.ProcessGroup | DeviceMesh | Links
"""What `make_plan` takes for the ranks that share a sequence."""


@dataclass
class _Acquaintance:
    """What the ranks of a group know of one another, whatever plans come and go."""

    agreed: dict[int, Words] = field(default_factory=dict)
    connected: list[torch.device] = field(default_factory=list)
    """Devices of this rank from which NCCL reaches the others, by when they were first used."""
    ledgers: dict[torch.device, Ledger] = field(default_factory=dict)


_acquaintances: WeakKeyDictionary[dist.ProcessGroup, _Acquaintance] = WeakKeyDictionary()


class ProcessLinks:
    """A process group as one of its ranks sees it: NCCL for CUDA tensors, gloo for CPU tensors."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.world_size = group.size()
        backends = dist.get_backend_config(group)
        self.has_nccl = "nccl" in backends
        self.hosts_meet = not self.has_nccl or "gloo" in backends
        """Hosts can compare numbers among themselves; in a group of NCCL alone only devices can."""
        self._known = _acquaintances.setdefault(group, _Acquaintance())
        self.agreed = self._known.agreed

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work:
        operations = [
            dist.P2POp(call, tensor, group=self.group, group_peer=peer)
            for call, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in messages
        ]
        return _ProcessWork(dist.batch_isend_irecv(operations) if operations else [], sends, receives)

    def all_gather_number(
        self,
        value: int,
        plan: str,
        device: torch.device | None = None,
        tell: Callable[[list[int]], None] | None = None,
    ) -> list[int] | None:
        watch = Watch(self.group, plan)
        if self.hosts_meet:
            lacking = self._reaches(device) and device not in self._known.connected
            numbers, work = self._gather(torch.tensor([value, lacking], device="cpu"))
            watch.until_done(work)
            numbers, lacks = numbers.view(-1, 2).T.tolist()
            if any(lacks) and numbers == [value] * self.world_size and device is not None:
                self._connect(device)
            return numbers
        device = self._own_device(device)
        if device not in self._known.connected:
            # NCCL's first collective waits for all ranks where nothing can be seen: who is missing shows here
            watch.until_done(Meeting(self.group))
            self._known.connected.append(device)
        numbers, work = self._gather(torch.full((1,), value, device=device))
        if tell is None:
            watch.until_done(work)
            return numbers.tolist()
        work.wait()
        if device not in self._known.ledgers:
            self._known.ledgers[device] = Ledger(numbers)
        self._known.ledgers[device].compare(numbers, value, tell)
        return None

    def apart(self) -> list[int] | None:
        return next(filter(None, (ledger.look() for ledger in self._known.ledgers.values())), None)

    def say(self, number: int, words: Words) -> None:
        say(number, words)

    def find(self, numbers: Iterable[int]) -> dict[int, Words]:
        return find(numbers)

    def _gather(self, mine: Tensor) -> tuple[Tensor, dist.Work]:
        everyones = mine.new_empty(self.world_size * len(mine))
        work = dist.all_gather_into_tensor(everyones, mine, group=self.group, async_op=True)
        assert work is not None, "this process is a member of the group"
        return everyones, work

    def _reaches(self, device: torch.device | None) -> bool:
        """NCCL carries tensors on ``device``."""
        return self.has_nccl and device is not None and device.type == "cuda"

    def _own_device(self, device: torch.device | None) -> torch.device:
        """Where this rank's numbers lie; a rank that refuses may have tensors in the wrong place, or none."""
        if self._reaches(device):
            assert device is not None
            return device
        known = self._known.connected[-1:] or [self.group.bound_device_id]
        return known[0] or torch.device("cuda", torch.cuda.current_device())

    def _connect(self, device: torch.device) -> None:
        """Make NCCL's communicator, which it makes in the first operation and only if all ranks take part: a rank
        without messages in an exchange would not.
        """
        self._gather(torch.zeros(1, dtype=torch.int64, device=device))[1].wait()
        if device not in self._known.connected:
            self._known.connected.append(device)


class _ProcessWork:
    def __init__(self, handles: list[Any], sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self.handles = handles
        self.messages = [*(("to", peer) for peer, _ in sends), *(("from", peer) for peer, _ in receives)]
        self.buffers = (sends, receives)  # alive until the transfer is done

    def wait(self) -> None:
        for place, handle in enumerate(self.handles):
            try:
                handle.wait()
            except RuntimeError as error:
                # NCCL has one handle for all
                alone = len(self.handles) == len(self.messages)
                which = self.messages[place : place + 1] if alone else self.messages
                said = ", ".join(f"{direction} group rank {peer}" for direction, peer in dict.fromkeys(which))
                raise ConnectionError(f"the message {said} failed: {error}") from error
        self.handles = []  # gloo would wait for a second message
        self.buffers = ()


def links_of(group: Group) -> Links:
    """The links of a process group, a 1-D device mesh, or an object that is links already.

    Raises:
        ValueError: a mesh of more than one dim, or a process that is not a member of the group.
        TypeError: anything else.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"the mesh must be 1-D, for instance mesh['cp']; got dims {group.mesh_dim_names}")
        group = group.get_group()
    if isinstance(group, dist.ProcessGroup):
        if group.rank() < 0:
            raise ValueError("this process is not a member of the group")
        return ProcessLinks(group)
    if isinstance(group, Links):
        return group
    raise TypeError(f"group must be a ProcessGroup, a 1-D DeviceMesh or None; got {type(group).__name__}")

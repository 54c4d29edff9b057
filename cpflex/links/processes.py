"""Ranks as processes, over `torch.distributed`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

# before there is a group: imported after, it would hold the group until Python exits, and gloo threads abort then
import torch.distributed.nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cpflex.links.protocol import Links, Message, Work
from cpflex.links.whereabouts import Watch

Group = dist.ProcessGroup | DeviceMesh | Links
"""What `make_plan` takes for the ranks that share a sequence."""


class ProcessLinks:
    """A process group as one of its ranks sees it: NCCL for CUDA tensors, gloo for CPU tensors."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.world_size = group.size()
        backends = dist.get_backend_config(group)
        self.device = torch.device("cuda" if "nccl" in backends and "gloo" not in backends else "cpu")
        """Of the messages about a call: by what the group can do, as the tensors of one rank may be a mistake."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work:
        operations = [
            dist.P2POp(call, tensor, group=self.group, group_peer=peer)
            for call, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in messages
        ]
        return _ProcessWork(dist.batch_isend_irecv(operations) if operations else [], sends, receives)

    def all_gather_number(self, value: int, plan: str) -> Tensor:
        mine = torch.full((1,), value, device=self.device)
        numbers = list(torch.empty(self.world_size, 1, dtype=torch.int64, device=self.device))
        work = dist.all_gather(numbers, mine, group=self.group, async_op=True)
        assert work is not None, "this process is a member of the group"
        if self.device.type == "cpu":
            Watch(self.group, plan).until_done(work)
        else:
            work.wait()
        return torch.cat(numbers)

    def all_gather_object(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


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

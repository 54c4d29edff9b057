"""Links: what one rank can do with its peers. `torch.distributed` in production, threads when debugging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist

# before there is a group: imported after, it would hold the group until Python exits, and gloo threads abort then
import torch.distributed.nn  # noqa: F401
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Message = tuple[int, Tensor]
"""(peer, by rank within the group; contiguous 1-D tensor to send, or to receive into)."""


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> None:
        """Return when the received tensors may be read and the sent ones written, in the order of the current
        stream.
        """
        ...


@runtime_checkable
class Links(Protocol):
    """A group of ranks as one of them sees it."""

    rank: int
    world_size: int

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work:
        """Start all transfers at once. Ranks call it in one global order; messages of a pair arrive in the order
        sent.
        """
        ...

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        ...


class ProcessLinks:
    """Ranks as processes, over a `torch.distributed` group: NCCL for CUDA tensors, gloo for CPU tensors."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.world_size = group.size()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work:
        operations = [
            dist.P2POp(call, tensor, group=self.group, group_peer=peer)
            for call, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in messages
        ]
        return _ProcessWork(dist.batch_isend_irecv(operations) if operations else [], sends, receives)

    def all_gather_object(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


class _ProcessWork:
    def __init__(self, handles: list[Any], sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self.handles = handles
        self.peers = sorted({peer for peer, _ in (*sends, *receives)})
        self.buffers = (sends, receives)  # alive until the transfer is done

    def wait(self) -> None:
        try:
            for handle in self.handles:
                handle.wait()
            self.handles = []  # gloo would wait for a second message
        except RuntimeError as error:
            raise ConnectionError(f"the exchange with group ranks {self.peers} failed: {error}") from error
        self.buffers = ()


def links_of(group: dist.ProcessGroup | DeviceMesh | Links) -> Links:
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

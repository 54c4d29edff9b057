"""Ranks as processes, over `torch.distributed`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

# before there is a group: imported after, it would hold the group until Python exits, and gloo threads abort then
import torch.distributed.nn
from torch.distributed.device_mesh import DeviceMesh

from cpflex.links.comparing import Comparisons
from cpflex.links.grid import GridLinks
from cpflex.links.protocol import Links, Message, Words, Work
from cpflex.links.words import find, say

Group = dist.ProcessGroup | DeviceMesh | Links | tuple[Any, Any]
"""What `make_plan` takes for the ranks that share a sequence: a tuple is (group of heads, group of the sequence)."""

HEADS_DIM = "heads"
"""Name of the dim of a 2-D mesh among whose ranks heads are exchanged; the first dim, if none has it."""


class ProcessLinks:
    """A process group as one of its ranks sees it: NCCL for CUDA tensors, gloo for CPU tensors."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.world_size = group.size()
        self.comparisons = Comparisons([group])
        self.agreed = self.comparisons.known.agreed

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work:
        known = self.comparisons.known
        operations = [
            dist.P2POp(call, tensor, group=self.group, tag=known.tag, group_peer=peer)
            for call, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in messages
        ]
        # gloo takes one message after the other, and fails at once where a rank is gone
        batches = [operations] if self.comparisons.has_nccl else [[operation] for operation in operations]
        handles = [handle for batch in batches if batch for handle in _begun(batch)]
        if known.open is not None:
            known.posted.append((handles, sends, receives))
        return _ProcessWork(self, handles, sends, receives)

    def compare(
        self,
        number: int,
        plan: str,
        device: torch.device | None = None,
        tell: Callable[[list[int]], None] | None = None,
    ) -> None:
        self.comparisons.compare(number, plan, device, tell)

    def settle(self) -> None:
        self.comparisons.settle()

    def apart(self) -> list[int] | None:
        return self.comparisons.apart()

    @property
    def opening_bytes(self) -> int:
        return self.comparisons.known.opening_bytes

    @opening_bytes.setter
    def opening_bytes(self, count: int) -> None:
        self.comparisons.known.opening_bytes = count

    @property
    def waits(self) -> bool:
        return self.comparisons.known.waits

    @waits.setter
    def waits(self, waits: bool) -> None:
        self.comparisons.known.waits = waits

    def say(self, number: int, words: Words) -> None:
        say(number, words)

    def find(self, numbers: Iterable[int]) -> dict[int, Words]:
        return find(numbers)


def _begun(batch: list[dist.P2POp]) -> list[Any]:
    try:
        return dist.batch_isend_irecv(batch)
    except RuntimeError as error:
        return [_Failed(error)]


class _Failed:
    """A message that could not even begin, which is told where it is waited for."""

    def __init__(self, error: RuntimeError) -> None:
        self.error = error

    def wait(self) -> None:
        raise self.error


class _ProcessWork:
    def __init__(self, links: Links, handles: list[Any], sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self.links = links
        self.handles = handles
        self.messages = [*(("to", peer) for peer, _ in sends), *(("from", peer) for peer, _ in receives)]
        self.buffers = (sends, receives)  # alive until the transfer is done

    def wait(self) -> None:
        self.links.settle()
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
    """The links of a process group, a device mesh, or an object that is links already; of a 2-D mesh or two groups, as
    one group.

    Raises:
        ValueError: a mesh of more than two dims, two groups that are no grid, or a process that is not a member of the
            group.
        TypeError: anything else.
    """
    if isinstance(group, DeviceMesh):
        group = _group_of(group)
    if isinstance(group, tuple) and len(group) == 2:
        return _grid_of(*group)
    if isinstance(group, dist.ProcessGroup):
        if group.rank() < 0:
            raise ValueError("this process is not a member of the group")
        return ProcessLinks(group)
    if isinstance(group, Links):
        return group
    raise TypeError(
        "group must be a ProcessGroup, a DeviceMesh, two groups (of heads, of the sequence) or None; got "
        f"{type(group).__name__}"
    )


def _group_of(mesh: DeviceMesh) -> Group:
    if mesh.ndim > 2:
        raise ValueError(
            f"the mesh must be 1-D or 2-D, for instance mesh['cp'] or mesh['heads', 'cp']; got dims "
            f"{mesh.mesh_dim_names}"
        )
    if mesh.ndim == 1:
        return mesh.get_group()
    heads = (mesh.mesh_dim_names or ()).index(HEADS_DIM) if HEADS_DIM in (mesh.mesh_dim_names or ()) else 0
    return mesh.get_group(heads), mesh.get_group(1 - heads)


def _grid_of(heads: Any, sequence: Any) -> GridLinks:
    """Of two groups that have one rank in common, this one."""
    inner, outer = links_of(heads), links_of(sequence)
    if isinstance(inner, GridLinks) or isinstance(outer, GridLinks):
        raise ValueError("each of two groups must be of one dim; got a pair of groups, or a 2-D mesh, as one of them")
    if isinstance(inner, ProcessLinks) and isinstance(outer, ProcessLinks):
        rows, columns = (set(dist.get_process_group_ranks(links.group)) for links in (inner, outer))
        if len(rows & columns) != 1:
            raise ValueError(
                "the group of heads and that of the sequence must have this process alone in common; got ranks "
                f"{sorted(rows)} and {sorted(columns)}"
            )
        return GridLinks(inner, outer, Comparisons([inner.group, outer.group]))
    return GridLinks(inner, outer)

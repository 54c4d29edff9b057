"""Links: what one rank can do with its peers, whatever lies between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

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

    def all_gather_number(self, value: int, plan: str) -> Tensor:
        """Every rank's number, by rank, int64 [world_size]; in a group of NCCL alone the host does not wait for it.

        Args:
            plan: what is to be computed, told to ranks that wait in vain.
        """
        ...

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        ...

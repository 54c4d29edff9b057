"""Links: what one rank can do with its peers, whatever lies between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Message = tuple[int, Tensor]
"""(peer, by rank within the group; contiguous 1-D tensor to send, or to receive into)."""

Words = dict[str, str]
"""What a number stands for."""


class Apart(RuntimeError):
    """The ranks compared different numbers."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(f"the ranks are about to compute different things: {numbers}")
        self.numbers = numbers
        """Every rank's, by rank; 0 for one that did not tell."""


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
    agreed: dict[int, Words]
    """Numbers that all ranks had once, and what they stand for; it lives as long as the group."""

    @property
    def opening_bytes(self) -> int:
        """Bytes of the message that opens the next attention to pages, the same on all ranks: what they agreed on in
        the one before; 0 if there was none. It lives as long as the group.
        """
        ...

    @opening_bytes.setter
    def opening_bytes(self, count: int) -> None: ...

    @property
    def waits(self) -> bool:
        """The host waits at every comparison, even where it need not; the other ranks see no difference."""
        ...

    @waits.setter
    def waits(self, waits: bool) -> None: ...

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work:
        """Start all transfers at once. Ranks call it in one global order; messages of a pair arrive in the order
        sent.
        """
        ...

    def compare(
        self,
        number: int,
        plan: str,
        device: torch.device | None = None,
        tell: Callable[[list[int]], None] | None = None,
    ) -> None:
        """Compare a number with every rank's, before an exchange: all ranks call it.

        Without ``tell`` the host waits until it is known that all numbers are equal. With it, it goes on: a device
        compares on its stream and stops if they differ, ``tell`` is then called with all numbers, in another thread,
        and `apart` has them; or hosts compare while they compute, and `settle` waits for them.

        Args:
            number: not 0.
            plan: fingerprint of what is to be computed, told to ranks that wait in vain.
            device: of the tensors that are exchanged if all numbers are equal; None if none will be.

        Raises:
            Apart: they differ; on every rank that waits.
            Astray: a rank waits in another group.
            ConnectionError: a rank did not come, or is gone.
        """
        ...

    def settle(self) -> None:
        """Return when what hosts compare is known to be equal; a device is not waited for. Nothing that arrives is read
        before. Raises as `compare` does.
        """
        ...

    def apart(self) -> list[int] | None:
        """Every rank's number of a comparison for which the host did not wait, if one is known to have failed."""
        ...

    def say(self, number: int, words: Words) -> None:
        """Let every rank of the job find what a number stands for; nobody is waited for."""
        ...

    def find(self, numbers: Iterable[int]) -> dict[int, Words]:
        """What was said about ``numbers``; without those about which nothing is said within some seconds."""
        ...


def all_gather_number(links: Links, number: int, plan: str, device: torch.device | None = None) -> list[int]:
    """Every rank's number, by rank; not 0. Raises as `Links.compare` does, but for `Apart`."""
    try:
        links.compare(number, plan, device)
    except Apart as found:
        return found.numbers
    return [number] * links.world_size


def swap(sent: Sequence[Tensor], received: Sequence[Tensor], links: Links) -> None:
    """Send ``sent[r]`` to each other rank r and receive ``received[r]`` from it, all at once; contiguous tensors, of
    which empty ones are left out.
    """

    def messages(tensors: Sequence[Tensor]) -> list[Message]:
        return [(peer, x.view(-1)) for peer, x in enumerate(tensors) if peer != links.rank and x.numel()]

    links.exchange(messages(sent), messages(received)).wait()

"""Ranks as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from cpflex.links.protocol import Apart, Message, Words, Work

Result = TypeVar("Result")


def run_ranks(fn: Callable[[ThreadLinks], Result], world_size: int, *, timeout: float = 300.0) -> list[Result]:
    """Call ``fn(group)`` once per rank, each in its own thread; ``group`` is what `make_plan` takes. The results, by
    rank.

    Autograd runs in the calling thread of each rank, as backward passes of different ranks wait for one another.

    Raises:
        Exception: the first that a rank raised; the others are stopped at their next exchange.
        TimeoutError: a rank waited longer than ``timeout`` seconds for a message.
    """
    board = _Board(world_size, timeout)
    results: list[Any] = [None] * world_size
    failures: list[tuple[int, BaseException]] = []

    def run(rank: int) -> None:
        try:
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = fn(ThreadLinks(rank, world_size, board))
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            failures.append((rank, error))
            board.stop()

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank{rank}", daemon=True) for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = [error for _, error in failures if not isinstance(error, _Stopped)]
    if own:
        raise own[0]
    return results


class _Stopped(ConnectionError):
    """Another rank failed."""


@dataclass
class _Board:
    """Where threads leave messages for one another."""

    world_size: int
    timeout: float
    changed: threading.Condition = field(default_factory=threading.Condition)
    mail: dict[tuple[Any, ...], list[torch.Tensor]] = field(default_factory=dict)
    """Messages by sender, receiver and tag."""
    values: dict[int, dict[int, int]] = field(default_factory=dict)
    words: dict[int, Words] = field(default_factory=dict)
    stopped: bool = False

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def until(self, ready: Callable[[], Any], what: str) -> None:
        """Wait, holding the lock, until ``ready``."""
        if not self.changed.wait_for(lambda: self.stopped or ready(), self.timeout):
            raise TimeoutError(f"{what} did not arrive within {self.timeout:g} s")
        if not ready():
            raise _Stopped(f"{what} will not arrive: another rank failed")


class ThreadLinks:
    """A group of threads as one of them sees it; counts what it sends, gathers and says."""

    def __init__(self, rank: int, world_size: int, board: _Board) -> None:
        self.rank = rank
        self.world_size = world_size
        self.board = board
        self.bytes_sent = 0
        self.num_exchanges = 0
        self.num_gathered = 0
        self.num_waits = 0
        """Comparisons for which it waited before it did anything else."""
        self.num_said = 0
        self.agreed: dict[int, Words] = {}
        self.waits = False
        self.opening_bytes = 0
        self._open: dict[int, int] | None = None
        self._tag = (0, 0)
        """Of messages that follow a comparison: those of another call are not taken for them."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work:
        self.num_exchanges += 1
        with self.board.changed:
            for peer, tensor in sends:
                assert tensor.ndim == 1, "a message is 1-D"
                self.bytes_sent += tensor.numel() * tensor.element_size()
                self.board.mail.setdefault((self.rank, peer, self._tag), []).append(tensor.clone())
            self.board.changed.notify_all()
        return _Delivery(self, receives)

    def compare(
        self,
        number: int,
        plan: str,
        device: torch.device | None = None,
        tell: Callable[[list[int]], None] | None = None,
    ) -> None:
        self.settle()
        self.num_gathered += 1
        with self.board.changed:
            self._open = self.board.values.setdefault(self.num_gathered, {})
            self._open[self.rank] = number
            self.board.changed.notify_all()
        self._tag = self.num_gathered, number
        if tell is None or self.waits:
            self.num_waits += 1
            self.settle()

    def settle(self) -> None:
        numbers, self._open = self._open, None
        if numbers is None:
            return
        with self.board.changed:
            self.board.until(lambda: len(numbers) == self.world_size, "a value of every rank")
            self.board.values.pop(self.num_gathered - 1, None)
        if len(set(numbers.values())) > 1:
            self._tag = self.num_gathered, 0
            raise Apart([numbers[rank] for rank in range(self.world_size)])

    def apart(self) -> list[int] | None:
        return None

    def say(self, number: int, words: Words) -> None:
        self.num_said += 1
        with self.board.changed:
            self.board.words[number] = words
            self.board.changed.notify_all()

    def find(self, numbers: Iterable[int]) -> dict[int, Words]:
        said, wanted = self.board.words, set(numbers)
        with self.board.changed:
            self.board.until(lambda: wanted <= said.keys(), "what another rank is about to compute")
            return {number: said[number] for number in wanted}


class _Delivery:
    def __init__(self, links: ThreadLinks, receives: Sequence[Message]) -> None:
        self.links = links
        self.receives = list(receives)
        self.tag = links._tag

    def wait(self) -> None:
        self.links.settle()
        board = self.links.board
        for peer, buffer in self.receives:
            place = peer, self.links.rank, self.tag
            with board.changed:
                board.until(lambda place=place: place in board.mail, f"a message from rank {peer}")
                message = board.mail[place].pop(0)
                if not board.mail[place]:
                    del board.mail[place]
            if (message.numel(), message.dtype) != (buffer.numel(), buffer.dtype):
                raise RuntimeError(
                    f"rank {self.links.rank} expected {buffer.numel()} x {buffer.dtype} from rank {peer}; "
                    f"got {message.numel()} x {message.dtype}"
                )
            buffer.copy_(message)
        self.receives = []

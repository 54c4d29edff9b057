"""A group of real gloo processes that lives for the whole session and runs functions sent to it."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from another_process import seed
from patience import patience

GLOO_SECONDS = 40


@dataclass
class Outcome:
    """What one rank's call came to."""

    result: Any = None
    error: Exception | None = None
    traceback: str = ""
    seconds: float = 0.0


class RankProcesses:
    """``world_size`` processes in one gloo group.

    After a call that failed, the ranks meet in a new group, so that what was left in flight cannot reach the next
    call; after one that missed its deadline, the processes are replaced.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed", "cpflex", "pytest"])
        self._generation = 0
        self._start()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """``fn(group, *args)`` on every rank; the results, by rank. ``fn`` is a function of a module.

        Raises:
            RuntimeError: a rank raised; the message holds its traceback.
        """
        outcomes = self.outcomes(fn, *args, timeout=timeout)
        for rank, outcome in enumerate(outcomes):
            if outcome.error is not None:
                raise RuntimeError(f"rank {rank} of {self.world_size}:\n{outcome.traceback}") from outcome.error
        return [outcome.result for outcome in outcomes]

    def outcomes(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Outcome]:
        """As `run`, but what each rank returned or raised; TimeoutError for one that gave no answer in time."""
        request = pickle.dumps((fn, args, self._generation))
        for connection in self._connections:
            connection.send_bytes(request)
        deadline = time.monotonic() + patience(timeout)
        outcomes = [self._answer(connection, deadline) for connection in self._connections]
        if any(isinstance(outcome.error, TimeoutError) and not outcome.traceback for outcome in outcomes):
            self.close()
            self._start()
        elif any(outcome.error is not None for outcome in outcomes):
            self._generation += 1
        return outcomes

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cpflex-ranks-")
        self._generation += 1
        pairs = [self._context.Pipe() for _ in range(self.world_size)]
        self._connections = [ours for ours, _ in pairs]
        self._processes = [
            self._context.Process(
                target=_serve, args=(rank, self.world_size, self._folder.name, self._generation, theirs), daemon=True
            )
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def _answer(self, connection: Connection, deadline: float) -> Outcome:
        try:
            if connection.poll(max(0.0, deadline - time.monotonic())):
                return pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return Outcome(error=TimeoutError("the process died"))
        return Outcome(error=TimeoutError("the rank gave no answer in time"))


def _serve(rank: int, world_size: int, folder: str, generation: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # poisons torch.empty with NaN
    joined = _join(rank, world_size, folder, generation)
    while True:
        try:
            fn, args, generation = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        if generation != joined:
            dist.destroy_process_group()
            joined = _join(rank, world_size, folder, generation)
        began = time.monotonic()
        seed(rank, fn, args)
        try:
            outcome = Outcome(result=fn(dist.group.WORLD, *args))
        except Exception as error:  # noqa: BLE001 - handed to the test
            outcome = Outcome(error=_picklable(error), traceback=traceback.format_exc())
        outcome.seconds = time.monotonic() - began
        connection.send_bytes(pickle.dumps(outcome))


def _join(rank: int, world_size: int, folder: str, generation: int) -> int:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/generation{generation}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=patience(GLOO_SECONDS)),
    )
    return generation


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except (TypeError, AttributeError, pickle.PicklingError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error

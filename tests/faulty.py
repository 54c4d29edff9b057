"""Ranks as processes of their own, one of which is killed, stopped or cut off at a chosen moment of a training step."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

import cpflex
from cpflex.ring.handles import resolve
from cpflex.ring.named import named_schedule
from patience import patience

SEQ_LEN = 512
MOMENTS = {
    "before a forward": ("compare", 2, "before"),
    "as forward sends": ("exchange", 1, "before"),
    "while forward's messages are under way": ("exchange", 2, "after"),
    "between forward and backward": ("compare", 3, "before"),
    "as backward sends keys": ("exchange", 4, "before"),
    "while backward's gradients are under way": ("exchange", 6, "after"),
    "after a backward": ("compare", 4, "before"),
}
"""Of a step of four ranks in a ring, or on two levels with two stages: which call on the links, the how manyth of the step's, before it or after.

The first `compare` of the second iteration is its second in all: iteration 1 is without a fault.
"""


@dataclass(frozen=True)
class Fault:
    """What happens to a rank, and when."""

    culprit: int
    happen: Callable[[], None]
    moment: str
    schedule: str = "ring"
    """Or one of two levels: the two ranks of a node, and the two of the other."""


@dataclass
class Ending:
    """How a rank ended."""

    error: str = ""
    """Type and text of what it raised."""
    seconds: float = 0.0
    """Since the fault."""
    exit_code: int | None = None


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stall() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def leave() -> None:
    os._exit(0)


def endings(world_size: int, fault: Fault, timeout: float, join: Callable[[int], None] | None = None) -> list[Ending]:
    """Run the ranks to their end. Every rank trains for three iterations; the fault comes in the second.

    Args:
        timeout: of the group, seconds; a rank that outlives it by ten more fails the test.
        join: done first in each process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "cpflex", "pytest"])
    with tempfile.TemporaryDirectory(prefix="cpflex-faults-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(target=_train, args=(rank, world_size, folder, fault, timeout, join, pipes[rank][1]))
            for rank in range(world_size)
        ]
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()
        try:
            return _collect(processes, [ours for ours, _ in pipes], fault, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(processes: list, connections: list[Connection], fault: Fault, timeout: float) -> list[Ending]:
    found = [Ending() for _ in processes]
    began = time.monotonic()
    while (moment := _moment_of_the_fault(connections[fault.culprit])) is None:
        assert time.monotonic() - began < patience(60), "the fault never came"
        time.sleep(0.01)
    assert isinstance(moment, float), f"the culprit ended before its fault: {moment}"
    deadline = time.monotonic() + timeout + patience(10)
    for rank, process in enumerate(processes):
        if rank == fault.culprit:
            continue
        if connections[rank].poll(max(0.0, deadline - time.monotonic())):
            with contextlib.suppress(EOFError):
                found[rank].error, ended = connections[rank].recv()
                found[rank].seconds = ended - moment
        process.join(max(0.1, deadline - time.monotonic()))
        found[rank].exit_code = process.exitcode
    return found


def _moment_of_the_fault(connection: Connection) -> float | None:
    return connection.recv() if connection.poll(0.01) else None


def _train(
    rank: int,
    world_size: int,
    folder: str,
    fault: Fault,
    timeout: float,
    join: Callable[[int], None] | None,
    connection: Connection,
) -> None:
    torch.set_num_threads(1)
    if join is not None:
        join(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        _three_iterations(rank, fault, connection)
    except Exception as error:  # noqa: BLE001 - reported to the test
        connection.send((f"{type(error).__name__}: {error}", time.monotonic()))
        os._exit(1)  # as a worker of torchrun ends
    connection.send(("", time.monotonic()))


def _three_iterations(rank: int, fault: Fault, connection: Connection) -> None:
    how = {"schedule": named_schedule(fault.schedule), "topology": cpflex.Topology(2, 370.0, 47.0)}
    plan = cpflex.make_plan(cpflex.full(), SEQ_LEN, dist.group.WORLD, layout=cpflex.contiguous, **how)
    links = resolve(plan.handle).links
    q = torch.randn(1, 2, plan.local_len, 16, requires_grad=True)
    for iteration in range(3):
        if iteration == 1 and rank == fault.culprit:
            _arm(links, fault, connection)
        out = cpflex.flex_attention(q, q, q, block_mask=plan)
        assert isinstance(out, torch.Tensor)
        out.sum().backward()


def _arm(links, fault: Fault, connection: Connection) -> None:
    name, nth, place = MOMENTS[fault.moment]
    call, counted = getattr(links, name), iter(range(1 if name == "exchange" else 2, 100))

    def armed(*arguments):
        now = next(counted) == nth
        if now and place == "after":
            call(*arguments)
        if now:
            connection.send(time.monotonic())
            fault.happen()
        return call(*arguments)

    setattr(links, name, armed)


# -- two ranks, each in a network of its own

NAMES = ("cpflex-a", "cpflex-b")


@contextlib.contextmanager
def two_networks() -> Iterator[Callable[[], None]]:
    """Two network namespaces joined by a cable; what it yields cuts the cable."""
    try:
        for name in NAMES:
            _ip("netns", "add", name)
        _ip("link", "add", "cpflex0", "netns", NAMES[0], "type", "veth", "peer", "name", "cpflex1", "netns", NAMES[1])
        for number, name in enumerate(NAMES):
            _ip("-n", name, "address", "add", f"10.99.0.{number + 1}/24", "dev", f"cpflex{number}")
            _ip("-n", name, "link", "set", f"cpflex{number}", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield cut
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def cut() -> None:
    """Done in either network."""
    _ip("-n", NAMES[0], "link", "set", "cpflex0", "down")


def enter(rank: int) -> None:
    """Move this process to the network of its rank."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{NAMES[rank]}") as namespace:
        if libc.setns(namespace.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), "setns")
    os.environ["GLOO_SOCKET_IFNAME"] = f"cpflex{rank}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


# -- the table of docs/reliability.md


def main() -> None:
    """Every fault once: how long the slowest other rank took to end, and what it said."""
    world_size, timeout = 4, 5.0
    print(
        f"| fault ({world_size} gloo ranks, timeout {timeout:g} s) | moment | slowest rank ends after | what it says |"
    )
    print("| --- | --- | --- | --- |")
    names = {die: "killed (SIGKILL)", leave: "exits early", stall: "stopped (SIGSTOP)"}
    for action, name in names.items():
        for moment in MOMENTS:
            culprit = world_size // 2
            found = endings(world_size, Fault(culprit, action, moment), timeout)
            slowest = max((ending for rank, ending in enumerate(found) if rank != culprit), key=lambda e: e.seconds)
            said = slowest.error.split(": [")[0].split(": Timed")[0]
            print(f"| {name} | {moment} | {slowest.seconds:.1f} s | {said} |", flush=True)
    for moment in ("as forward sends", "between forward and backward"):
        with two_networks() as parted:
            (ending, _) = endings(2, Fault(1, parted, moment), timeout, join=enter)
            print(
                f"| network cut, 2 ranks | {moment} | {ending.seconds:.1f} s | {ending.error.split(': [')[0]} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

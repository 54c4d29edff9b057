"""A rank is killed, stopped or leaves while it decodes: every other one ends soon, with an error that names it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

import cpflex
from faulty import die, leave, stall
from patience import patience

TIMEOUT = 5.0
MOMENTS = ["before it meets the others", "between its two messages", "after a step", "while keys travel"]
EVERYONE, QUERIES, KEYS = (cpflex.everyone, None), (cpflex.by_sequence, cpflex.queries), (cpflex.by_token, cpflex.keys)
FAULTS = [
    (die, MOMENTS[0], 4, EVERYONE),
    (die, MOMENTS[1], 2, QUERIES),
    (stall, MOMENTS[0], 2, EVERYONE),
    (die, MOMENTS[3], 2, KEYS),
]
MORE = [
    *(
        (action, moment, 4, form)
        for action in (die, leave, stall)
        for moment in MOMENTS[:3]
        for form in (EVERYONE, QUERIES)
    ),
    *((action, moment, 4, KEYS) for action in (die, leave, stall) for moment in MOMENTS[2:]),
]


def decode_until(rank: int, world_size: int, folder: str, fault: Any, connection: Connection) -> None:
    """Six steps of two sequences; the culprit's fault comes in the third. What the others say is sent home."""
    action, moment, (rows, travel), culprit, timeout = fault
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    pages = cpflex.Pages(32, 4, dist.group.WORLD)
    pool = pages.pool(2, 8)
    for seq in range(world_size):
        pages.reserve(seq, 20)
    plan = cpflex.make_decode_plan(
        cpflex.causal(), pages, dict.fromkeys(range(world_size), 1), rows=rows, travel=travel
    )
    try:
        for step in range(6):
            if step == 2 and rank == culprit:
                arm(pages.links, moment, (rows, travel), action, connection)
            x = torch.randn(1, 2, plan.num_tokens, 8)
            pool.assign(x, x, plan)
            cpflex.flex_attention(x, pool.k, pool.v, block_mask=plan)
            plan.advance()
    except Exception as error:  # noqa: BLE001 - reported to the test
        connection.send((f"{type(error).__name__}: {error}", time.monotonic()))
        os._exit(1)
    connection.send(("", time.monotonic()))


def arm(links: Any, moment: str, form: Any, action: Callable[[], None], connection: Connection) -> None:
    """Let it happen at a call of `exchange`: one a step of `everyone`, else headers, rows, and partials of queries."""
    one_step = {EVERYONE: 1, QUERIES: 3, KEYS: 2}[form]
    exchange, last = links.exchange, dict(zip(MOMENTS, (1, 3, one_step + 1, 2), strict=True))[moment]
    calls = iter(range(1, 100))

    def armed(*arguments):
        if next(calls) == last:
            connection.send(time.monotonic())
            action()
        return exchange(*arguments)

    links.exchange = armed


def endings(
    action: Callable[[], None], moment: str, world_size: int, form: Any, timeout: float
) -> list[tuple[str, float]]:
    """(error, seconds since the fault) of every rank; empty of the culprit."""
    culprit = world_size // 2
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "cpflex", "pytest"])
    with tempfile.TemporaryDirectory(prefix="cpflex-decode-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        fault = action, moment, form, culprit, timeout
        processes = [
            context.Process(target=decode_until, args=(rank, world_size, folder, fault, pipes[rank][1]))
            for rank in range(world_size)
        ]
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()
        try:
            assert pipes[culprit][0].poll(patience(60)), "the fault never came"
            began = pipes[culprit][0].recv()
            assert isinstance(began, float), f"the culprit ended before its fault: {began}"
            found = []
            for rank, (ours, _) in enumerate(pipes):
                said, ended = "", began
                if rank != culprit and ours.poll(timeout + patience(10)):
                    with contextlib.suppress(EOFError):
                        said, ended = ours.recv()
                found.append((said, ended - began))
            return found
        finally:
            for process in processes:
                process.kill()
                process.join()


def name_of(x: Any) -> str:
    return getattr(x, "__name__", str(x)).replace(" ", "_")


@pytest.mark.by_day(3)
@pytest.mark.parametrize(
    ("action", "moment", "world_size", "form"),
    [*FAULTS, *(pytest.param(*fault, marks=pytest.mark.slow) for fault in MORE)],
    ids=lambda x: "_".join(map(name_of, x)) if isinstance(x, tuple) else name_of(x),
)
def test_every_other_rank_ends_with_an_error_that_says_where(action, moment: str, world_size: int, form: Any):
    timeout, culprit = patience(TIMEOUT), world_size // 2
    found = endings(action, moment, world_size, form, timeout)
    where = re.compile(
        r"ConnectionError: group rank \d, attention \d of a decode plan, in its step \d: the message (to|from) group rank \d"
    )
    for rank, (said, seconds) in enumerate(found):
        if rank != culprit:
            assert where.match(said), f"rank {rank}: {said or 'no error'}"
            assert seconds < (timeout if action is stall else 0.0) + patience(5)
    assert any(f"group rank {culprit} failed" in said for said, _ in found), found

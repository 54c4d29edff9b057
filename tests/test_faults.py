"""A rank is killed, stopped, leaves or is cut off: every other one ends soon, with an error that says where and with whom."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess

import pytest

import faulty
from faulty import MOMENTS, Ending, Fault, die, endings, leave, stall
from patience import patience

TIMEOUT = 5.0
BETWEEN_CALLS = ["before a forward", "between forward and backward", "after a backward"]

FAULTS = [(die, moment, 4) for moment in MOMENTS]
FAULTS += [(leave, "before a forward", 4), (stall, "as forward sends", 4)]
FAULTS += [(die, "as forward sends", 4, "relay:2"), (die, "while backward's gradients are under way", 4, "relay:2")]
MORE_FAULTS = [(leave, moment, 4) for moment in list(MOMENTS)[1:]] + [(die, moment, 2) for moment in BETWEEN_CALLS]
MORE_FAULTS += [(stall, "while backward's gradients are under way", 4)]
MORE_FAULTS += [(die, moment, 4, schedule) for moment in list(MOMENTS)[2:5] for schedule in ("relay:2", "striped:2")]
MORE_FAULTS += [(stall, "before a forward", 2), (stall, "between forward and backward", 2)]

WHERE = re.compile(
    r"ConnectionError: (?:before (?:forward|backward), mask kind 'mask'"
    r"|group rank (?P<rank>\d): d?K/d?V of step \d (?:from group ranks \[\d(?:, \d)*\] did not arrive|did not leave)): "
    r"(?:group rank (?P<waiting>\d) waits for the others: "
    r"(?:group ranks \[(?P<missing>\d(?:, \d)*)\] are gone or elsewhere|a connection is lost)"
    r"|the message (?:to|from) group rank (?P<peer>\d) failed)"
)


def check_survivors(found: list[Ending], culprit: int, moment: str, within: float, neighbours: set[int]) -> None:
    """``neighbours``: distances to the ranks that a rank exchanges with."""
    for rank, ending in enumerate(found):
        if rank == culprit:
            continue
        match = WHERE.match(ending.error)
        assert match, f"rank {rank}: {ending.error or 'no error'}"
        assert {match["waiting"], match["rank"]} - {None} == {str(rank)}
        if match["waiting"]:
            assert match["missing"] is None or str(culprit) in match["missing"]
        else:
            assert (int(match["peer"]) - rank) % len(found) in neighbours
        assert ending.exit_code == 1
        assert ending.seconds < within, f"rank {rank} took {ending.seconds:.1f} s"
    # a rank that ended since, for want of the culprit, may be named beside it
    naming = re.compile(rf"group rank {culprit} failed|group ranks \[(?:\d, )*{culprit}(?:, \d)*\] are gone")
    named = [e.error for e in found if naming.search(e.error)]
    assert named, f"nobody names the culprit: {found}"
    if moment in BETWEEN_CALLS:
        assert all("before " in e.error for rank, e in enumerate(found) if rank != culprit)


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value)).replace(" ", "_")


def in_a_ring(fault: tuple) -> tuple:
    """With a schedule, if it says none."""
    return fault if len(fault) == 4 else (*fault, "ring")


@pytest.mark.by_day(6)
@pytest.mark.parametrize(
    ("action", "moment", "world_size", "schedule"),
    [in_a_ring(fault) for fault in FAULTS]
    + [pytest.param(*in_a_ring(fault), marks=pytest.mark.slow) for fault in MORE_FAULTS],
    ids=name_of,
)
def test_every_other_rank_ends_with_an_error_that_says_where(action, moment: str, world_size: int, schedule: str):
    culprit = world_size // 2
    timeout = patience(TIMEOUT)
    found = endings(world_size, Fault(culprit, action, moment, schedule), timeout)
    # a process that dies is noticed at once; one that is stopped only when nothing comes for as long as the group allows
    neighbours = {1, world_size - 1} if schedule == "ring" else {1, 2, 3}
    check_survivors(found, culprit, moment, timeout + patience(5) if action is stall else patience(5), neighbours)


@pytest.mark.by_day(8)
@pytest.mark.parametrize("moment", ["as forward sends", "between forward and backward"])
def test_ranks_that_the_network_parts_end_at_the_timeout(moment: str):
    if os.geteuid() != 0 or not shutil.which("ip") or subprocess.run(["ip", "netns"], check=False).returncode:
        pytest.skip("needs the right to make network namespaces")
    with faulty.two_networks() as cut:
        timeout = patience(TIMEOUT)
        found = endings(2, Fault(1, cut, moment), timeout, join=faulty.enter)
    (ending, _) = found
    assert WHERE.match(ending.error), ending.error
    assert ending.seconds < timeout + patience(5)


def test_no_process_is_left_behind():
    before = children()
    endings(2, Fault(1, die, "as forward sends"), patience(TIMEOUT))
    endings(2, Fault(1, functools.partial(os._exit, 3), "after a backward"), patience(TIMEOUT))
    assert children() - before <= {"forkserver", "resource_tracker"}


def children() -> set[str]:
    """What processes below this one are doing, by the last word of their command line."""
    listed = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True, check=False
    )
    kinds = ("forkserver", "resource_tracker")
    return {
        next((kind for kind in kinds if kind in line), line) for line in listed.stdout.splitlines() if "ps " not in line
    }

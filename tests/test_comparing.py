"""Comparisons over a group and over a grid of ranks: equal numbers, any rank's other one, and those of ranks that are gone."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch.distributed as dist

from cpflex.links.comparing import Comparisons
from cpflex.links.processes import ProcessLinks
from cpflex.links.protocol import Apart, Links, all_gather_number
from cpflex.links.words import gather
from cpflex.testing import run_ranks
from nccl_like import CPU, LikeNccl
from processes import RankProcesses

KINDS = ["hosts", "devices", "devices, whose hosts wait"]


def rows_and_columns(group: dist.ProcessGroup) -> list[dist.ProcessGroup]:
    """Two groups of a 2 x 2 grid, this rank's."""
    made = {ranks: dist.new_group(list(ranks)) for ranks in [(0, 1), (2, 3), (0, 2), (1, 3)]}
    return [made[ranks] for ranks in made if group.rank() in ranks]


def compare(comparisons: Any, number: int, kind: str) -> list[int] | None:
    """Every rank's number if they differ."""
    told: list[list[int]] = []
    tell = told.append if kind == "devices" else None
    try:
        comparisons.compare(number, "a plan", None if kind == "hosts" else CPU, tell)
        comparisons.settle()
    except Apart as found:
        return found.numbers
    if kind == "devices":
        with contextlib.suppress(RuntimeError):  # the device was stopped
            comparisons.known.ledgers[CPU].synchronize()
    return comparisons.apart()


def compare_in_a_grid(group: dist.ProcessGroup, kind: str, strange: int) -> list[list[int] | None]:
    groups = rows_and_columns(group)
    comparisons = Comparisons(groups) if kind == "hosts" else LikeNccl(groups, group, alone=True)
    numbers = [7, 7, -9 if group.rank() == strange else 7]
    return [compare(comparisons, number, kind) for number in numbers]


@pytest.mark.parametrize("strange", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_of_a_grid_hears_of_a_number_that_one_rank_has(
    kind: str, strange: int, four_processes: RankProcesses
):
    """Also those that have neither a row nor a column in common with it, and on devices before any of them stops."""
    numbers = [-9 if rank == strange else 7 for rank in range(4)]
    assert four_processes.run(compare_in_a_grid, kind, strange) == [[None, None, numbers]] * 4


def gather_alone(group: dist.ProcessGroup) -> list[list[int]]:
    return gather(f"alone {group.rank()}", group.rank(), 2, [7], within=0.1)


def test_a_rank_that_does_not_tell_its_number_counts_as_0(two_processes: RankProcesses):
    """Where rank 0, which collects, is the one that is gone, the other knows its own."""
    assert two_processes.run(gather_alone) == [[[7], [0]], [[0], [7]]]


def gather_numbers(links: Links) -> list[list[int]]:
    return [all_gather_number(links, number, "a plan") for number in (5, 5 + links.rank, 6, 6 - links.rank)]


def gather_in_processes(group: dist.ProcessGroup) -> list[list[int]]:
    return gather_numbers(ProcessLinks(group))


def test_numbers_are_gathered_by_rank(two_processes: RankProcesses):
    expected = [[5, 5], [5, 6], [6, 6], [6, 5]]
    assert two_processes.run(gather_in_processes) == run_ranks(gather_numbers, 2) == [expected] * 2

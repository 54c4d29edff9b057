"""The pool of gloo processes that the other tests run on."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from another_process import another_process
from processes import RankProcesses


def sum_of_ranks(group: dist.ProcessGroup, start: int) -> float:
    total = torch.tensor(float(start + group.rank()))
    dist.all_reduce(total, group=group)
    return total.item()


def fail_on_rank(group: dist.ProcessGroup, rank: int) -> str:
    if group.rank() == rank:
        raise KeyError("a mistake")
    return "fine"


def sleep_on_rank(group: dist.ProcessGroup, rank: int) -> None:
    time.sleep(60 if group.rank() == rank else 0)


def draw(group: dist.ProcessGroup | None = None) -> float:
    return torch.rand(()).item()


def is_poisoned(group: dist.ProcessGroup) -> bool:
    return bool(torch.empty(3).isnan().all())


@pytest.mark.parametrize("processes", [2, 4], indirect=True)
def test_a_function_runs_on_every_rank(processes: RankProcesses):
    size = processes.world_size
    assert processes.run(sum_of_ranks, 10) == [10.0 * size + sum(range(size))] * size
    assert processes.run(is_poisoned) == [True] * size


def test_what_is_drawn_at_random_does_not_depend_on_what_ran_before(two_processes: RankProcesses):
    drawn = two_processes.run(draw)
    two_processes.run(is_poisoned)
    assert two_processes.run(draw) == drawn
    assert drawn[0] != drawn[1]
    with another_process() as call:
        assert call(draw) == call(draw)


def test_the_group_is_usable_after_a_rank_failed(two_processes: RankProcesses):
    fine, failed = two_processes.outcomes(fail_on_rank, 1)
    assert fine.result == "fine"
    assert isinstance(failed.error, KeyError)
    with pytest.raises(RuntimeError, match="rank 1 of 2"):
        two_processes.run(fail_on_rank, 1)
    assert two_processes.run(sum_of_ranks, 0) == [1.0, 1.0]


def test_the_group_is_usable_after_a_rank_gave_no_answer(two_processes: RankProcesses):
    fine, late = two_processes.outcomes(sleep_on_rank, 1, timeout=1.0)
    assert fine.error is None
    assert isinstance(late.error, TimeoutError)
    assert two_processes.run(sum_of_ranks, 0) == [1.0, 1.0]


def test_memory_that_nobody_wrote_reads_as_nan():
    assert torch.empty(3).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(2)).isnan().all()

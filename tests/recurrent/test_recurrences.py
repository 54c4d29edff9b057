"""Recurrent layers on 1 to 4 ranks: output and all gradients against the recurrence token by token in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from problems import DOCUMENTS, LAYOUTS, RECURRENCES, Problem, assemble, run_on_rank
from torch.utils.checkpoint import checkpoint

import cpflex
from cases import pairwise, whole_product
from cpflex.testing import run_ranks
from processes import RankProcesses

LENGTHS = (203, 1, 37, 330)
FACTORS = {
    "recurrence": list(RECURRENCES),
    "documents": list(DOCUMENTS),
    "layout": list(LAYOUTS),
    "world_size": [1, 2, 3, 4],
    "seq_len": LENGTHS,
}
SAMPLE = [Problem(**row) for row in pairwise(FACTORS)]
WHOLE = [Problem(**row) for row in whole_product(FACTORS, {})]


def check(problem: Problem) -> None:
    made = assemble(run_ranks(partial(run_on_rank, problem=problem), problem.world_size, timeout=60), problem)
    for name, expected in problem.by_token().items():
        bound = 1e-10 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            made[name], expected, atol=bound, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_ranks_compute_what_one_recurrence_does(problem: Problem):
    check(problem)


@pytest.mark.slow
@pytest.mark.parametrize("problem", WHOLE, ids=str)
def test_every_recurrence_in_every_layout_with_all_documents(problem: Problem):
    check(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_as_exact_as_the_recurrence_in_fp32(recurrence: str, dtype: torch.dtype):
    """16-bit inputs are computed in fp32 too, and rounded once; the budget is that of cutting sums at other places."""
    problem = Problem(recurrence, "rows", "balanced", 3, 203, dtype)
    made = assemble(run_ranks(partial(run_on_rank, problem=problem), 3, timeout=60), problem)
    truth, same = problem.by_token(), problem.by_token(torch.float32)
    for name, expected in truth.items():
        assert made[name].dtype == problem.tensors.get(name, problem.tensors["grad"]).dtype
        scale = expected.abs().max()
        ours, theirs = ((x.double() - expected).abs().max() / scale for x in (made[name], same[name]))
        assert ours <= 4 * theirs + torch.finfo(dtype).eps, f"{name}: {ours} against {theirs}"


@pytest.mark.parametrize("seed", range(4))
def test_any_layout_gives_the_same(seed: int, monkeypatch: pytest.MonkeyPatch):
    """Chunks of any length, dealt out at random."""
    random = torch.Generator().manual_seed(seed)
    chunk_len, world_size = (1, 3, 16, 50)[seed], int(torch.randint(2, 5, (), generator=random))

    def dealt(seq_len: int, world_size: int, work: Any = None) -> cpflex.Layout:
        per_rank = -(-seq_len // (chunk_len * world_size))
        order = torch.randperm(per_rank * world_size, generator=torch.Generator().manual_seed(seed))
        chunks = order.view(world_size, per_rank).sort().values.tolist()
        return cpflex.Layout(seq_len, chunk_len, tuple(map(tuple, chunks)), "dealt")

    monkeypatch.setitem(LAYOUTS, "dealt", dealt)
    for recurrence in RECURRENCES:
        check(Problem(recurrence, "rows", "dealt", world_size, 203))


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_what_is_in_one_document_moves_nothing_in_another(recurrence: str):
    """Bit by bit, forward and backward."""
    before, after = (Problem(recurrence, "packed", "zigzag", 2, 203) for _ in range(2))
    dim, ids = before.parts.dim, before.ids[0]
    changed = (ids == ids[101]).nonzero().squeeze(1)
    others = (ids != ids[101]).nonzero().squeeze(1)
    for name in after.tensors.keys() - {*before.parts.parameters, "g"}:
        after.tensors[name].index_fill_(dim, changed, 1e6)
    first, second = (
        assemble(run_ranks(partial(run_on_rank, problem=problem), 2, timeout=60), problem)
        for problem in (before, after)
    )
    assert not torch.equal(first["out"], second["out"])
    for name in first.keys() - {*before.parts.parameters}:
        assert torch.equal(first[name].index_select(dim, others), second[name].index_select(dim, others)), name


def under_autocast(ours: Callable[..., torch.Tensor], **inputs: Any) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return ours(**inputs)


AROUND = {
    "autocast": under_autocast,
    "checkpoint": partial(checkpoint, use_reentrant=False),
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_whatever_is_around_it_changes_no_bit(recurrence: str, name: str):
    problem = Problem(recurrence, "packed", "zigzag", 2, 37, torch.float32)
    around = partial(AROUND[name], problem.parts.ours)
    plain, wrapped = (run_ranks(partial(run_on_rank, problem=problem, ours=ours), 2) for ours in (None, around))
    for one, other in zip(plain, wrapped, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


GLOO = [
    Problem("gated_delta_rule", "rows", "balanced", seq_len=330),
    Problem("ssd", "padded", "striped", seq_len=330, dtype=torch.float32),
    Problem("causal_conv1d", "rows", "crumbs", seq_len=37),
    Problem("causal_conv1d", "padded", "zigzag", seq_len=203, dtype=torch.bfloat16),
    Problem("decay_by_channel", "one", "contiguous", seq_len=1),
]


@pytest.mark.parametrize("processes", [2, 4], indirect=True)
@pytest.mark.parametrize("problem", GLOO, ids=str)
def test_processes_compute_what_threads_do(problem: Problem, processes: RankProcesses):
    world_size = processes.world_size
    made = assemble(processes.run(run_on_rank, problem), problem)
    expected = assemble(run_ranks(partial(run_on_rank, problem=problem), world_size, timeout=60), problem)
    assert all(torch.equal(made[name], expected[name]) for name in expected)


def run_compiled(group: Any, problem: Problem) -> dict[str, torch.Tensor]:
    """`torch.compile` leaves the exchanges out, whatever it makes of the rest."""
    try:
        return run_on_rank(group, problem, ours=torch.compile(problem.parts.ours, backend="aot_eager"))
    finally:
        torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_in_a_compiled_model_it_is_the_same(recurrence: str, two_processes: RankProcesses):
    problem = Problem(recurrence, dtype=torch.float32)
    made, expected = (assemble(two_processes.run(run, problem), problem) for run in (run_compiled, run_on_rank))
    for name in expected:
        torch.testing.assert_close(made[name], expected[name], rtol=1e-5, atol=1e-4)

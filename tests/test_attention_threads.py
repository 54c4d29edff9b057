"""The zoo of masks and score mods on 1 to 8 ranks as threads: forward, lse and all gradients against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cases import FACTORS, Problem, pairwise, whole_product
from cpflex.testing import run_ranks
from oracle import assert_within_budget
from runs import assemble, attend_on_rank

SAMPLE = [Problem(**row) for row in pairwise(FACTORS)]
MODS = ("mask", "score", "seq_len")
PLANS = ("mask", "layout", "schedule", "world_size")


def product_of(*names: str) -> list[Problem]:
    """Every combination of these factors; the others take turns."""
    rotating = {name: values for name, values in FACTORS.items() if name not in names}
    return [Problem(**row) for row in whole_product({name: FACTORS[name] for name in names}, rotating)]


def check(problem: Problem) -> None:
    results = run_ranks(partial(attend_on_rank, problem=problem), problem.world_size, timeout=60)
    assert_within_budget(assemble(results), problem.dense(torch.float32), problem.dense())


@pytest.mark.by_day(8)
@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_ranks_compute_what_one_dense_attention_does(problem: Problem):
    check(problem)


@pytest.mark.slow
@pytest.mark.parametrize("problem", product_of(*MODS), ids=str)
def test_every_mask_with_every_score_mod_at_every_length(problem: Problem):
    check(problem)


@pytest.mark.slow
@pytest.mark.parametrize("problem", product_of(*PLANS), ids=str)
def test_every_mask_in_every_layout_and_schedule_on_1_to_8_ranks(problem: Problem):
    check(problem)

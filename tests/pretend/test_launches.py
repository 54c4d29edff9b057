"""A training step launches on every chip, whatever tables its mods read: its kernels find the shared memory they need."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import checks
import pytest

import cpflex

Run = Callable[..., Any]

TABLE = list(itertools.product(checks.CAPABILITIES, checks.HEAD_DIMS, checks.NUM_TABLES))


@pytest.mark.by_day(len(TABLE))
@pytest.mark.parametrize("row", TABLE, ids=lambda row: "sm_{}-D{}-{}".format(*row))
def test_a_step_launches_on_its_chip(run: Run, row: tuple[int, int, str]):
    failure = run(checks.launch_failure, *row)
    assert not failure, f"{row}: {failure}"


def test_only_a_new_dtype_head_dim_or_mod_compiles_variants(run: Run):
    found = run(checks.variants)
    names = iter(found)
    expected = found[next(names)]
    assert expected == dict.fromkeys(
        ("attend_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel", "captured_kernel"), 1
    )
    for name in names:
        if name == "ranks":
            # a first or later step, and the last of them; gradients that are added up, in fp32
            expected = expected | {"attend_kernel": 3, "dq_kernel": 2, "dkdv_kernel": 2}
        elif name in ("a dtype", "a head dim", "a head dim of half units", "a mod"):
            others = {"captured_kernel", "delta_kernel"} if name == "a mod" else set()
            new = expected.keys() - others
            expected = expected | {kernel: expected[kernel] + 1 for kernel in new}
        assert found[name] == expected, f"{name}: {found[name]}, not {expected}"


def test_a_row_that_is_too_large_for_its_chip_gives_way_to_a_smaller_one(run: Run):
    run(checks.check_a_smaller_row)


def test_what_no_row_can_hold_is_refused_before_anything_is_sent(run: Run):
    run(checks.check_refusal_before_sending)


CHIPS = list(itertools.product(checks.CAPABILITIES, checks.HEAD_DIMS))


@pytest.mark.by_day(len(CHIPS))
@pytest.mark.parametrize(("capability", "head_dim"), CHIPS)
def test_a_step_of_decoding_launches_on_its_chip(run: Run, capability: int, head_dim: int):
    failure = run(checks.decode_failure, capability, head_dim)
    assert not failure, failure


HEADS = [(4, 2), (6, 2), (3, 1)]
"""Rows of a message are multiples of 16 bytes, of 8, or of 4."""
BEFORE_MESSAGES = [
    (heads, rows, num_sequences)
    for heads in HEADS
    for rows in (cpflex.everyone, cpflex.by_sequence, cpflex.by_head)
    for num_sequences in (1, 2)
    if rows is not cpflex.by_head or heads[0] % 2 == 0
]


@pytest.mark.by_day(5)
@pytest.mark.parametrize(
    ("heads", "rows", "num_sequences"), BEFORE_MESSAGES, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_kernels_of_pages_are_compiled_before_the_first_message(
    run: Run, heads: tuple[int, int], rows: Any, num_sequences: int
):
    run(checks.check_pages_are_prepared, *heads, rows, num_sequences)


@pytest.mark.parametrize("travel", [cpflex.queries, cpflex.keys])
def test_what_travels_meets_kernels_that_were_compiled_before(run: Run, travel: Any):
    run(checks.check_pages_are_prepared, 4, 2, cpflex.by_token, 2, travel)


def test_a_step_of_decoding_waits_for_nothing(run: Run):
    run(checks.check_a_step_copies_nothing_but_its_tables)


def test_a_row_of_decode_that_is_too_large_gives_way_to_a_smaller_one(run: Run):
    run(checks.check_a_smaller_row_of_pages)


def test_pages_that_no_row_can_hold_are_refused_before_anything_is_launched(run: Run):
    run(checks.check_refusal_of_pages_before_sending)

"""A training step launches on every chip, whatever tables its mods read: its kernels find the shared memory they need."""

from __future__ import annotations

import datetime
import itertools
import random
from collections.abc import Callable
from typing import Any

import checks
import pytest

Run = Callable[..., Any]

TABLE = list(itertools.product(checks.CAPABILITIES, checks.HEAD_DIMS, checks.NUM_TABLES))
KNOWN = {
    (80, 64, "mask_and_two_biases"),
    *((86, 64, mods) for mods in ("three_biases", "mask_and_two_biases")),
    *((86, 128, mods) for mods in ("two_biases", "three_biases", "mask_and_two_biases")),
    (90, 128, "mask_and_two_biases"),
    *((100, 128, mods) for mods in ("three_biases", "mask_and_two_biases")),
    *((100, 256, mods) for mods in checks.NUM_TABLES if mods != "none"),
}
"""Steps that ask for more shared memory than their chip has. One that launches must leave this table."""

SEEN = [
    row
    for row in TABLE
    if row[0] == 90 or row in KNOWN - {(86, 128, "mask_and_two_biases"), (100, 256, "mask_and_two_biases")}
]
"""Steps that were compiled once, so that a quick run may draw one."""


def check(run: Run, row: tuple[int, int, str]) -> None:
    failure = run(checks.launch_failure, *row)
    if row in KNOWN:
        assert failure, f"{row} launches now: take it out of KNOWN"
    else:
        assert not failure, f"{row}: {failure}"


def test_todays_sample_launches_on_its_chip(run: Run):
    """Another part of the table every day."""
    for row in random.Random(datetime.date.today().isoformat()).sample(SEEN, 1):
        check(run, row)


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=lambda row: "sm_{}-D{}-{}".format(*row))
def test_a_step_launches_on_its_chip(run: Run, row: tuple[int, int, str]):
    check(run, row)


def test_the_table_of_failures_names_steps_that_are_checked():
    assert set(TABLE) >= KNOWN

"""A sample of the random programs, another every day."""

from __future__ import annotations

import datetime

import pytest

from cpflex.paging import tables
from fuzz_paging import Program, run

SAMPLE = 24


def test_random_programs_equal_dense_tensors():
    first = 10_000 + SAMPLE * (datetime.date.today().toordinal() % 1000)
    report = run(range(first, first + SAMPLE))
    assert not report.failures, f"python tests/fuzz_paging.py --replay SEED, of {report.failures}"
    assert report.done["step"] > 2 * SAMPLE


def test_a_page_that_is_not_read_is_found(monkeypatch: pytest.MonkeyPatch):
    kept = tables.kept_pages

    def without_the_first(*arguments):
        found = kept(*arguments)
        return tables.Kept(*(x[1:] for x in found)) if len(found.page) > 1 else found

    monkeypatch.setattr("cpflex.paging.decode_plan.kept_pages", without_the_first)
    assert run(range(6)).failures


def test_a_program_is_known_by_its_seed():
    assert Program(17) == Program(17) and Program(17).run() == Program(17).run()
    assert {Program(seed).world_size for seed in range(50)} == {1, 2, 3, 4}

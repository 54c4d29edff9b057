"""The recording of interleavings: it goes on after what was recorded of the same source, and names what failed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import interleavings
import pytest
from interleavings import Table

from cases import Problem
from cpflex.kernels import hopper_forward

PROBLEMS = [Problem(mask="nothing", seq_len=n) for n in (1, 2)]


def test_a_recording_goes_on_and_begins_anew_with_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    played: list[tuple[int, int, int]] = []

    def check(problem: Problem, seeds: Sequence[int]) -> None:
        played.append((problem.seq_len, seeds[0], seeds[-1]))
        if problem.seq_len == 2 and 4 in seeds:
            raise AssertionError("seed 4, program 0: a race")

    def record(each: int) -> dict:
        played.clear()
        interleavings.main(["--each", str(each), "--record", str(path)])
        return json.loads(path.read_text())["kernels"]["forward"]

    path = tmp_path / "record.json"
    monkeypatch.setattr(interleavings, "ROUND", 2)
    monkeypatch.setattr(interleavings, "TABLES", {"forward": Table(PROBLEMS, check, hopper_forward)})
    assert record(3)["each"] == 3
    assert played == [(1, 0, 1), (2, 0, 1), (1, 2, 2), (2, 2, 2)]
    found = record(6)
    assert played == [(1, 3, 3), (2, 3, 3), (1, 4, 5), (2, 4, 5)]
    (failure,) = found["failures"]
    assert failure["seeds"] == [4, 6] and "a race" in failure["error"]
    monkeypatch.setattr(interleavings, "source_of", lambda table: "another")
    assert record(2)["failures"] == [] and played == [(1, 0, 1), (2, 0, 1)]


def test_what_is_recorded_of_the_kernels_failed_nowhere():
    if not interleavings.RECORD.exists():
        pytest.skip("python tests/kernels/interleavings.py was not run yet")
    for name, found in json.loads(interleavings.RECORD.read_text())["kernels"].items():
        assert found["failures"] == []
        assert found["problems"].keys() == {str(problem) for problem in interleavings.TABLES[name].problems}

"""The soak: what piles up is found; a short one is clean."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from patience import patience
from soak import GROWTH_BYTES, Count, Plans, parse_options, piled_up

SOAK = Path(__file__).parents[2] / "launch" / "soak.py"
FLAT = [Count(step, 400 << 20, 4, 2, 6, 18, 5) for step in range(40)]


def test_flat_counts_are_no_problem():
    noisy = [replace(one, rss_bytes=one.rss_bytes + (one.step % 3 << 20), handles=4 + one.step % 2) for one in FLAT]
    assert piled_up(noisy) == []
    warmed_up = [replace(one, handles=min(one.step, 4), rss_bytes=min(one.step, 8) << 24) for one in FLAT]
    assert piled_up(warmed_up) == []


@pytest.mark.parametrize("name", ["handles", "score_mods", "plans", "file_descriptors", "threads"])
def test_a_count_that_rises_is_a_problem(name: str):
    rising = [replace(one, **{name: getattr(one, name) + one.step // 10}) for one in FLAT]
    (problem,) = piled_up(rising)
    assert problem.startswith(f"{name} rose from ")


def test_memory_that_rises_is_a_problem():
    rising = [replace(one, rss_bytes=one.rss_bytes + one.step * GROWTH_BYTES // 16) for one in FLAT]
    (problem,) = piled_up(rising)
    assert problem == "memory rose from 414 to 434 MiB"


def test_every_step_has_another_plan_and_every_run_the_same_ones():
    plans = Plans(500, 1, 4)
    fingerprints = [plans[step][1].fingerprint for step in range(20)]
    assert len(set(fingerprints)) == 20
    assert fingerprints == [Plans(500, 2, 4)[step][1].fingerprint for step in range(20)], "ranks agree"


def test_a_soak_that_is_too_short_to_compare_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_options(["--steps", "20"])
    assert "--steps must be at least 200" in capsys.readouterr().err


@pytest.mark.slow
def test_two_hundred_steps_leave_nothing_behind(tmp_path: Path):
    command = [sys.executable, str(SOAK), "--steps", "200", "--ranks", "2", "--out", str(tmp_path / "soak.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(280))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing piled up" in done.stdout
    record = json.loads((tmp_path / "soak.json").read_text())
    assert record["problems"] == []
    assert [len(counts) for counts in record["ranks"]] == [8, 8]

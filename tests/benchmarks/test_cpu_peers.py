"""benchmarks/cpu_peers.py runs: the two peers compute the same, and its record is complete."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from patience import patience

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZE = ["--seq-len", "512", "--repeats", "1", "--masks", "documents"]
SECONDS = 280
"""torch compiles two block masks on each rank: 10 s where nothing else runs, much more beside other tests."""


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("cpu_peers").missing()


@pytest.mark.by_day(6)
def test_the_two_agree_and_every_figure_is_there(tmp_path: Path, absent: str):
    if absent:
        pytest.skip(f"torch's side cannot run without {absent}")
    out = tmp_path / "cpu_peers.json"
    command = [sys.executable, str(BENCHMARKS / "cpu_peers.py"), *SIZE, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(SECONDS), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert max(record["differences"].values()) < 1e-5
    assert [(row["peer"], row["mask"]) for row in record["rows"]] == [("cpflex", "documents"), ("torch", "documents")]
    for row in record["rows"]:
        assert all(row[f"{stage}_s"] > 0 for stage in ("first_plan", "plan", "forward", "backward"))
        assert len(row["peak_mb"]) == 2
    assert set(record["ratios"]) == {"documents"}
    assert record["setting"].startswith("2 gloo ranks, fp32")
    assert "forward" in done.stdout

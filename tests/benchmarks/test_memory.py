"""benchmarks/memory.py runs, ranks share what a step needs, and the table of docs/training.md is what it found."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from patience import patience

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in (ROOT / "launch", BENCHMARKS):
        monkeypatch.syspath_prepend(folder)
    return importlib.import_module("memory")


def test_the_table_is_what_was_measured(memory: ModuleType):
    record = json.loads((BENCHMARKS / "results" / "memory.json").read_text())
    text = (ROOT / "docs" / "training.md").read_text()
    assert memory.table(record["rows"]) in text
    assert f"{memory.activation_bytes(memory.SHAPE):,} bytes" in text
    assert record["setting"] == memory.SETTING


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_two_ranks_need_half_of_one(tmp_path: Path):
    out = tmp_path / "memory.json"
    command = [sys.executable, str(BENCHMARKS / "memory.py"), "--seq-lens", "2048", "--ranks", "1", "2"]
    subprocess.run([*command, "--out", str(out)], check=True, timeout=patience(280), cwd=tmp_path, capture_output=True)
    alone, shared = json.loads(out.read_text())["rows"]
    assert (alone["ranks"], shared["ranks"]) == (1, 2)
    for name in ("plain_mb", "checkpointed_mb"):
        assert 0 < shared[name] < 0.65 * alone[name]
    assert shared["checkpointed_mb"] < 0.6 * shared["plain_mb"]

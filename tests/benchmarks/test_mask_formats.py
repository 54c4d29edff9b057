"""benchmarks/mask_formats.py: every format is read and planned, and nothing that its table settles is left open."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("mask_formats")


def test_every_format_is_measured(benchmark: Any):
    rows = [benchmark.measure(name, 1 << 13, 2) for name in benchmark.FORMATS]
    assert [row["format"] for row in rows] == list(benchmark.FORMATS)
    for row in rows:
        assert row["full_tiles"] + row["partial_tiles"] > 0
        assert min(row["plan_ms"], row["classify_ms"], row["classify_again_ms"]) > 0
        assert row["format"] in benchmark.show(row)
        assert row["unproven_tiles"] == 0 or "eviction" in row["format"]


def test_a_window_is_one_mask_in_two_formats(benchmark: Any):
    """Blocks of a BlockMask and of a BSR matrix, written by hand."""
    tiles = [benchmark.measure(name, 1 << 13, 1) for name in benchmark.FORMATS if "window and sink," in name]
    assert len(tiles) == 2
    assert tiles[0]["full_tiles"] + tiles[0]["partial_tiles"] == tiles[1]["full_tiles"] + tiles[1]["partial_tiles"]

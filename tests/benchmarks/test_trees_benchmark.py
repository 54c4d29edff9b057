"""benchmarks/trees.py: trees of many completions are planned evenly, within the budget, and ranks need little."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from patience import patience

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("trees")


def test_drawn_trees_are_stored_depth_first_and_have_their_tokens(benchmark: Any):
    tree = benchmark.drawn_tree(1 << 14, [3, 2, 4], 1000)
    assert (tree.num_tokens, len(tree.leaves), tree.lengths[0], tree.is_depth_first) == (1 << 14, 24, 1000, True)


@pytest.mark.parametrize(
    ("seq_len", "ranks", "forks", "prompt", "most"),
    [(1 << 17, 8, [64], 1 << 13, 0.085), (1 << 17, 8, [4, 4, 4], 1 << 13, 0.13), (1 << 20, 32, [256], 1 << 15, 0.05)],
    ids=["64 completions on 8 ranks", "64 completions that fork, on 8 ranks", "256 completions on 32 ranks"],
)
def test_completions_of_a_prompt_are_shared_evenly(
    benchmark: Any, seq_len: int, ranks: int, forks: list[int], prompt: int, most: float
):
    """A rank needs little more than the prompt, and work is equal."""
    row = benchmark.measure_planning("tree", seq_len, ranks, forks, prompt)
    assert row["imbalance"] <= 1.05
    assert prompt / seq_len <= row["worst_receive"] <= most
    assert row["classify_ms"] <= patience(50)
    assert row["boundary_tiles"] <= 0.006 * row["all_tiles"]
    assert "completions" in benchmark.show(row)

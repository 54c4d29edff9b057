"""benchmarks/trees.py: trees of many completions are planned evenly, within the budget, and ranks need little; steps
that are compared are the same step.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import cpflex
from patience import patience
from processes import RankProcesses

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


@pytest.fixture
def steps(benchmark: Any) -> Any:
    return importlib.import_module("tree_steps")


def measured(group: Any, length: int, size: int, shared: float) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("tree_steps").measure(length, size, shared, repeats=1)


def test_a_step_on_a_tree_is_compared_with_the_same_step_on_its_completions(two_processes: RankProcesses, steps: Any):
    """`measure` itself compares the losses; counts are those of the masks."""
    row, _ = two_processes.run(measured, 200, 5, 0.6)
    prompt, completions = steps.drawn(200, 5, 0.6)
    assert (len(prompt), len(completions)) == (120, 5)
    assert row["separate_tokens"] == sum(120 + len(completion) for completion in completions)
    assert row["tree_tokens"] == 120 + sum(map(len, completions))
    for name, make in steps.BATCHES.items():
        batch = make(prompt, completions, None)
        seen = cpflex.tree(cpflex.trees.pack([(prompt, completions)]).tree)
        if name == "separate":
            ends = [0]
            for completion in completions:
                ends.append(ends[-1] + 120 + len(completion))
            seen = cpflex.causal() & cpflex.document(cu_seqlens=ends)
        places, zero = torch.arange(batch.tokens), torch.zeros(1, dtype=torch.int64)
        assert batch.pairs == int(seen(zero, zero, places[:, None], places).sum())


def test_the_ideal_is_what_pairs_and_tokens_give(steps: Any):
    row = {"tree_tokens": 50, "separate_tokens": 100, "tree_pairs": 250, "separate_pairs": 1000, "completions": 4}
    row |= {"length": 25, "shared": 0.5, "tree_attention_s": 0.25, "separate_attention_s": 1.0}
    row |= {"separate_model_s": 1.0 * steps.LAYERS + 2.0, "tree_model_s": 0.25 * steps.LAYERS + 1.0}
    judged = steps.judged(row)
    assert (judged["attention_of_ideal"], judged["model_of_ideal"]) == (1.0, pytest.approx(1.0))
    assert steps.judged(row | {"tree_attention_s": 0.5})["attention_of_ideal"] == 0.5
    assert "of the ideal" in steps.show(judged)

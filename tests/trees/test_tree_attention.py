"""Attention on a tree: on any ranks, equal to that of each path alone; nothing leaks between branches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from walks import depth_first, random_tree

import cpflex
from cases import Problem
from cpflex.testing import run_ranks
from cpflex.trees import Tree
from oracle import ScoreFn, assert_within_budget, dense_attention
from runs import TOKEN_TENSORS, assemble, attend_on_rank

TREES = {
    "levels": Tree([-1, 0, 1, 1, 0, 4, 4, 4], [70, 40, 33, 1, 90, 1, 25, 60]),
    "forest": Tree([-1, 0, 0, -1, 3, 3, -1], [50, 60, 1, 1, 80, 90, 38]),
    "not depth first": Tree([-1, -1, 0, 1, 0, 3, 2], [40, 30, 50, 60, 50, 1, 89]),
    "random": depth_first(random_tree(11, most_segments=40, longest=25)),
}


def alibi(slopes: Tensor, positions: Tensor) -> ScoreFn:
    return lambda score, b, h, q, k: score - slopes[h] * (positions[q] - positions[k]).abs()


def relative_bias(table: Tensor, positions: Tensor) -> ScoreFn:
    return lambda score, b, h, q, k: score + table[h, (positions[q] - positions[k]).clamp(-16, 16) + 16]


SCORES: dict[str, tuple[Callable[[Tensor, Tensor], ScoreFn] | None, tuple[int, ...]]] = {
    "none": (None, ()),
    "alibi": (alibi, (4,)),
    "relative bias": (relative_bias, (4, 33)),
}


@dataclass(frozen=True)
class OnTree(Problem):
    """A `Problem` of a tree, with a window and a score_mod by depth."""

    name: str = "levels"
    window: int | None = None
    bias: str = "none"

    @property
    def tree(self) -> Tree:
        return TREES[self.name]

    @property
    def mask_mod(self):
        return cpflex.tree(self.tree, window=self.window)

    def captured(self) -> list[Tensor]:
        _, shape = SCORES[self.bias]
        return [torch.randn(shape, generator=self.random("bias")).requires_grad_()] if shape else []

    def score_mod(self, captured) -> ScoreFn | None:
        make, _ = SCORES[self.bias]
        return None if make is None else make(*captured, self.tree.depths)


CASES = [
    OnTree("tree", bias, TREES[name].num_tokens, "gqa", "d16dv24", "fp32", layout, schedule, ranks, 1, 1, name, window, bias)
    for name, window, bias, ranks, layout, schedule in [
        ("levels", None, "none", 1, "balanced", "auto"),
        ("levels", 20, "alibi", 2, "balanced", "direct"),
        ("levels", None, "relative bias", 4, "zigzag", "ring"),
        ("forest", None, "alibi", 3, "balanced", "auto"),
        ("forest", 7, "none", 2, "striped", "direct"),
        ("not depth first", None, "none", 4, "balanced", "auto"),
        ("not depth first", 30, "relative bias", 2, "contiguous", "even:3"),
        ("random", None, "alibi", 2, "balanced", "direct"),
        ("random", 50, "relative bias", 3, "zigzag", "auto"),
    ]
]  # fmt: skip


@pytest.mark.parametrize("problem", CASES, ids=lambda p: f"{p.name}, window {p.window}, {p.bias}, {p.world_size} ranks")
def test_a_tree_is_each_of_its_paths_alone(problem: OnTree):
    """Plain causal attention in float64 on every path, with windows and biases by position. A gradient at a token of
    several paths is shared among them, and what the paths give its key is summed.
    """
    results = run_ranks(partial(attend_on_rank, problem=problem), problem.world_size, timeout=60)
    found = assemble(results)
    tree, tensors = problem.tree, problem.tensors
    paths = list(tree.paths())
    shared_by = torch.cat(paths).bincount(minlength=tree.num_tokens)
    expected = {name: torch.zeros_like(getattr(found, name), dtype=torch.float64) for name in TOKEN_TENSORS}
    d_captured = [torch.zeros_like(x, dtype=torch.float64) for x in found.d_captured]
    for path in paths:
        alone = {name: x[:, :, path].double() for name, x in tensors.items()}
        alone["grad_out"] = alone["grad_out"] / shared_by[path, None]
        alone["grad_lse"] = alone["grad_lse"] / shared_by[path]
        mask = cpflex.causal() if problem.window is None else cpflex.causal() & cpflex.sliding_window(problem.window)
        make, _ = SCORES[problem.bias]
        by_place = None if make is None else partial(make, positions=torch.arange(len(path)))
        one = dense_attention(**alone, mask_mod=mask, score_mod=by_place, captured=problem.captured())
        for name in ("out", "lse"):
            expected[name][:, :, path] = getattr(one, name)
        for name in ("dq", "dk", "dv"):
            expected[name][:, :, path] += getattr(one, name)
        d_captured = [total + part for total, part in zip(d_captured, one.d_captured, strict=True)]
    for name, tensor in expected.items():
        torch.testing.assert_close(
            getattr(found, name).double(), tensor, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for ours, theirs in zip(found.d_captured, d_captured, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("problem", CASES[1:7:2], ids=lambda p: f"{p.name}, window {p.window}, {p.bias}")
def test_a_tree_on_ranks_is_within_the_budget_of_its_dense_mask(problem: OnTree):
    results = run_ranks(partial(attend_on_rank, problem=problem), problem.world_size, timeout=60)
    make = problem.score_mod
    dense = [
        dense_attention(
            **problem.tensors,
            mask_mod=problem.mask_mod,
            score_mod=None if problem.bias == "none" else lambda *captured: make(captured),  # type: ignore[arg-type]
            captured=problem.captured(),
            precision=precision,
        )
        for precision in (torch.float32, torch.float64)
    ]
    assert_within_budget(assemble(results), *dense)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("window", [None, 20])
def test_nothing_of_a_branch_reaches_its_siblings(window: int | None, ranks: int):
    """Other and huge values in one branch: its siblings, and all that comes before it on its path, keep every bit of
    their results; and siblings keep those of their gradients. What it continues gets other gradients from it.
    """
    tree = TREES["levels"]
    problem = OnTree("tree", "none", tree.num_tokens, "gqa", world_size=ranks, name="levels", window=window)
    branch = tree.segment_ids >= 4
    siblings = (tree.segment_ids >= 1) & (tree.segment_ids <= 3)
    before = assemble(run_ranks(partial(attend_on_rank, problem=problem), ranks, timeout=60)).named()
    for factor in (-2.0, 1e18):
        changed = {name: x.clone() for name, x in problem.tensors.items()}
        for name in changed if factor == -2.0 else "qkv":
            changed[name][:, :, branch] *= factor
        run = partial(attend_on_rank, problem=problem, tensors=changed)
        after = assemble(run_ranks(run, ranks, timeout=60)).named()
        for name in ("out", "lse", "dq"):
            assert torch.equal(before[name][:, :, ~branch], after[name][:, :, ~branch]), f"{name} moved"
        for name in ("dk", "dv"):
            assert torch.equal(before[name][:, :, siblings], after[name][:, :, siblings]), f"{name} moved"
        assert not torch.equal(before["out"][:, :, branch], after["out"][:, :, branch]), "the branch itself moves"
    assert not torch.equal(before["dv"][:, :, :70], after["dv"][:, :, :70]), "and what the branch sees hears of it"

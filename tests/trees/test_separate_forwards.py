"""One tree against a forward for each completion: log-probabilities, loss and every gradient; and nothing leaks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from separate import BATCHES, Batch, forwards, grpo_tokens, ids, mean_of_means
from small_lm import MODELS, on, plan_of, small_lm
from torch import Tensor

import cpflex
from cpflex import trees
from processes import RankProcesses

CLOSE = 1e-6
"""Of log-probabilities and loss, and of the gradient. That of one parameter may be small, and what others have cancel."""

Outcome = tuple[list[Tensor], Tensor, list[Tensor]]
"""(log-probabilities of each completion, loss, gradient of each parameter)"""


def others(batch: Batch, log_probs: list[Tensor], seed: int) -> list[Tensor]:
    """Log-probabilities of another policy."""
    return [p.detach() + noise.to(p.dtype) for p, noise in zip(log_probs, batch.noise(seed), strict=True)]


@cache
def one_by_one(name: str, batch: str, dtype: torch.dtype) -> Outcome:
    model, given = small_lm(name).to(dtype), BATCHES[batch]
    new = forwards(model, given)
    with torch.no_grad():
        exact = forwards(small_lm(name).double(), given)
    old, ref = (others(given, exact, seed) for seed in (2, 3))
    tokens = grpo_tokens(new, *([x.to(dtype) for x in xs] for xs in (old, ref)), given.advantages.to(dtype), beta=0.1)
    loss = mean_of_means(tokens)
    return [p.detach() for p in new], loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def as_a_tree(group: Any, name: str, batch: str, exact: list[Tensor]) -> Outcome:
    """This rank's shares; log-probabilities are of all ranks."""
    given, model = BATCHES[batch], small_lm(name)
    values = {"old": others(given, exact, 2), "ref": others(given, exact, 3)}
    packed = trees.pack(given.groups, weights=given.advantages, values=values)
    plan = plan_of(packed, name, group)
    shard = packed.shard(plan)
    log_probs = shard.log_probs(model(shard.tokens[None], shard.position_ids[None], on(plan)))
    share = trees.policy_loss(
        log_probs, shard, group, old_log_probs=shard.values["old"], ref_log_probs=shard.values["ref"], beta=0.1
    )
    grads = torch.autograd.grad(share, list(model.parameters()))
    return [p.detach() for p in packed.unpack(log_probs, shard, group)], share.detach(), list(grads)


def all_as_trees(group: Any, name: str, exact: dict[str, list[Tensor]]) -> dict[str, Outcome]:
    return {batch: as_a_tree(group, name, batch, exact[batch]) for batch in exact}


def exact_of(name: str, batches: Iterable[str]) -> dict[str, list[Tensor]]:
    return {batch: one_by_one(name, batch, torch.float64)[0] for batch in batches}


def assert_as_one_by_one(ranks: list[dict[str, Outcome]], name: str) -> None:
    for batch in ranks[0]:
        parts = [rank[batch] for rank in ranks]
        share = torch.stack([part[1] for part in parts]).sum()
        grads = [torch.stack(grads).sum(dim=0) for grads in zip(*(part[2] for part in parts), strict=True)]
        for dtype in (torch.float32, torch.float64):
            log_probs, loss, _ = one_by_one(name, batch, dtype)
            for found in (part[0] for part in parts):
                for p, expected in zip(found, log_probs, strict=True):
                    torch.testing.assert_close(p.to(dtype), expected, rtol=CLOSE, atol=CLOSE)
            torch.testing.assert_close(share.to(dtype), loss, rtol=CLOSE, atol=CLOSE)
        exact = one_by_one(name, batch, torch.float64)[2]
        whole = torch.cat([grad.flatten() for grad in exact]).norm()
        errors = [(grad - expected).norm() for grad, expected in zip(grads, exact, strict=True)]
        assert torch.stack(errors).norm() <= CLOSE * whole, batch
        for error, expected in zip(errors, exact, strict=True):
            assert error <= 3 * CLOSE * expected.norm(), batch


@pytest.mark.parametrize("name", MODELS)
def test_a_tree_is_its_completions_one_by_one(name: str):
    assert_as_one_by_one([all_as_trees(None, name, exact_of(name, BATCHES))], name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("processes", [2, 4], indirect=True)
def test_a_tree_over_ranks_is_its_completions_one_by_one(processes: RankProcesses, name: str):
    assert_as_one_by_one(processes.run(all_as_trees, name, exact_of(name, ["all at once"])), name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("processes", [2, 4], indirect=True)
@pytest.mark.by_day(8)
def test_every_tree_over_ranks_is_its_completions_one_by_one(processes: RankProcesses, name: str):
    assert_as_one_by_one(processes.run(all_as_trees, name, exact_of(name, BATCHES)), name)


def test_the_tree_is_shorter_and_held_by_all_ranks():
    """Otherwise the tests above would show little."""
    given = BATCHES["all at once"]
    packed = trees.pack(given.groups)
    assert packed.seq_len < 0.5 * sum(len(p) + len(c) for p, c in given.pairs)
    assert packed.tree.depths.max() > 64
    assert max(len(packed.tree.path(row)) for row in packed.tree.leaves) > 64
    plans = [cpflex.make_plan(cpflex.tree(packed.tree), packed.seq_len, rank=r, world_size=4) for r in range(4)]
    terms = [packed.shard(plan).term_idx for plan in plans]
    assert all(len(idx) for idx in terms)
    assert sorted(torch.cat(terms).tolist()) == list(range(packed.num_terms))


# -- leaks

SEGMENTS = [ids(n, n) for n in (30, 20, 40, 25, 1, 33, 12)]
PARENTS = [-1, 0, 1, 1, 0, 4, -1]
CHANGED = (1, 2, 4)


def logits_of(group: Any, name: str, segments: list[list[int]]) -> Tensor:  # [S, V], whole
    packed = trees.pack_segments(segments, PARENTS)
    plan = plan_of(packed, name, group)
    shard = packed.shard(plan)
    with torch.no_grad():
        return plan.unshard(small_lm(name)(shard.tokens[None], shard.position_ids[None], on(plan))[0], dim=0)


def leaks_to(group: Any, name: str) -> list[tuple[int, int, list[int]]]:
    """(segment in which a token was changed, its place in the sequence, tokens whose logits moved by a bit)"""
    before, found = logits_of(group, name, SEGMENTS), []
    for row in CHANGED:
        segment = SEGMENTS[row]
        at = len(segment) // 2
        changed = [list(part) for part in SEGMENTS]
        changed[row][at] = (segment[at] + 1) % 13
        moved = (logits_of(group, name, changed) != before).any(dim=-1).nonzero()[:, 0].tolist()
        found.append((row, sum(map(len, SEGMENTS[:row])) + at, moved))
    return found


def assert_no_leak(found: list[tuple[int, int, list[int]]]) -> None:
    tree = trees.Tree(PARENTS, [len(part) for part in SEGMENTS])
    for row, at, moved in found:
        after = set(range(at, sum(map(len, SEGMENTS[: row + 1]))))  # of its own segment
        for leaf in tree.leaves:
            path = tree.path(leaf).tolist()
            after |= set(path[path.index(at) :]) if at in path else set()
        assert set(moved) <= after, f"a token of segment {row} moves tokens that do not see it"
        assert at in moved


@pytest.mark.parametrize("name", MODELS)
def test_no_bit_moves_in_the_siblings_of_a_token_that_changes(name: str):
    assert_no_leak(leaks_to(None, name))


@pytest.mark.parametrize("name", ["Gemma", "gpt-oss"])
def test_no_bit_moves_between_processes(two_processes: RankProcesses, name: str):
    for found in two_processes.run(leaks_to, name):
        assert_no_leak(found)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_one_branch_has_no_gradient_in_another(name: str):
    packed = trees.pack_segments(SEGMENTS, PARENTS)
    plan, model = plan_of(packed, name, None), small_lm(name)
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda *call: embedded.append(call[-1]))
    shard = packed.shard(plan)
    log_probs = shard.log_probs(model(shard.tokens[None], shard.position_ids[None], on(plan)))
    for leaf, own in zip(packed.tree.leaves, packed.unpack(log_probs, shard, None), strict=True):
        (grad,) = torch.autograd.grad(own.sum(), embedded[0], retain_graph=True)
        touched = set(grad[0].any(dim=-1).nonzero()[:, 0].tolist())
        assert touched <= set(packed.tree.path(leaf).tolist())
        assert touched

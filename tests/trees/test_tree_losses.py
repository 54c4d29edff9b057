"""Losses over a tree, on ranks, against the published definitions on completions one by one, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from separate import (
    BATCHES,
    Batch,
    Lists,
    advantages_of,
    dpo,
    grpo_tokens,
    gspo,
    ids,
    mean_of_means,
    mean_of_tokens,
    sums_over,
)
from torch import Tensor

import cpflex
from cpflex import trees
from cpflex.loss import shift_labels
from cpflex.testing import run_ranks
from cpflex.trees.packed import TreeShard
from processes import RankProcesses

VOCAB, MAX_LEN = 13, 70
BATCH = BATCHES["all at once"]
PAIRS = Batch([(ids(12, g), [ids(20, g + 1) + ids(5, g), ids(20, g + 1) + ids(9, g + 2)]) for g in (10, 20, 30)])


@dataclass(frozen=True)
class Loss:
    """One loss twice."""

    of_shard: Callable[[Tensor, TreeShard, Any, Tensor, Tensor], Tensor]
    """(log-probabilities, shard, group, old, ref) -> a share"""
    defined: Callable[[Lists, Lists, Lists, Tensor], Tensor]
    """(new, old, ref, advantages) -> the loss; lists of what each completion has at its tokens"""
    batch: Batch = field(default_factory=lambda: BATCH)


def policy(mean: Callable[[Lists], Tensor], ours: trees.losses.Mean, **options: Any) -> Loss:
    names = {"clip": "clip", "dual_clip": "dual", "beta": "beta", "divergence": "kl"}
    plain = {names[name]: getattr(x, "__name__", x) for name, x in options.items()}

    def of_shard(p: Tensor, shard: TreeShard, group: Any, old: Tensor, ref: Tensor) -> Tensor:
        refs = {"ref_log_probs": ref} if options.get("beta") else {}
        return trees.policy_loss(p, shard, group, old_log_probs=old, mean=ours, **refs, **options)

    return Loss(of_shard, lambda new, old, ref, a: mean(grpo_tokens(new, old, ref, a, **plain)))


def sequences(clip: tuple[float, float]) -> Loss:
    return Loss(
        lambda p, shard, group, old, ref: trees.policy_loss(
            p, shard, group, old_log_probs=old, ratios=trees.sequence_ratios, clip=clip
        ),
        lambda new, old, ref, a: gspo(new, old, a, clip),
    )


def preferred(pairs: list[tuple[int, int]], given: Tensor | None, beta: float) -> Loss:
    return Loss(
        lambda p, shard, group, old, ref: trees.dpo_loss(p, shard, group, ref_log_probs=ref, pairs=given, beta=beta),
        lambda new, old, ref, a: dpo(new, ref, pairs, beta),
        PAIRS,
    )


DR_GRPO = trees.over_length(MAX_LEN)
LOSSES = {
    "GRPO": policy(mean_of_means, trees.over_completions()),
    "GRPO, KL k1": policy(mean_of_means, trees.over_completions(), beta=0.04, divergence=trees.k1),
    "GRPO, KL k2": policy(mean_of_means, trees.over_completions(), beta=0.5, divergence=trees.k2),
    "GRPO, KL k3": policy(mean_of_means, trees.over_completions(), beta=0.04, divergence=trees.k3),
    "GRPO, dual clip": policy(mean_of_means, trees.over_completions(), dual_clip=1.3),
    "Dr. GRPO": policy(lambda tokens: sums_over(MAX_LEN, tokens), DR_GRPO),
    "DAPO": policy(mean_of_tokens, trees.over_tokens(), clip=(0.2, 0.28)),
    "DAPO, KL, dual clip": policy(mean_of_tokens, trees.over_tokens(), clip=(0.1, 0.3), beta=0.1, dual_clip=1.5),
    "GSPO": sequences((0.03, 0.04)),
    "GSPO, as published": sequences((3e-4, 4e-4)),
    "cross entropy": Loss(
        lambda p, shard, group, old, ref: trees.cross_entropy(p, shard),
        lambda new, old, ref, a: -torch.cat([w * p for w, p in zip(a, new, strict=True)]).mean(),
    ),
    "DPO": preferred([(0, 1), (2, 3), (4, 5)], None, 0.1),
    "DPO of given pairs": preferred([(1, 0), (5, 2)], torch.tensor([[1, 0], [5, 2]]), 0.3),
}


def logits_for(packed: trees.PackedTree) -> Tensor:  # [S, V]
    return 2 * torch.randn(packed.seq_len, VOCAB, generator=torch.Generator().manual_seed(6))


def of_completions(packed: trees.PackedTree, batch: Batch, logits: Tensor) -> list[Tensor]:
    log_p = logits.log_softmax(dim=-1)
    found = []
    for row, (prompt, completion) in zip(packed.rows.tolist(), batch.pairs, strict=True):
        path = packed.tree.path(row)
        found.append(log_p[path[len(prompt) - 1 : -1], torch.tensor(completion)])
    return found


def defined(loss: Loss) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """(loss, gradient of the logits, old, ref), in fp64."""
    packed = trees.pack(loss.batch.groups)
    leaf = logits_for(packed).double().requires_grad_()
    new = of_completions(packed, loss.batch, leaf)
    old, ref = ([p.detach() + x for p, x in zip(new, loss.batch.noise(seed), strict=True)] for seed in (2, 3))
    whole = loss.defined(new, old, ref, loss.batch.advantages.double())
    return whole.detach(), torch.autograd.grad(whole, leaf)[0], old, ref


def share_on(group: Any, name: str, old: list[Tensor], ref: list[Tensor]) -> dict[str, Tensor]:
    """A rank's share, and its gradient on the tokens of all ranks."""
    batch = LOSSES[name].batch
    packed = trees.pack(batch.groups, weights=batch.advantages, values={"old": old, "ref": ref})
    plan = cpflex.make_plan(cpflex.tree(packed.tree), packed.seq_len, group)
    shard, logits = packed.shard(plan), logits_for(packed).requires_grad_()
    log_probs = shard.log_probs(plan.shard(logits, dim=0, pad_value=0.0))
    share = LOSSES[name].of_shard(log_probs, shard, group, shard.values["old"], shard.values["ref"])
    return {"share": share.detach(), "grad": torch.autograd.grad(share, logits)[0]}


def all_on(group: Any, given: dict[str, tuple[list[Tensor], list[Tensor]]]) -> dict[str, dict[str, Tensor]]:
    return {name: share_on(group, name, *parts) for name, parts in given.items()}


def assert_shares_of(name: str, results: list[dict[str, Tensor]]) -> None:
    loss, grad, _, _ = defined(LOSSES[name])
    torch.testing.assert_close(torch.stack([r["share"] for r in results]).sum().double(), loss, rtol=1e-5, atol=1e-7)
    total = torch.stack([r["grad"] for r in results]).sum(dim=0).double()
    assert (total - grad).norm() <= 2e-6 * grad.norm(), name
    assert grad.any()


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_the_shares_of_all_ranks_sum_to_the_published_loss(name: str, world_size: int):
    old, ref = defined(LOSSES[name])[2:]
    assert_shares_of(name, run_ranks(lambda group: share_on(group, name, old, ref), world_size))


@pytest.mark.parametrize("processes", [2, 4], indirect=True)
def test_processes_share_losses_of_tokens_and_of_completions(processes: RankProcesses):
    names = ("GRPO, KL k3", "GSPO", "DPO")
    results = processes.run(all_on, {name: defined(LOSSES[name])[2:] for name in names})
    for name in names:
        assert_shares_of(name, [found[name] for found in results])


def test_the_losses_differ_and_their_bounds_matter():
    """Otherwise the tests above would show little."""
    values = [float(defined(loss)[0]) for loss in LOSSES.values()]
    assert len({round(x, 5) for x in values}) == len(values)
    packed = trees.pack(BATCH.groups)
    new = of_completions(packed, BATCH, logits_for(packed).double())
    old = [p + x for p, x in zip(new, BATCH.noise(2), strict=True)]
    ratio = torch.cat([(p - q).exp() for p, q in zip(new, old, strict=True)])
    assert min((ratio < 0.8).sum(), (ratio > 1.28).sum(), (ratio > 1.5).sum()) > 3


# -- one rank is enough

ONE = trees.pack(BATCH.groups, weights=BATCH.advantages)
SHARD = ONE.shard(cpflex.make_plan(cpflex.tree(ONE.tree), ONE.seq_len))


def log_probs_of(shard: TreeShard) -> Tensor:
    random = torch.Generator().manual_seed(8)
    return -torch.rand(len(shard.term_idx), generator=random).mul(3).requires_grad_()


def same(a: Tensor, b: Tensor, leaf: Tensor) -> None:
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (a, b)))


def test_without_old_log_probabilities_the_policy_is_the_one_that_sampled():
    p = log_probs_of(SHARD)
    same(trees.policy_loss(p, SHARD), trees.policy_loss(p, SHARD, old_log_probs=p.detach()), p)


@pytest.mark.parametrize("ratios", [trees.token_ratios, trees.sequence_ratios])
def test_advantages_of_each_token_may_be_given(ratios: trees.losses.Ratios):
    p, old = log_probs_of(SHARD), log_probs_of(SHARD).detach() - 0.1
    of_terms = BATCH.advantages[SHARD.completion_ids]
    options: dict[str, Any] = {"old_log_probs": old, "ratios": ratios}
    by_token = trees.policy_loss(p, SHARD, token_advantages=of_terms, **options)
    same(by_token, trees.policy_loss(p, SHARD, advantages=BATCH.advantages, **options), p)


def test_averaged_gradients_are_multiplied_beforehand():
    p = log_probs_of(SHARD)
    for loss in (trees.policy_loss, trees.cross_entropy):
        same(loss(p, SHARD, averaged_over=4), 4 * loss(p, SHARD), p)


@pytest.mark.parametrize("mean", [trees.over_completions, trees.over_tokens])
def test_trees_that_share_a_mean_weigh_as_if_they_were_one(mean: Callable[[int], trees.losses.Mean]):
    parts = [trees.pack(BATCH.groups[:1]), trees.pack(BATCH.groups[1:])]
    count = ONE.num_completions if mean is trees.over_completions else ONE.num_terms
    logits = torch.randn(VOCAB, VOCAB)  # of the token before, whatever comes before that
    shares = []
    for packed in (ONE, *parts):
        shard = packed.shard(cpflex.make_plan(cpflex.tree(packed.tree), packed.seq_len))
        p = shard.log_probs(logits[shard.tokens])
        advantages = torch.arange(ONE.num_completions).float()
        at = 0 if packed is not parts[1] else parts[0].num_completions
        advantages = advantages[at : at + packed.num_completions]
        shares.append(trees.policy_loss(p, shard, advantages=advantages, mean=mean(count)))
    torch.testing.assert_close(shares[0], shares[1] + shares[2])


def test_cross_entropy_is_that_of_the_completions_one_by_one():
    sequences = [prompt + completion for prompt, completion in BATCH.pairs]
    packed = trees.pack_sequences(sequences)
    shard = packed.shard(cpflex.make_plan(cpflex.tree(packed.tree), packed.seq_len))
    logits = torch.randn(VOCAB, VOCAB)
    tokens = torch.cat([torch.tensor(sequence) for sequence in sequences])
    labels = shift_labels(tokens, [0, *torch.tensor([len(s) for s in sequences]).cumsum(0).tolist()])
    expected = F.cross_entropy(logits[tokens], labels)
    torch.testing.assert_close(trees.cross_entropy(shard.log_probs(logits[shard.tokens]), shard), expected)


@pytest.mark.parametrize("scaled", [True, False])
def test_advantages_are_those_of_each_group(scaled: bool):
    rewards = torch.tensor([1.0, 0.0, 0.5, 3.0, 2.0, 2.0, 0.0, 7.0])
    group_ids = torch.tensor([5, 5, 1, 5, 1, 9, 1, 4])
    found = trees.group_advantages(rewards, group_ids, scaled=scaled)
    torch.testing.assert_close(found, advantages_of(rewards, [[0, 1, 3], [2, 4, 6], [5], [7]], scaled))
    assert found[5] == found[7] == 0


def test_an_estimate_of_a_divergence_is_what_its_definition_says():
    random = torch.Generator().manual_seed(0)
    p, ref = (torch.randn(1000, 7, generator=random).double().log_softmax(-1) for _ in range(2))
    ratio = (ref - p).exp()
    exact = (p.exp() * (p - ref)).sum(-1)
    for k, definition in (
        (trees.k1, -ratio.log()),
        (trees.k2, ratio.log() ** 2 / 2),
        (trees.k3, ratio - 1 - ratio.log()),
    ):
        torch.testing.assert_close(k(p, ref), definition)
    for k in (trees.k1, trees.k3):  # unbiased
        torch.testing.assert_close((p.exp() * k(p, ref)).sum(-1), exact)
    assert (trees.k3(p, ref) >= 0).all()


P = torch.zeros(len(SHARD.term_idx))
HALF = trees.pack(BATCH.groups).shard(cpflex.make_plan(cpflex.tree(ONE.tree), ONE.seq_len, rank=0, world_size=2))
HALF_P = torch.zeros(len(HALF.term_idx))
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "terms of others": (lambda: trees.policy_loss(P[1:], SHARD), "log_probs must have a number for each"),
    "old ones of others": (lambda: trees.policy_loss(P, SHARD, old_log_probs=P[1:]), "old_log_probs must have"),
    "a reference of others": (lambda: trees.policy_loss(P, SHARD, ref_log_probs=P[1:], beta=1.0), "ref_log_probs must"),
    "beta alone": (lambda: trees.policy_loss(P, SHARD, beta=0.1), "beta and ref_log_probs go together"),
    "a reference alone": (lambda: trees.policy_loss(P, SHARD, ref_log_probs=P), "beta and ref_log_probs go together"),
    "advantages of others": (lambda: trees.policy_loss(P, SHARD, advantages=torch.ones(3)), "each of 14 completions"),
    "advantages of terms as of completions": (lambda: trees.policy_loss(P, SHARD, advantages=P), "of 14 completions"),
    "both advantages": (lambda: trees.policy_loss(P, SHARD, advantages=P, token_advantages=P), "not both"),
    "a clip that is none": (lambda: trees.policy_loss(P, SHARD, clip=(1.2, 0.2)), "clip must be"),
    "a dual clip below the clip": (lambda: trees.policy_loss(P, SHARD, dual_clip=1.2), "dual_clip must be above"),
    "sequences without a group": (
        lambda: trees.policy_loss(HALF_P, HALF, ratios=trees.sequence_ratios),
        "sharded over 2 ranks, and the group has 1",
    ),
    "pairs without a group": (
        lambda: trees.dpo_loss(HALF_P, HALF, ref_log_probs=HALF_P, pairs=torch.tensor([[0, 1]])),
        "sharded over 2 ranks, and the group has 1",
    ),
    "groups that are no pairs": (lambda: trees.dpo_loss(P, SHARD, ref_log_probs=P), "two completions each"),
    "pairs of others": (
        lambda: trees.dpo_loss(P, SHARD, ref_log_probs=P, pairs=torch.tensor([[0, 16]])),
        "completions 0 .. 13",
    ),
    "rewards of others": (lambda: trees.group_advantages(torch.ones(2), torch.zeros(3).long()), "one for each"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fits_no_loss_is_refused(name: str):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()

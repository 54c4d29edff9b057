"""Losses over the completions of a tree: each rank's share of one number, equal to that of separate completions.

A rank has the log-probabilities of its own terms, and knows of all completions how long they are and what they weigh.
So a loss that is a sum over tokens needs no message; where whole completions enter, a number for each is summed over
the ranks. The shares of all ranks sum to the loss, and their gradients to its gradient.

>>> log_probs = shard.log_probs(model(shard.tokens, shard.position_ids, plan))
>>> advantages = group_advantages(rewards, packed.group_ids)
>>> old = shard.values["old_log_probs"]
>>> share = policy_loss(log_probs, shard, mesh["cp"], advantages=advantages, old_log_probs=old)
>>> (share * mesh["cp"].size()).backward()                                     # DDP and FSDP average

What the published variants are in these words:

    GRPO       scaled advantages, clip (0.2, 0.2), mean over_completions(), beta 0.04 with k3
    Dr. GRPO   group_advantages(scaled=False), mean over_length(most tokens of a completion), beta 0
    DAPO       scaled advantages, clip (0.2, 0.28), mean over_tokens(), beta 0
    GSPO       scaled advantages, ratios sequence_ratios, clip (3e-4, 4e-4), mean over_completions(), beta 0
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cpflex.links.processes import Group
from cpflex.loss import sum_over_ranks
from cpflex.trees.packed import TreeShard

# C completions, N_local terms of this rank: its learned tokens, one for each completion that has them

Mean = Callable[[TreeShard], Tensor]
"""What one term of each completion counts for, floating [C]."""

Ratios = Callable[[Tensor, TreeShard, Group | None], Tensor]
"""From the log of each term's probability ratio, [N_local], to the log of the ratio that is clipped."""

Divergence = Callable[[Tensor, Tensor], Tensor]
"""From log-probabilities of policy and reference to an estimate at each term."""


def over_completions(num_completions: int | None = None) -> Mean:
    """The mean over the tokens of each completion, and then over completions: 1/G and 1/|o_i| of GRPO (DeepSeekMath,
    arXiv:2402.03300, equation 3).

    Args:
        num_completions: of all trees that the mean is over; those of this one if None.
    """
    return lambda shard: 1 / (shard.lengths.clamp(min=1) * (num_completions or shard.num_completions))


def over_tokens(num_tokens: int | None = None) -> Mean:
    """The mean over all tokens of all completions, in which long completions count for more: DAPO (arXiv:2503.14476,
    section 3.3).

    Args:
        num_tokens: learned tokens of all trees that the mean is over; those of this one if None.
    """
    return lambda shard: torch.ones_like(shard.weights) / (num_tokens or shard.lengths.sum().clamp(min=1))


def over_length(max_len: int, num_completions: int | None = None) -> Mean:
    """The sum over the tokens of each completion divided by a constant, and the mean over completions: Dr. GRPO
    (arXiv:2503.20783, section 3.2), whose constant is the most tokens that a completion may have.
    """
    return lambda shard: torch.ones_like(shard.weights) / (max_len * (num_completions or shard.num_completions))


def token_ratios(log_ratios: Tensor, shard: TreeShard, group: Group | None) -> Tensor:
    """Each token's own ratio, as in PPO and GRPO."""
    return log_ratios


def sequence_ratios(log_ratios: Tensor, shard: TreeShard, group: Group | None) -> Tensor:
    """The geometric mean over the tokens of each completion: GSPO (arXiv:2507.18071, section 4.1), in the form whose
    gradient is of each token by itself (GSPO-token, section 4.3), which is the same gradient. One exchange, of a number
    for each completion.
    """
    shard.check_group(group)
    sums = log_ratios.new_zeros(shard.num_completions).index_add(0, shard.completion_ids, log_ratios.detach())
    means = sum_over_ranks(sums, group) / shard.lengths.clamp(min=1)
    return means[shard.completion_ids] + (log_ratios - log_ratios.detach())


def k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """log p - log p_ref: unbiased, of either sign (Schulman, Approximating KL Divergence, 2020)."""
    return log_probs - ref_log_probs


def k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Half the square of the log-ratio: biased, of little variance (Schulman 2020)."""
    return (log_probs - ref_log_probs).square() / 2


def k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """p_ref / p - log(p_ref / p) - 1: unbiased and never below 0 (Schulman 2020); GRPO's (arXiv:2402.03300,
    equation 4).
    """
    log_ratio = ref_log_probs - log_probs
    return log_ratio.expm1() - log_ratio


def group_advantages(
    rewards: Tensor,  # floating [C]
    group_ids: Tensor,  # int64 [C]
    *,
    scaled: bool = True,
    eps: float = 1e-4,
) -> Tensor:  # [C]
    """Rewards less the mean of their group, and divided by its standard deviation plus ``eps`` if ``scaled``.

    Scaled as of GRPO (arXiv:2402.03300, section 4.1.2), with the deviation of a sample, n - 1; not scaled as of Dr.
    GRPO (arXiv:2503.20783, section 3.2). A group of one has advantage 0.
    """
    if rewards.shape != group_ids.shape or rewards.ndim != 1:
        raise ValueError(
            f"rewards and group_ids must be [C], one for each completion; got {tuple(rewards.shape)} and "
            f"{tuple(group_ids.shape)}"
        )
    groups, of = group_ids.to(rewards.device).unique(return_inverse=True)
    counts = of.bincount(minlength=len(groups))

    def sums(x: Tensor) -> Tensor:
        return x.new_zeros(len(groups)).index_add(0, of, x)

    centered = rewards - (sums(rewards) / counts)[of]
    if not scaled:
        return centered
    deviation = (sums(centered.square()) / (counts - 1).clamp(min=1)).sqrt()
    return centered / (deviation + eps)[of]


def cross_entropy(
    log_probs: Tensor,  # [N_local]
    shard: TreeShard,
    *,
    mean: Mean | None = None,
    averaged_over: int = 1,
) -> Tensor:  # []
    """This rank's share of the mean of ``-weight * log_prob``, over all terms if ``mean`` is None: what
    `cpflex.loss.cross_entropy` is for the completions one by one, where all weights are 1. Nothing is exchanged.
    """
    shard.check_terms(log_probs, "log_probs")
    weights = shard.weights * (mean or over_tokens())(shard)
    return -(weights[shard.completion_ids] * log_probs).sum() * averaged_over


def policy_loss(
    log_probs: Tensor,  # [N_local], with a graph
    shard: TreeShard,
    group: Group | None = None,
    *,
    advantages: Tensor | None = None,  # floating [C]
    token_advantages: Tensor | None = None,  # floating [N_local]
    old_log_probs: Tensor | None = None,  # [N_local]
    ref_log_probs: Tensor | None = None,  # [N_local]
    ratios: Ratios = token_ratios,
    clip: tuple[float, float] | None = (0.2, 0.2),
    dual_clip: float | None = None,
    beta: float = 0.0,
    divergence: Divergence = k3,
    mean: Mean | None = None,
    averaged_over: int = 1,
) -> Tensor:  # []
    """This rank's share of a clipped policy-gradient loss: of each term

        -min(ratio * A, clamp(ratio, 1 - low, 1 + high) * A) + beta * divergence

    (PPO, arXiv:1707.06347, equation 7; GRPO, arXiv:2402.03300, equation 3), and of these the ``mean``.

    Args:
        log_probs: from `TreeShard.log_probs`; divided by the temperature of the sampling, if it had one.
        group: ranks of the sequence; only `sequence_ratios` need it.
        advantages: of each completion; ``shard.weights`` if None.
        token_advantages: instead of these, of each term.
        old_log_probs: under the policy that sampled, without a graph. If None, that is the policy itself: all ratios
            are 1, with the gradient of a ratio.
        ref_log_probs: of the reference, for ``beta``.
        ratios: `token_ratios` or `sequence_ratios`.
        clip: (low, high), alike in GRPO, and with a higher high in DAPO (arXiv:2503.14476, section 3.1). None: not at
            all.
        dual_clip: ratios of a negative advantage count as this much at most, above 1 + high (Dual-clip PPO,
            arXiv:1912.09729; two-sided clipping of INTELLECT-2, arXiv:2505.07291). None: unbounded.
        beta: what the divergence from the reference weighs.
        divergence: `k3`, `k2` or `k1`.
        mean: `over_completions`, of this tree, if None; or `over_tokens`, `over_length`.
        averaged_over: size of the group over which gradients will be averaged; 1 if they will be summed.

    Raises:
        ValueError: numbers of other terms or completions; ``beta`` without a reference, or a reference without; both
            kinds of advantages; bounds that are none.
    """
    _check_options(clip, dual_clip, beta, ref_log_probs)
    old = log_probs.detach() if old_log_probs is None else old_log_probs.detach().to(log_probs.dtype)
    for name, x in (("log_probs", log_probs), ("old_log_probs", old), ("ref_log_probs", ref_log_probs)):
        if x is not None:
            shard.check_terms(x, name)
    weights = _advantages(shard, advantages, token_advantages).to(log_probs.dtype)
    ratio = ratios(log_probs - old, shard, group).exp()
    gains = ratio * weights
    if clip is not None:
        gains = torch.minimum(gains, ratio.clamp(1 - clip[0], 1 + clip[1]) * weights)
    if dual_clip is not None:
        gains = torch.where(weights < 0, torch.maximum(gains, dual_clip * weights), gains)
    losses = -gains
    if ref_log_probs is not None:
        losses = losses + beta * divergence(log_probs, ref_log_probs.detach())
    counts_for = (mean or over_completions())(shard)
    return (losses * counts_for[shard.completion_ids]).sum() * averaged_over


def _check_options(
    clip: tuple[float, float] | None, dual_clip: float | None, beta: float, ref_log_probs: Tensor | None
) -> None:
    if clip is not None and not (0 <= clip[0] <= 1 and clip[1] >= 0):
        raise ValueError(f"clip must be (low, high), low from 0 to 1 and high from 0; got {clip}")
    if dual_clip is not None and not dual_clip > 1 + (clip[1] if clip else 0):
        raise ValueError(f"dual_clip must be above 1 + high of clip={clip}; got {dual_clip}")
    if (beta != 0) != (ref_log_probs is not None):
        got = "no ref_log_probs" if ref_log_probs is None else "ref_log_probs"
        raise ValueError(f"beta and ref_log_probs go together; got beta={beta} and {got}")


def _advantages(shard: TreeShard, of_completions: Tensor | None, of_terms: Tensor | None) -> Tensor:
    """[N_local]"""
    if of_terms is not None:
        if of_completions is not None:
            raise ValueError("pass advantages of completions or token_advantages, not both")
        shard.check_terms(of_terms, "token_advantages")
        return of_terms.detach()
    found = shard.weights if of_completions is None else of_completions.detach().to(shard.weights.device)
    if found.shape != shard.lengths.shape:
        raise ValueError(
            f"advantages must have one for each of {shard.num_completions} completions; got {tuple(found.shape)}"
        )
    return found[shard.completion_ids]


def dpo_loss(
    log_probs: Tensor,  # [N_local], with a graph
    shard: TreeShard,
    group: Group | None = None,
    *,
    ref_log_probs: Tensor,  # [N_local]
    pairs: Tensor | None = None,  # int64 [pairs, 2]
    beta: float = 0.1,
    num_pairs: int | None = None,
    averaged_over: int = 1,
) -> Tensor:  # []
    """This rank's share of the mean over pairs of ``-log sigmoid(beta * (margin of chosen - margin of rejected))``; a
    margin is the log-probability of a whole completion less that under the reference: DPO (arXiv:2305.18290, equation
    7), over a tree of ``(prompt, [chosen, rejected])``. One exchange, of a number for each completion.

    Args:
        log_probs, ref_log_probs: from `TreeShard.log_probs`.
        group: ranks of the sequence.
        pairs: (chosen, rejected) by number of completion; the two of each group in their order if None.
        num_pairs: of all trees that the mean is over; those of this one if None.
        averaged_over: size of the group over which gradients will be averaged; 1 if they will be summed.

    Raises:
        ValueError: numbers of other terms, or groups that are no pairs.
    """
    shard.check_terms(log_probs, "log_probs")
    shard.check_terms(ref_log_probs, "ref_log_probs")
    shard.check_group(group)
    pairs = _pairs(shard.group_ids) if pairs is None else pairs.to(shard.group_ids.device)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or ((pairs < 0) | (pairs >= shard.num_completions)).any():
        raise ValueError(
            f"pairs must be [pairs, 2], completions 0 .. {shard.num_completions - 1}; got {tuple(pairs.shape)} {pairs}"
        )
    margins = log_probs.new_zeros(shard.num_completions)
    margins = sum_over_ranks(
        margins.index_add(0, shard.completion_ids, log_probs - ref_log_probs.detach().to(log_probs.dtype)), group
    )
    chosen, rejected = margins[pairs[:, 0]], margins[pairs[:, 1]]
    losses = -F.logsigmoid(beta * (chosen - rejected))
    whole = losses.sum() * averaged_over / (num_pairs or max(1, len(pairs)))
    # the value is shared out; the gradient of what is the same on all ranks goes to each rank's own terms as it is
    return whole - whole.detach() * (1 - 1 / shard.world_size)


def _pairs(group_ids: Tensor) -> Tensor:
    """The two completions of each group, int64 [groups, 2]."""
    order = group_ids.argsort(stable=True)
    if len(order) % 2 or (group_ids.unique(return_counts=True)[1] != 2).any():
        raise ValueError("groups must be of two completions each, chosen and rejected; pass pairs=... for others")
    return order.view(-1, 2)

"""A tree of completions through a model of transformers, and its sequences one by one through eager attention."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from families import InDouble, LossAndGradients, attach
from family_configs import VOCAB, model_of
from torch import Tensor

from cpflex import trees
from cpflex.integrations.transformers import plan_for, shard_batch


def ids(length: int, seed: int) -> list[int]:
    """None of them special."""
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


THOUGHT = ids(27, 1)
GROUPS = [
    (ids(11, 0), [THOUGHT + ids(21, 2), THOUGHT + ids(4, 3), THOUGHT[:5], list(THOUGHT), THOUGHT[:1] + ids(1, 4)]),
    (ids(5, 5), [ids(33, 6), ids(33, 6), ids(1, 7)]),
]
"""(prompt, completions): longer than windows and chunks, with several levels, equal ones and some that begin others."""
PAIRS = [(prompt, completion) for prompt, completions in GROUPS for completion in completions]


def weights() -> list[Tensor]:
    """Of each token of each completion."""
    random = torch.Generator().manual_seed(8)
    return [torch.randn(len(completion), generator=random) for _, completion in PAIRS]


def one_by_one(model_type: str, in_double: bool = False) -> LossAndGradients:
    """A forward for each completion, without cpflex: the weighted sum of log-probabilities, its gradients, and under
    ``log_probs`` what was summed.
    """
    total, found = 0.0, []
    with InDouble() if in_double else contextlib.nullcontext():
        model = model_of(model_type, "eager")
        model = model.double() if in_double else model
        for (prompt, completion), weight in zip(PAIRS, weights(), strict=True):
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
            predicting = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
            log_probs = predicting.gather(1, torch.tensor(completion)[:, None])[:, 0]
            weighted = (log_probs * weight).sum()
            weighted.backward()
            total += float(weighted.detach())
            found.append(log_probs.detach())
    return total, gradients(model) | {"log_probs": torch.cat(found)}


def as_a_tree(group: Any, model_type: str) -> LossAndGradients:
    """This rank's share of the same."""
    packed = trees.pack(GROUPS, values={"weights": weights()})
    model = model_of(model_type, "cpflex")
    attach(model)
    plan = plan_for(model.config, group, tree=packed.tree)
    logits = model(**shard_batch({"input_ids": packed.tokens[None]}, plan, model)).logits
    shard = packed.shard(plan.plan)
    log_probs = shard.log_probs(logits)
    share = (log_probs * shard.values["weights"]).sum() + 0.0 * logits.sum()  # a rank may have no term
    share.backward()
    mine = torch.zeros(packed.num_terms).index_copy(0, shard.term_idx, log_probs.detach())
    return float(share.detach()), gradients(model) | {"log_probs": mine}


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

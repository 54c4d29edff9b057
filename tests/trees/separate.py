"""The same completions one by one: a forward for each, and the published losses from their definitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from small_lm import VOCAB, SmallLM, dense
from torch import Tensor

# C completions

Groups = list[tuple[list[int], list[list[int]]]]
"""(prompt, completions)"""


@dataclass(frozen=True)
class Batch:
    """Groups with numbers for each completion and each of its tokens; the same on every rank."""

    groups: Groups

    @cached_property
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        return [(prompt, completion) for prompt, completions in self.groups for completion in completions]

    @cached_property
    def advantages(self) -> Tensor:
        return torch.randn(len(self.pairs), generator=torch.Generator().manual_seed(1))

    def noise(self, seed: int) -> list[Tensor]:
        """Of each completion, [its tokens], fp32: what other policies differ by."""
        random = torch.Generator().manual_seed(seed)
        return [0.3 * torch.randn(len(completion), generator=random) for _, completion in self.pairs]


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def all_at_once() -> Groups:
    """Several levels, instructions that prompts share, equal completions, prefixes of others, single tokens."""
    instructions, thought = ids(23, 0), ids(30, 1)
    first = [thought + ids(n, n) for n in (40, 3, 17)]
    first += [thought, thought[:1], list(first[0]), ids(60, 5), ids(1, 6)]
    second = [ids(9, 7) + ids(n, n) for n in (8, 1, 25)]
    return [(instructions + ids(11, 9), first), (instructions + ids(6, 10), second), ([3], [[4], [5, 6], ids(50, 11)])]


BATCHES = {
    "one level": Batch([(ids(20, 0), [ids(n, n) for n in (12, 7, 30, 9)])]),
    "several levels": Batch([(ids(9, 0), [ids(a, a) + ids(b, 50 + b) for a in (4, 12) for b in (6, 17, 3)])]),
    "identical completions": Batch([(ids(9, 0), [ids(10, 1)] * 3 + [ids(5, 2)] * 2), (ids(9, 0), [ids(10, 1)])]),
    "a prefix of another": Batch([(ids(9, 0), [ids(20, 1), ids(20, 1)[:7], ids(20, 1)[:1], ids(20, 1)[:19]])]),
    "one-token segments": Batch([([1], [[2], [3], [4, 5], [4, 6], [4, 5, 7], [4, 5, 8]]), ([2], [[2], [2, 2]])]),
    "all at once": Batch(all_at_once()),
}


def forwards(model: SmallLM, batch: Batch) -> list[Tensor]:
    """Log-probabilities of each completion, from a forward of its own."""
    found = []
    for prompt, completion in batch.pairs:
        tokens = torch.tensor([prompt + completion])
        logits = model(tokens, torch.arange(tokens.shape[1])[None], dense)[0]
        rows = torch.arange(len(prompt) - 1, tokens.shape[1] - 1)
        found.append(logits.log_softmax(dim=-1)[rows, torch.tensor(completion)])
    return found


# -- losses, from lists of what each completion has at its tokens

Lists = Sequence[Tensor]


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    """PPO's, to be minimized; of any shape."""
    inside = ratio.clamp(1 - low, 1 + high)
    gain = torch.where(ratio * advantage < inside * advantage, ratio * advantage, inside * advantage)
    if dual is not None:
        gain = torch.where((advantage < 0) & (gain < dual * advantage), dual * advantage, gain)
    return -gain


KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": lambda p, ref: p - ref,
    "k2": lambda p, ref: (p - ref) ** 2 / 2,
    "k3": lambda p, ref: (ref - p).exp() - (ref - p) - 1,
}


def grpo_tokens(
    new: Lists,
    old: Lists,
    ref: Lists,
    advantages: Tensor,
    clip: tuple[float, float] = (0.2, 0.2),
    dual: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
) -> list[Tensor]:
    """Of each completion, [its tokens]."""
    return [
        clipped((p - q).exp(), a, *clip, dual) + beta * KL[kl](p, r)
        for p, q, r, a in zip(new, old, ref, advantages, strict=True)
    ]


def mean_of_means(tokens: Lists) -> Tensor:
    """GRPO: over the tokens of each completion, then over completions."""
    return torch.stack([part.mean() for part in tokens]).mean()


def mean_of_tokens(tokens: Lists) -> Tensor:
    """DAPO."""
    return torch.cat(list(tokens)).mean()


def sums_over(max_len: int, tokens: Lists) -> Tensor:
    """Dr. GRPO."""
    return torch.stack([part.sum() / max_len for part in tokens]).mean()


def gspo(new: Lists, old: Lists, advantages: Tensor, clip: tuple[float, float]) -> Tensor:
    """One ratio for each completion, whose gradient is not of one token at a time."""
    ratios = torch.stack([(p - q).mean().exp() for p, q in zip(new, old, strict=True)])
    return clipped(ratios, advantages, *clip).mean()


def dpo(new: Lists, ref: Lists, pairs: Sequence[tuple[int, int]], beta: float) -> Tensor:
    margins = [p.sum() - r.sum() for p, r in zip(new, ref, strict=True)]
    return torch.stack([-F.logsigmoid(beta * (margins[c] - margins[r])) for c, r in pairs]).mean()


def advantages_of(rewards: Tensor, groups: Sequence[Sequence[int]], scaled: bool) -> Tensor:
    """Group by group."""
    found = torch.empty_like(rewards)
    for members in groups:
        mine = rewards[list(members)]
        found[list(members)] = mine - mine.mean()
        if scaled:
            found[list(members)] /= (mine.std() if len(mine) > 1 else 0.0) + 1e-4
    return found

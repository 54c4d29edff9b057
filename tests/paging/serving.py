"""A rank's pages and pools beside the same sequences as dense tensors, which say what every attention must give."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

import cpflex

# H heads of keys, Hq query heads, L tokens of a sequence, n new ones

ALL_HEADS = 4
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
LONGEST = 160
DOCUMENTS = torch.tensor([0] * 13 + [1] * 30 + [2] * 5 + [3] * 40 + [4] * (LONGEST - 88))
BIASES = torch.linspace(-1, 1, 2 * LONGEST)
RANDOM = torch.rand(LONGEST, LONGEST, generator=torch.Generator().manual_seed(3)) < 0.3
AGES = torch.tensor([3, 20, 7, 50, 11, 5, 90, 2])

MASKS: dict[str, Callable[..., Tensor]] = {
    "causal": cpflex.causal(),
    "window": cpflex.causal() & cpflex.sliding_window(9),
    "sinks and window": cpflex.causal() & (cpflex.sliding_window(11) | (lambda b, h, q, k: k < 3)),
    "full": cpflex.full(),
    "prefix": cpflex.prefix_lm(10),
    "documents": lambda b, h, q, k: (DOCUMENTS[q] == DOCUMENTS[k]) & (k <= q),
    "dilated": lambda b, h, q, k: (k <= q) & ((q - k) % 5 == 0),
    "blocks": lambda b, h, q, k: k // 8 <= q // 8,
    "random": lambda b, h, q, k: (RANDOM[q, k] & (k <= q)) | (k == q),
    "nothing before 20": lambda b, h, q, k: (q >= 20) & (k <= q),
    "by head": lambda b, h, q, k: (k <= q) & ((k > q - 4 * (h + 1)) | (k % 7 == h)),
    "by sequence": lambda b, h, q, k: (k <= q) & (k > q - AGES[b]),
}
SCORES: dict[str, Callable[..., Tensor] | None] = {
    "none": None,
    "softcap": lambda s, b, h, q, k: 5 * torch.tanh(s / 5),
    "alibi": lambda s, b, h, q, k: s - SLOPES[h] * (q - k).abs(),
    "biases": lambda s, b, h, q, k: s + BIASES[q - k + LONGEST],
    "by sequence": lambda s, b, h, q, k: s * (1 + 0.1 * b),
}


def dense(
    q: Tensor,  # [Hq, n, D]
    k: Tensor,  # [H, L, D]
    v: Tensor,  # [H, L, Dv]
    place: int,
    mask: Callable[..., Tensor],
    score: Callable[..., Tensor] | None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """out [Hq, n, Dv] and lse [Hq, n] of the last n of L tokens."""
    groups = len(q) // len(k)
    k, v = (x.to(dtype).repeat_interleave(groups, 0) for x in (k, v))
    positions = torch.arange(k.shape[1])
    b, h = torch.tensor(place), torch.arange(len(q)).view(-1, 1, 1)
    q_idx, kv_idx = positions[k.shape[1] - q.shape[1] :, None], positions
    scores = q.to(dtype) @ k.mT / math.sqrt(q.shape[-1])
    if score is not None:
        scores = score(scores, b, h, q_idx, kv_idx)
    scores = scores.masked_fill(~mask(b, h, q_idx, kv_idx), -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    return weights @ v, lse


class Service:
    """What one rank of a service holds. Every rank draws the same numbers."""

    def __init__(
        self,
        group: Any,
        num_pages: int = 64,
        page_size: int = 4,
        dims: tuple[int, int] = (8, 12),
        num_kv_heads: int = 2,
        num_pools: int = 1,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        alone = group is None or isinstance(group, tuple)
        self.pages = (
            cpflex.Pages(num_pages, page_size)
            if group is None
            else cpflex.Pages(num_pages, page_size, group)
            if not alone
            else cpflex.Pages(num_pages, page_size, rank=group[0], world_size=group[1])
        )
        self.pools = [self.pages.pool(num_kv_heads, *dims, dtype=dtype) for _ in range(num_pools)]
        self.dense: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}
        """k and v of each sequence in each pool, [H, L, D]."""
        self.dims, self.num_kv_heads, self.dtype = dims, num_kv_heads, dtype
        self.random = torch.Generator().manual_seed(seed)
        self.poison()

    def drawn(self, heads: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(1, heads, tokens, dim, generator=self.random).to(self.dtype)

    def reserve(self, seq: Hashable, num_tokens: int) -> None:
        self.pages.reserve(seq, num_tokens)
        empty = [(torch.zeros(self.num_kv_heads, 0, dim, dtype=self.dtype) for dim in self.dims) for _ in self.pools]
        self.dense.setdefault(seq, [tuple(pair) for pair in empty])  # type: ignore[misc]

    def fork(self, parent: Hashable, child: Hashable) -> None:
        self.pages.fork(parent, child)
        self.dense[child] = list(self.dense[parent])
        self.poison()

    def crop(self, seq: Hashable, length: int) -> None:
        self.pages.crop(seq, length)
        self.dense[seq] = [(k[:, :length], v[:, :length]) for k, v in self.dense[seq]]
        self.poison()

    def erase(self, seq: Hashable) -> None:
        self.pages.erase(seq)
        del self.dense[seq]
        self.poison()

    def evict(self, *arguments: Any, **named: Any) -> int:
        freed = self.pages.evict(*arguments, **named)
        self.poison()
        return freed

    def poison(self) -> None:
        """NaN in every row of the pools that no kept token lies in."""
        size, rank = self.pages.page_size, self.pages.rank
        kept = torch.zeros(self.pages.num_pages * size, dtype=torch.bool)
        for seq in self.pages.sequences:
            held = self.pages.held(seq)
            for page, (owner, slot) in enumerate(zip(held.owner.tolist(), held.slot.tolist(), strict=True)):
                if owner == rank and slot >= 0:
                    kept[slot * size : slot * size + max(0, min(size, held.length - page * size))] = True
        for pool in self.pools:
            pool.k[:, :, ~kept] = float("nan")
            pool.v[:, :, ~kept] = float("nan")

    def mine(self, x: Tensor, plan: Any, *, keys: bool = False) -> Tensor:
        """This rank's tokens or heads of x [1, heads, N, D]."""
        rows, rank, size = plan.steps.rows, self.pages.rank, self.pages.world_size
        if rows.counts is not None:
            return x[:, :, plan.steps.first : plan.steps.end]
        if rows.by_head and x.shape[1] % size == 0:
            return x.chunk(size, dim=1)[rank]
        assert not rows.by_head or keys, "query heads divide"
        return x

    def step(
        self,
        plan: Any,
        mask: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]],
        score: Callable[..., Tensor] | None = None,
        num_heads: int = ALL_HEADS,
        new: tuple[Tensor, Tensor, Tensor] | None = None,
        advance: bool = True,
    ) -> list[Tensor]:
        """One step with random tokens in every pool, each checked against the dense one; out of each pool."""
        masks = dict(mask) if isinstance(mask, Mapping) else {plan.kinds[0]: mask}
        results = []
        for pool, kept, (kind, one) in zip(self.pools, range(len(self.pools)), masks.items(), strict=True):
            total = plan.steps.num_tokens
            q, k, v = new or (
                self.drawn(num_heads, total, self.dims[0]),
                *(self.drawn(self.num_kv_heads, total, dim) for dim in self.dims),
            )
            pool.assign(self.mine(k, plan, keys=True), self.mine(v, plan, keys=True), plan)
            out, lse = cpflex.flex_attention(
                self.mine(q, plan), pool.k, pool.v, score, plan[kind], enable_gqa=True, return_lse=True
            )
            for place, seq in enumerate(plan.steps.sequences):
                begin, end = plan.steps.token_range(seq)
                old = self.dense[seq][kept]
                self.dense[seq][kept] = tuple(
                    torch.cat([x, y[0, :, begin:end]], dim=1) for x, y in zip(old, (k, v), strict=True)
                )
                self.check(out, lse, q[0, :, begin:end], plan, place, kept, one, score)
            results.append(out)
        if advance:
            plan.advance()
        return results

    def check(self, out: Tensor, lse: Tensor, q: Tensor, plan: Any, place: int, pool: int, mask, score) -> None:
        """One sequence's rows of out [1, h, n, Dv] and lse, within the budget of DESIGN section 7."""
        seq, heads = plan.steps.sequences[place], slice(None)
        if seq not in plan.sequences:
            return
        rows, (begin, end) = plan.rows_of(seq), plan.steps.token_range(seq)
        some = slice(max(plan.steps.first - begin, 0), min(plan.steps.end, end) - begin)
        if plan.steps.rows.by_head:
            heads = slice(self.pages.rank * out.shape[1], (self.pages.rank + 1) * out.shape[1])
        true, close = (
            dense(q, *self.dense[seq][pool], place, mask, score, kind) for kind in (torch.float64, torch.float32)
        )
        for found, exact, reference, dtype in zip((out, lse), true, close, (self.dtype, torch.float32), strict=True):
            found, exact, reference = (
                found[0, :, rows].double(),
                exact[heads, some],
                reference[heads, some].to(dtype).double(),
            )
            finite = exact.isfinite()
            assert torch.equal(found.isfinite(), finite), f"{seq}: finite where it should not be, or the reverse"
            error, allowed = (
                (x - exact)[finite].abs().max().item() if finite.any() else 0.0 for x in (found, reference)
            )
            size = exact[finite].abs().max().item() if finite.any() else 0.0
            rounding = torch.finfo(dtype).eps * size + 16 * torch.finfo(torch.float32).eps * (1 + size)
            assert error <= 2 * allowed + rounding, f"{seq}: error {error:.2e}, allowed {2 * allowed + rounding:.2e}"

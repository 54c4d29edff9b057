"""attend_pages and combine in plain torch: attention of a few new tokens of many sequences to keys that lie in pages.

The keys of all sequences share one pool of rows. What a program reads of it is a list of runs of rows: a part, a split,
of the pages of one sequence. It leaves a partial softmax, and `combine` makes one of the partials of a token, be they
those of splits or those of ranks. These are the CPU backend and the twins of the fused kernels (`decode`, `combining`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from cpflex.kernels.call import Call
from cpflex.mods.evaluate import evaluate

# N new tokens of all sequences, B sequences, Hq query heads, H heads of keys and values, G = Hq / H, R rows of a pool,
# D and Dv head dims, I items, M runs, P partials; T tokens of an item, K keys of its runs

ROWS_AT_ONCE = 32
"""Of a block that any GPU holds: tokens times the query heads that share a head of keys."""


class PageWork(NamedTuple):
    """What one launch computes. All tables are int32, contiguous, and read at each launch: a page fills, and positions
    move, while they last.
    """

    items: Tensor  # [I, 6] place of the sequence, first token, end token, first run, end run, first partial
    runs: Tensor  # [M, 3] first row, end row, position of the first row in its sequence; M is at least 1
    q_positions: Tensor  # [N] in the token's own sequence
    kv_len: Tensor  # [B] positions below it are filled; rows at others are not read
    max_tokens: int
    """The most of an item."""
    num_partials: int


class Partials(NamedTuple):
    """The softmax of tokens over some of their keys; those that items name are written, others are left as they are."""

    out: Tensor  # [P, Hq, Dv] fp32; strides (any, Dv, 1)
    lse: Tensor  # [P, Hq] fp32, natural log; strides (any, 1); -inf for a token that saw no key, whose out nobody reads


def partials_of(memory: Tensor, num_heads: int) -> Partials:
    """fp32 memory [P, Hq * (Dv + 1)] as partials: of each, its out and then its lse, as messages hold them."""
    lse = memory[:, memory.shape[1] - num_heads :]
    return Partials(memory[:, : memory.shape[1] - num_heads].unflatten(1, (num_heads, -1)), lse)


def empty_partials(rows: int, num_heads: int, v_dim: int, device: torch.device) -> Partials:
    return partials_of(torch.empty(rows, num_heads * (v_dim + 1), dtype=torch.float32, device=device), num_heads)


def tokens_at_once(group_size: int) -> int:
    """The tokens of an item that fill a block of rows; more of them are walked over again, block by block."""
    return max(1, ROWS_AT_ONCE // group_size)


def attend_pages(
    q: Tensor,  # [1, Hq, N, D]
    k: Tensor,  # [1, H, R, D]
    v: Tensor,  # [1, H, R, Dv]
    work: PageWork,
    call: Call,
    into: Partials,
) -> Partials:
    """A partial for each token of each item, in ``into``."""
    runs, kv_len = work.runs.cpu().tolist(), work.kv_len.cpu().tolist()
    for place, first, end, first_run, end_run, first_partial in work.items.cpu().tolist():
        rows, positions = _filled(runs[first_run:end_run], kv_len[place] if end > first else 0, q.device)
        out, lse = _softmax(
            q[0, :, first:end], k[0, :, rows], v[0, :, rows], place, work.q_positions[first:end], positions, call
        )
        at = slice(first_partial, first_partial + end - first)
        into.out[at], into.lse[at] = out.movedim(0, 1), lse.T
    return into


def _filled(runs: list[list[int]], kv_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows of the runs that are filled, and their positions, both int64."""
    rows, positions = [torch.arange(0)], [torch.arange(0)]
    for first, end, position in runs:
        count = max(0, min(end - first, kv_len - position))
        rows.append(torch.arange(first, first + count))
        positions.append(torch.arange(position, position + count))
    return torch.cat(rows).to(device), torch.cat(positions).to(device)


def _softmax(
    q: Tensor,  # [Hq, T, D]
    k: Tensor,  # [H, K, D]
    v: Tensor,  # [H, K, Dv]
    place: int,
    q_positions: Tensor,  # [T]
    kv_positions: Tensor,  # [K]
    call: Call,
) -> tuple[Tensor, Tensor]:
    """out [Hq, T, Dv] and lse [Hq, T], fp32; 0 and -inf for a token that sees no key."""
    num_heads, group_size = len(q), len(q) // len(k)
    q = rearrange(q.float(), "(h g) t d -> h (g t) d", g=group_size)
    scores = rearrange((q @ k.float().mT) * call.scale, "h (g t) k -> (h g) t k", g=group_size)
    inputs = {
        "b": torch.tensor(place, device=q.device),
        "h": torch.arange(num_heads, device=q.device).view(-1, 1, 1),
        "q_idx": q_positions.long().view(-1, 1),
        "kv_idx": kv_positions,
        "score": scores,
    }
    if call.score_graph is not None:
        scores = evaluate(call.score_graph, call.captured, inputs)[0].expand_as(scores)
    scores = scores.masked_fill(~evaluate(call.mask.graph, call.mask.captured, inputs)[0], -torch.inf)
    if not scores.shape[-1]:
        return q.new_zeros(*scores.shape[:2], v.shape[-1]), q.new_full(scores.shape[:2], -torch.inf)
    lse = scores.logsumexp(dim=-1)
    weights = (scores - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)).exp()
    out = rearrange(weights, "(h g) t k -> h (g t) k", g=group_size) @ v.float()
    return rearrange(out, "h (g t) d -> (h g) t d", g=group_size), lse


def combine(
    partials: Partials,
    parts: Tensor,  # int32 [N, 3]: the partials of a token are first, first + stride, ..., count of them
    into: Partials,
) -> Partials:
    """One partial of those of each token, in ``into``, whose out may have another dtype. Summed in their order."""
    for row, (first, stride, count) in enumerate(parts.cpu().tolist()):
        at = [first + stride * i for i in range(count)]
        chosen = partials.lse.index_select(0, torch.tensor(at, dtype=torch.int64, device=parts.device))
        base = chosen.amax(dim=0) if at else torch.zeros_like(partials.lse[0])
        base = torch.where(base == -torch.inf, 0.0, base)
        out, total = torch.zeros_like(partials.out[0]), torch.zeros_like(base)
        for part in at:
            weight = (partials.lse[part] - base).exp()
            total += weight
            saw_a_key = partials.lse[part] != -torch.inf  # else its out may hold anything
            out += torch.where(saw_a_key[:, None], partials.out[part] * weight[:, None], 0.0)
        into.out[row] = (out / torch.where(total == 0, 1.0, total)[:, None]).to(into.out.dtype)
        into.lse[row] = base + total.log()
    return into

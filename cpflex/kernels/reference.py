"""attend and attend_backward in plain torch: block-sparse, readable, the CPU backend and the twin of the fused
kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from cpflex.kernels.call import Call
from cpflex.kernels.state import State
from cpflex.mods.evaluate import add_at, evaluate
from cpflex.mods.graph import Ref
from cpflex.tile_mask import TileMask

# B batch, Hq query heads, H heads of keys and values, G = Hq / H, S local queries, K visiting keys, D and Dv head dims,
# R rows of a query tile, N keys of a piece

SCORES_PER_PIECE = 1 << 20
"""Scores computed at once, per piece of a row of tiles: about what stays in cache."""


def attend(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, H, K, D]
    v: Tensor,  # [B, H, K, Dv]
    tile_mask: TileMask,
    call: Call,
    state: State,
) -> None:
    """Continue ``state`` with the visiting keys, in place."""
    num_groups = q.shape[1] // k.shape[1]
    q, k, v = q.float(), k.float(), v.float()
    acc, m, l = (rearrange(x, "b (h g) ... -> b h g ...", g=num_groups) for x in (state.acc, state.m, state.l))  # noqa: E741
    for rows, columns, is_partial in _pieces(tile_mask, q.shape[0] * q.shape[1]):
        q_rows = rearrange(q[:, :, rows], "b (h g) r d -> b h (g r) d", g=num_groups)
        scores, _, _ = _scores(q_rows, k[:, :, columns], tile_mask, rows, columns, is_partial, call, num_groups)
        m_old = m[..., rows]
        m_new = torch.maximum(m_old, scores.amax(dim=-1))
        base = torch.where(
            m_new == -torch.inf, 0.0, m_new
        )  # -inf - (-inf) would be NaN for a row that sees nothing yet
        p = scores.sub_(base.unsqueeze(-1)).exp_()
        decay = (m_old - base).exp_()
        m[..., rows] = m_new
        l[..., rows] = l[..., rows] * decay + p.sum(dim=-1)
        pv = rearrange(p, "b h g r n -> b h (g r) n") @ v[:, :, columns]
        acc[..., rows, :] = acc[..., rows, :] * decay.unsqueeze(-1) + rearrange(
            pv, "b h (g r) d -> b h g r d", g=num_groups
        )


def begin_backward(
    out: Tensor,  # [B, Hq, S, Dv]
    grad_out: Tensor,  # [B, Hq, S, Dv]
    grad_lse: Tensor,  # [B, Hq, S] fp32
    lse: Tensor,  # [B, Hq, S] fp32
) -> tuple[Tensor, Tensor]:
    """lse as it is, and delta [B, Hq, S] = rowsum(out * grad_out) - grad_lse, fp32; head by head, as products in fp32
    take memory.
    """
    delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    for head in range(out.shape[1]):
        products = out[:, head].float() * grad_out[:, head].float()
        # d lse enters as -delta does: ds = p * (dp - delta)
        delta[:, head] = products.sum(dim=-1) - grad_lse[:, head]
    return lse, delta


def attend_backward(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, H, K, D]
    v: Tensor,  # [B, H, K, Dv]
    grad_out: Tensor,  # [B, Hq, S, Dv]
    lse: Tensor,  # [B, Hq, S] fp32, over the keys of all ranks
    delta: Tensor,  # [B, Hq, S] fp32, rowsum(out * grad_out) - grad_lse
    tile_mask: TileMask,
    call: Call,
    dq: Tensor,  # [B, Hq, S, D] fp32, added to in place
    d_captured: list[Tensor],  # fp32, like call.captured at call.wanted, added to in place
) -> tuple[Tensor, Tensor]:
    """dk [B, H, K, D] and dv [B, H, K, Dv] of the visiting keys, fp32."""
    num_groups = q.shape[1] // k.shape[1]
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    q, k, v, grad_out = q.float(), k.float(), v.float(), grad_out.float()
    lse = torch.where(lse == -torch.inf, 0.0, lse)  # a row that sees nothing has only p = exp(-inf) = 0
    lse, delta = (rearrange(x, "b (h g) s -> b h g s", g=num_groups) for x in (lse, delta))
    for rows, columns, is_partial in _pieces(tile_mask, q.shape[0] * q.shape[1]):
        q_rows, g_rows = (rearrange(x[:, :, rows], "b (h g) r d -> b h (g r) d", g=num_groups) for x in (q, grad_out))
        k_cols, v_cols = k[:, :, columns], v[:, :, columns]
        scores, seen, inputs = _scores(q_rows, k_cols, tile_mask, rows, columns, is_partial, call, num_groups)
        p = scores.sub_(lse[..., rows].unsqueeze(-1)).exp_()
        dp = rearrange(g_rows @ v_cols.mT, "b h (g r) n -> b h g r n", g=num_groups)
        ds = dp.sub_(delta[..., rows].unsqueeze(-1)).mul_(p)
        if call.score_graph is not None:
            ds = _through_score_mod(call, inputs, ds, seen, d_captured)
        ds, p = (rearrange(x, "b h g r n -> b h (g r) n") for x in (ds, p))
        dv[:, :, columns] += p.mT @ g_rows
        dk[:, :, columns] += (ds.mT @ q_rows) * call.scale
        dq_rows = (ds @ k_cols) * call.scale
        dq[:, :, rows] += rearrange(dq_rows, "b h (g r) d -> b (h g) r d", g=num_groups)
    return dk, dv


def _pieces(tile_mask: TileMask, num_heads: int) -> Iterator[tuple[slice, slice, bool]]:
    """(query rows, key columns, is PARTIAL) of every piece with work, in a fixed order."""
    q_starts, kv_starts = tile_mask.q_starts.tolist(), tile_mask.kv_starts.tolist()
    for tile in range(len(q_starts) - 1):
        rows = slice(q_starts[tile], q_starts[tile + 1])
        widest = max(1, SCORES_PER_PIECE // (num_heads * (rows.stop - rows.start)))
        for runs, is_partial in ((tile_mask.partial, True), (tile_mask.full, False)):
            for first, count in runs.row(tile):
                begin, end = kv_starts[first], kv_starts[first + count]
                for start in range(begin, end, widest):
                    yield rows, slice(start, min(start + widest, end)), is_partial


def _scores(
    q_rows: Tensor,  # [B, H, G * R, D]
    k_cols: Tensor,  # [B, H, N, D]
    tile_mask: TileMask,
    rows: slice,
    columns: slice,
    is_partial: bool,
    call: Call,
    num_groups: int,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Scores [B, H, G, R, N] with hidden pairs at -inf; which pairs are seen (None: all); the inputs of the mods."""
    scores = rearrange((q_rows @ k_cols.mT).mul_(call.scale), "b h (g r) n -> b h g r n", g=num_groups)
    batch, heads = scores.shape[:2]
    device = scores.device
    inputs = {
        "b": torch.arange(batch, device=device).view(-1, 1, 1, 1, 1),
        "h": torch.arange(heads * num_groups, device=device).view(heads, num_groups, 1, 1),
        "q_idx": tile_mask.q_positions[rows].long().view(-1, 1),
        "kv_idx": tile_mask.kv_positions[columns].long(),
        "score": scores,
    }
    seen = evaluate(call.mask.graph, call.mask.captured, inputs)[0] if is_partial else None
    if call.score_graph is not None:
        modified = evaluate(call.score_graph, call.captured, inputs)[0].expand_as(scores)
        scores = modified.masked_fill(~seen, -torch.inf) if seen is not None else modified.clone()
    elif seen is not None:
        scores.masked_fill_(~seen, -torch.inf)
    return scores, seen, inputs


def _through_score_mod(
    call: Call, inputs: dict[str, Tensor], ds: Tensor, seen: Tensor | None, d_captured: list[Tensor]
) -> Tensor:
    """The gradient of the scores before the score_mod; adds those of captured tensors to ``d_captured``."""
    assert call.score_vjp is not None, "a call with a score_mod knows its vjp"
    outputs = evaluate(call.score_vjp.graph, call.captured, {**inputs, "grad": ds})

    def visible(x: Tensor) -> Tensor:
        # after the vjp: a derivative that is not finite at a hidden pair would turn its zero into NaN
        x = x.expand_as(ds)
        return x if seen is None else x.masked_fill(~seen, 0.0)

    for read in call.score_vjp.captured:
        target = d_captured[call.wanted.index(read.slot)]
        indices = [outputs[i.index] if isinstance(i, Ref) else torch.tensor(i, device=ds.device) for i in read.indices]
        place = torch.broadcast_shapes(*(i.shape for i in indices)) if indices else ()
        part = _summed_to(visible(outputs[read.output]), place)
        if indices:
            add_at(target, indices, part)
        else:
            target += part
    return visible(outputs[0])


def _summed_to(x: Tensor, place: torch.Size | tuple[()]) -> Tensor:
    """`sum_to_size`, axis by axis: torch divides a sum to one number among its threads, which rounds it differently."""
    for axis in range(1, x.ndim + 1):
        if axis > len(place) or place[-axis] == 1:
            x = x.sum(dim=-axis, keepdim=True)
    return x.view(place)

"""Dense attention from a mask function and a score function on positions, and the error that N ranks may add to it.

In float64 it is the truth; in float32, rounded where a single-device flash attention rounds, it is the reference of the
same precision.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# B batch, Hq query heads, H heads of keys and values, S tokens, R query rows at once

SCORES_AT_ONCE = 1 << 24
ROWS_OF_A_SHARE = 64

MaskFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Attention:
    """Results of one attention, on global tokens."""

    out: Tensor  # [B, Hq, S, Dv]
    lse: Tensor  # [B, Hq, S]
    dq: Tensor  # [B, Hq, S, D]
    dk: Tensor  # [B, H, S, D]
    dv: Tensor  # [B, H, S, Dv]
    d_captured: list[Tensor] = field(default_factory=list)
    captured_parts: list[Tensor] = field(default_factory=list)
    """Of a dense attention: the share of each block of query rows in each of d_captured, [blocks, ...]."""

    def named(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in ("out", "lse", "dq", "dk", "dv")}
        return tensors | {f"d_captured[{i}]": grad for i, grad in enumerate(self.d_captured)}


def dense_attention(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, H, S, D]
    v: Tensor,  # [B, H, S, Dv]
    grad_out: Tensor,  # [B, Hq, S, Dv]
    grad_lse: Tensor,  # [B, Hq, S]
    mask_mod: MaskFn,
    score_mod: Callable[..., ScoreFn] | None = None,  # (*captured) -> score function
    captured: Sequence[Tensor] = (),
    scale: float | None = None,
    precision: torch.dtype = torch.float64,
    heads: Sequence[tuple[int, int]] | None = None,
) -> Attention:
    """Forward and backward in ``precision``, of all heads or of the listed (batch, head) pairs.

    In float32, results get q's dtype, ``out`` before backward reads it."""
    num_groups = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    dtype = q.dtype if precision == torch.float32 else precision
    wide = [x.detach().to(precision) for x in (q, k, v, grad_out, grad_lse)]
    leaves = [x.detach().to(precision).requires_grad_(x.requires_grad) for x in captured]
    shapes = ((*q.shape[:-1], v.shape[-1]), q.shape[:-1], q.shape, k.shape, v.shape)
    total = Attention(*(torch.zeros(shape, dtype=precision) for shape in shapes))
    shares: list[list[Tensor]] = [[] for _ in leaves]
    rows_at_once = ROWS_OF_A_SHARE if captured else max(1, SCORES_AT_ONCE // k.shape[2])
    with _default_dtype(precision):
        score_fn = None if score_mod is None else score_mod(*leaves)
        for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])) if heads is None else heads:
            for start in range(0, q.shape[2], rows_at_once):
                rows = slice(start, min(start + rows_at_once, q.shape[2]))
                _add_rows(total, wide, mask_mod, score_fn, leaves, shares, scale, b, h, h // num_groups, rows, dtype)
    for name in ("out", "dq", "dk", "dv"):
        setattr(total, name, getattr(total, name).to(dtype))
    total.captured_parts = [torch.stack(parts) for parts in shares]
    total.d_captured = [
        parts.sum(dim=0).to(x.dtype if precision == torch.float32 else precision)
        for parts, x in zip(total.captured_parts, captured, strict=True)
    ]
    return total


def _add_rows(
    total: Attention,
    inputs: Sequence[Tensor],
    mask_mod: MaskFn,
    score_fn: ScoreFn | None,
    leaves: Sequence[Tensor],
    shares: list[list[Tensor]],
    scale: float,
    b: int,
    h: int,
    kv_head: int,
    rows: slice,
    out_dtype: torch.dtype,
) -> None:
    """Some query rows of one head: textbook attention and its textbook gradient."""
    q, k, v, grad_out, grad_lse = inputs
    q, k, v = q[b, h, rows], k[b, kv_head], v[b, kv_head]
    grad_out, grad_lse = grad_out[b, h, rows], grad_lse[b, h, rows]
    b_idx, h_idx, q_idx, kv_idx = (
        torch.tensor(b),
        torch.tensor(h),
        torch.arange(rows.start, rows.stop),
        torch.arange(len(k)),
    )
    seen = mask_mod(b_idx, h_idx, q_idx[:, None], kv_idx).expand(len(q), len(k))

    visible = (q @ k.T * scale).masked_fill(~seen, -torch.inf)
    if score_fn is not None:
        # of visible pairs only: what a score_mod makes of the others is nobody's business
        row, column = seen.nonzero(as_tuple=True)
        raw = visible[seen].requires_grad_()
        scores = score_fn(raw, b_idx, h_idx, q_idx[row], kv_idx[column]).expand_as(raw)
        visible = visible.masked_scatter(seen, scores.detach())
    lse = visible.logsumexp(dim=-1)
    p = (visible - lse.masked_fill(lse == -torch.inf, 0.0)[:, None]).exp()
    out = p @ v

    delta = (out.to(out_dtype).to(out.dtype) * grad_out).sum(dim=-1) - grad_lse
    ds = p * (grad_out @ v.T - delta[:, None])
    if score_fn is not None:
        wanted = [raw, *(x for x in leaves if x.requires_grad)]
        parts = torch.autograd.grad(scores, wanted, ds[seen], allow_unused=True, materialize_grads=True)
        ds = torch.zeros_like(ds).masked_scatter(seen, parts[0])
        by_leaf = dict(zip(map(id, wanted), parts, strict=True))
        for share, leaf in zip(shares, leaves, strict=True):
            share.append(by_leaf.get(id(leaf), torch.zeros_like(leaf)))
    total.out[b, h, rows], total.lse[b, h, rows] = out, lse
    total.dq[b, h, rows] = ds @ k * scale
    total.dk[b, kv_head] += ds.T @ q * scale
    total.dv[b, kv_head] += p.T @ grad_out


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Positions become floats of this dtype when a score function mixes them with numbers."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def assert_within_budget(actual: Attention, reference: Attention, exact: Attention) -> None:
    """error(actual) <= 2 x error(reference) + one rounding, both against float64 (DESIGN.md section 7).

    -inf agrees exactly. A captured tensor may be a single number, whose error in the reference may vanish by luck:
    there the errors of the shares of all blocks of queries count, which cannot cancel.
    """
    found, close, true = actual.named(), reference.named(), exact.named()
    assert set(found) == set(true) == set(close)
    for name, value in found.items():
        assert value.shape == true[name].shape, f"{name}: shape {tuple(value.shape)}, not {tuple(true[name].shape)}"
        finite = true[name].isfinite()
        assert torch.equal(value.isfinite(), finite), f"{name}: finite where it should not be, or the reverse"
        assert torch.equal(value[~finite].double(), true[name][~finite].double()), f"{name}: not the same infinities"
        error = _largest((value.double() - true[name])[finite])
        allowed, size = _largest((close[name].double() - true[name])[finite]), _largest(true[name][finite])
        if name.startswith("d_captured"):
            slot = list(found).index(name) - list(found).index("d_captured[0]")
            parts = exact.captured_parts[slot]
            allowed = _largest((reference.captured_parts[slot].double() - parts).abs().sum(dim=0))
            size = _largest(parts.abs().sum(dim=0))
        budget = 2 * allowed + torch.finfo(value.dtype).eps * size
        assert error <= budget, (
            f"{name}: error {error:.3e} against float64; the budget is 2 x {allowed:.3e} + one rounding of {size:.3e}"
        )


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0

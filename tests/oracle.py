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
    terms: Attention | None = None
    """Of one in float64: the sizes of the results if nothing in their sums cancelled and every error of a score counted."""

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
    total, terms = (_zeros(q, k, v, captured, precision) for _ in range(2))
    rows_at_once = ROWS_OF_A_SHARE if captured else max(1, SCORES_AT_ONCE // k.shape[2])
    with _default_dtype(precision):
        score_fn = None if score_mod is None else score_mod(*leaves)
        for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])) if heads is None else heads:
            for start in range(0, q.shape[2], rows_at_once):
                rows = slice(start, min(start + rows_at_once, q.shape[2]))
                at = (b, h, h // num_groups, rows)
                _add_rows(total, terms, wide, mask_mod, score_fn, leaves, scale, at, dtype)
    if precision == torch.float64:
        total.terms = terms
        return total
    for name in ("out", "dq", "dk", "dv"):
        setattr(total, name, getattr(total, name).to(dtype))
    total.d_captured = [grad.to(x.dtype) for grad, x in zip(total.d_captured, captured, strict=True)]
    return total


def _zeros(q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], precision: torch.dtype) -> Attention:
    shapes = ((*q.shape[:-1], v.shape[-1]), q.shape[:-1], q.shape, k.shape, v.shape)
    made = Attention(*(torch.zeros(shape, dtype=precision) for shape in shapes))
    made.d_captured = [torch.zeros(x.shape, dtype=precision) for x in captured]
    return made


def _add_rows(
    total: Attention,
    terms: Attention,
    inputs: Sequence[Tensor],
    mask_mod: MaskFn,
    score_fn: ScoreFn | None,
    leaves: Sequence[Tensor],
    scale: float,
    at: tuple[int, int, int, slice],
    out_dtype: torch.dtype,
) -> None:
    """Some query rows of one head: textbook attention and its textbook gradient."""
    b, h, kv_head, rows = at
    q, k, v, grad_out, grad_lse = (
        x[b, head, part] for x, head, part in zip(inputs, (h, kv_head, kv_head, h, h), _parts(rows), strict=True)
    )
    positions = (torch.tensor(b), torch.tensor(h), torch.arange(rows.start, rows.stop), torch.arange(len(k)))
    seen = mask_mod(*positions[:2], positions[2][:, None], positions[3]).expand(len(q), len(k))

    scores = (q @ k.T * scale).masked_fill(~seen, -torch.inf)
    pull = _pull_nothing
    if score_fn is not None:
        scores, pull = _modified(scores, seen, score_fn, leaves, positions)
    lse = scores.logsumexp(dim=-1)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[:, None]).exp()
    # divided last, as flash attention does: a mean of equal weights is often a tie of 16 bits, and which way it is rounded
    # is seen in every gradient
    weights = (scores - scores.amax(dim=-1).masked_fill(lse == -torch.inf, 0.0)[:, None]).exp()
    out = weights @ v / weights.sum(dim=-1).masked_fill(lse == -torch.inf, 1.0)[:, None]
    delta = (out.to(out_dtype).to(out.dtype) * grad_out).sum(dim=-1) - grad_lse
    ds, d_captured = pull(p * (grad_out @ v.T - delta[:, None]))

    total.out[b, h, rows], total.lse[b, h, rows] = out, lse
    total.dq[b, h, rows] = ds @ k * scale
    total.dk[b, kv_head] += ds.T @ q * scale
    total.dv[b, kv_head] += p.T @ grad_out
    for grad, part in zip(total.d_captured, d_captured, strict=True):
        grad += part
    if out.dtype != torch.float64:
        return

    q, k, v, grad_out, grad_lse = (x.abs() for x in (q, k, v, grad_out, grad_lse))
    sizes = q @ k.T * scale + scores.abs() + lse.abs()[:, None]
    p = p * (1 + sizes.masked_fill(sizes == torch.inf, 0.0))
    delta = (out.abs() * grad_out).sum(dim=-1) + grad_lse
    ds, d_captured = pull(p * (grad_out @ v.T + delta[:, None]))
    terms.out[b, h, rows], terms.lse[b, h, rows] = p @ v, p.sum(dim=-1)
    terms.dq[b, h, rows] = ds.abs() @ k * scale
    terms.dk[b, kv_head] += ds.abs().T @ q * scale
    terms.dv[b, kv_head] += p.T @ grad_out
    for grad, part in zip(terms.d_captured, d_captured, strict=True):
        grad += part.abs()


def _parts(rows: slice) -> tuple[slice, ...]:
    """Of q, k, v, grad_out and grad_lse."""
    return rows, slice(None), slice(None), rows, rows


Pull = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


def _pull_nothing(ds: Tensor) -> tuple[Tensor, list[Tensor]]:
    return ds, []


def _modified(
    raw: Tensor, seen: Tensor, score_fn: ScoreFn, leaves: Sequence[Tensor], positions: Sequence[Tensor]
) -> tuple[Tensor, Pull]:
    """What the score function makes of visible scores - of the others is nobody's business -, and how gradients go back."""
    row, column = seen.nonzero(as_tuple=True)
    before = raw[seen].requires_grad_()
    after = score_fn(before, *positions[:2], positions[2][row], positions[3][column]).expand_as(before)
    wanted = [before, *(x for x in leaves if x.requires_grad)]

    def pull(ds: Tensor) -> tuple[Tensor, list[Tensor]]:
        options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        found = dict(zip(map(id, wanted), torch.autograd.grad(after, wanted, ds[seen], **options), strict=True))
        d_captured = [found.get(id(x), torch.zeros_like(x)) for x in leaves]
        return torch.zeros_like(ds).masked_scatter(seen, found[id(before)]), d_captured

    return raw.masked_scatter(seen, after.detach()), pull


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Positions become floats of this dtype when a score function mixes them with numbers."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def assert_within_budget(actual: Attention, reference: Attention, exact: Attention) -> dict[str, tuple[float, float]]:
    """error(actual) <= 2 x error(reference) + one rounding, both against float64 (DESIGN.md section 7). Returns the
    (error, budget) of each result.

    One rounding of the result in its dtype, and one in float32 of everything that is summed up to it: where few numbers are
    compared, or terms cancel, the reference may be right by luck. -inf agrees exactly.
    """
    assert exact.terms is not None, "the exact attention is in float64"
    found, close, true, terms = (x.named() for x in (actual, reference, exact, exact.terms))
    assert set(found) == set(true) == set(close)
    errors = {}
    for name, value in found.items():
        assert value.shape == true[name].shape, f"{name}: shape {tuple(value.shape)}, not {tuple(true[name].shape)}"
        finite = true[name].isfinite()
        assert torch.equal(value.isfinite(), finite), f"{name}: finite where it should not be, or the reverse"
        assert torch.equal(value[~finite].double(), true[name][~finite].double()), f"{name}: not the same infinities"
        error, allowed = (_largest((x.double() - true[name])[finite]) for x in (value, close[name]))
        rounding = torch.finfo(value.dtype).eps * _largest(true[name][finite])
        rounding += torch.finfo(torch.float32).eps * _largest(terms[name][finite])
        assert error <= 2 * allowed + rounding, (
            f"{name}: error {error:.3e} against float64; the budget is 2 x {allowed:.3e} + one rounding, {rounding:.3e}"
        )
        errors[name] = (error, 2 * allowed + rounding)
    return errors


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0

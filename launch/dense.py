"""The oracle: dense attention of the whole sequence on one device, and how far from it a result may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import reduce, repeat
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from cpflex.attention import ScoreMod
from cpflex.masks import MaskFn
from cpflex.mods.trace import trace_mask_mod

# B batch, Hq query heads, H heads of keys and values, S tokens of the whole sequence, D head dim, R query rows at once

ROWS_AT_ONCE = 128
"""Rows of a block of queries: what sums over queries add first, in kernels a tile."""

Results = dict[str, Tensor]
"""out, lse, dq, dk, dv of the whole sequence and "d captured ..." of each captured tensor that requires grad."""

PER_QUERY = ("out", "lse", "dq")
"""Results with a row for each query; the others are sums over queries."""


class Inputs(NamedTuple):
    """Of the whole sequence, equal on every rank."""

    q: Tensor  # [B, Hq, S, D]
    k: Tensor  # [B, H, S, D]
    v: Tensor  # [B, H, S, D]
    grad_out: Tensor  # [B, Hq, S, D]
    grad_lse: Tensor  # [B, Hq, S] fp32


@dataclass(frozen=True)
class Oracle:
    """The results in fp64, and the budget: how far from them each may be."""

    exact: Results
    limits: Mapping[str, float]

    def errors(self, found: Results) -> dict[str, float]:
        """Of each result: rms difference / rms over the tokens of a head, the greatest of all heads.

        Not finite where an element is finite in only one of the two.
        """
        return {name: _ratio(_difference(found[name], exact), exact) for name, exact in self.exact.items()}


def ask(inputs: Inputs, mask: MaskFn, score_mod: ScoreMod | None) -> Oracle:
    """The results in fp64; the budget is twice the error of one device in the inputs' precision, plus one rounding.

    Both are computed in step, a block of query rows at a time. The gradient of a captured tensor can be a single
    number, with which one device is lucky if the errors of its blocks cancel; so there their magnitudes are summed.
    """
    learnt = learnt_by(score_mod)
    like = {"out": inputs.grad_out, "lse": inputs.grad_lse, "dq": inputs.q, "dk": inputs.k, "dv": inputs.v, **learnt}
    exact, apart = ({name: torch.zeros_like(x, dtype=torch.float64) for name, x in like.items()} for _ in range(2))
    in_fp64, on_one_device = (_attention(inputs, mask, score_mod, dtype) for dtype in (torch.float64, inputs.q.dtype))
    for rows in torch.arange(inputs.q.shape[2]).split(ROWS_AT_ONCE):
        for name, truth, reference in zip(like, in_fp64(rows), on_one_device(rows), strict=True):
            place = (slice(None), slice(None), rows) if name in PER_QUERY else ()
            difference = _difference(reference, truth)
            exact[name][place] += truth
            apart[name][place] += difference.abs() if name in learnt else difference
    limits = {name: 2 * _ratio(apart[name], exact[name]) + torch.finfo(x.dtype).eps for name, x in like.items()}
    return Oracle(exact, limits)


def learnt_by(score_mod: ScoreMod | None) -> Results:
    """The captured tensors of a score_mod that require grad, by the name of their gradient."""
    captured = [] if score_mod is None else [t for t in score_mod.captured if t.requires_grad]
    return {f"d captured {i}" if len(captured) > 1 else "d captured": t for i, t in enumerate(captured)}


def _attention(
    inputs: Inputs, mask: MaskFn, score_mod: ScoreMod | None, precision: torch.dtype
) -> Callable[[Tensor], list[Tensor]]:
    """Dense attention as a function of query rows: out, lse and dq of these, their terms of the other results.

    Args:
        precision: of what a fused kernel rounds to the dtype of q; scores and sums are in fp32, with fp64 in fp64.
    """
    work = torch.float64 if precision == torch.float64 else torch.float32
    num_groups = inputs.q.shape[1] // inputs.k.shape[1]
    wide = Inputs(*(x.to(work) for x in inputs))
    k, v = (repeat(x, "b h s d -> b (h g) s d", g=num_groups) for x in (wide.k, wide.v))
    wide = wide._replace(k=k, v=v)
    twins = _twins(mask, score_mod, inputs.q.device, precision)
    learnt = [twins[id(t)] for t in learnt_by(score_mod).values()]

    def of_rows(rows: Tensor) -> list[Tensor]:
        with _Replaced(twins):
            out, lse, dq, dk, dv, *d_learnt = _attend_rows(wide, rows, mask, score_mod, learnt, precision)
        dk, dv = (reduce(x, "b (h g) s d -> b h s d", "sum", g=num_groups) for x in (dk, dv))
        return [out, lse, dq, dk, dv, *d_learnt]

    return of_rows


def _attend_rows(
    inputs: Inputs,  # k and v with Hq heads
    rows: Tensor,  # [R]
    mask: MaskFn,
    score_mod: ScoreMod | None,
    learnt: Sequence[Tensor],
    precision: torch.dtype,
) -> list[Tensor]:
    """Backward as fused kernels do it, from lse and delta (FlashAttention-2, arXiv:2307.08691, algorithm 2), so that
    it rounds where they round.
    """
    q, k, v, grad_out, grad_lse = inputs
    q, grad_out, grad_lse = (x[:, :, rows] for x in (q, grad_out, grad_lse))
    batch, heads, _, dim = q.shape
    b = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    h = torch.arange(heads, device=q.device).view(-1, 1, 1)
    kv_idx = torch.arange(k.shape[2], device=q.device)
    q_idx = kv_idx[rows].view(-1, 1)
    hidden = ~mask(b, h, q_idx, kv_idx)
    raw = (q @ k.mT / math.sqrt(dim)).requires_grad_()
    scores = raw if score_mod is None else score_mod(raw, b, h, q_idx, kv_idx)
    visible = scores.detach().masked_fill(hidden, -math.inf)
    lse = visible.logsumexp(dim=-1)
    p = (visible - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp()
    out = _rounded(_rounded(p, precision) @ v, precision)
    delta = (out * grad_out).sum(dim=-1) - grad_lse
    ds = p * (grad_out @ v.mT - delta.unsqueeze(-1))
    ds, *d_learnt = torch.autograd.grad(scores, (raw, *learnt), ds, materialize_grads=True)
    ds = _rounded(ds.masked_fill(hidden, 0.0), precision) / math.sqrt(dim)
    return [out, lse, ds @ k, ds.mT @ q, _rounded(p, precision).mT @ grad_out, *d_learnt]


def _rounded(x: Tensor, precision: torch.dtype) -> Tensor:
    return x.to(precision).to(x.dtype)


def _twins(mask: MaskFn, score_mod: ScoreMod | None, device: torch.device, precision: torch.dtype) -> dict[int, Tensor]:
    """What replaces each captured tensor, by id: on ``device``, a score_mod's in fp64 if that is the precision."""
    twins = {id(t): t.detach().to(device) for t in trace_mask_mod(mask).captured}
    for t in [] if score_mod is None else score_mod.captured:
        dtype = precision if precision == torch.float64 and t.is_floating_point() else t.dtype
        twins[id(t)] = t.detach().to(device, dtype, copy=True).requires_grad_(t.requires_grad)
    return twins


class _Replaced(TorchFunctionMode):
    """Mods compute with the twins of the tensors that they captured."""

    def __init__(self, twins: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.twins = twins

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        args, kwargs = tree_map_only(Tensor, lambda t: self.twins.get(id(t), t), (args, kwargs or {}))
        return func(*args, **kwargs)


def _difference(found: Tensor, exact: Tensor) -> Tensor:
    """Element by element; 0 between equal infinities."""
    return torch.where(found == exact, 0.0, found.double() - exact)


def _ratio(difference: Tensor, exact: Tensor) -> float:
    is_by_head = exact.ndim > 2
    size, distance = (
        x.flatten(2 if is_by_head else 0).norm(dim=-1) for x in (exact.nan_to_num(neginf=0.0), difference)
    )
    return (distance / torch.where(size == 0, 1.0, size)).max().item()

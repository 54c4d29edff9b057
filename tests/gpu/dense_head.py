"""Dense attention of one group of heads on the GPU, a block of queries at a time: exact in float64, or as a single GPU
computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ROWS_AT_ONCE = 2048


def dense_head(
    q: Tensor,  # [G, S, D], the heads of one group
    k: Tensor,  # [S, D]
    v: Tensor,  # [S, Dv]
    grad_out: Tensor,  # [G, S, Dv]
    seen: Callable[[int, Tensor, Tensor], Tensor],  # (head of the group, q_idx [R, 1], kv_idx [S]) -> bool [R, S]
    modified: Callable[[Tensor, int, Tensor, Tensor], Tensor],  # (scores [R, S], head, q_idx, kv_idx) -> scores
    precision: torch.dtype,
) -> dict[str, Tensor]:
    """out [G, S, Dv], lse [G, S], dq [G, S, D], dk [S, D], dv [S, Dv].

    In float32, probabilities and their gradients are rounded to the dtype of q before they meet it, as tensor cores
    need them, and results at the end.
    """
    dtype = q.dtype

    def rounded(x: Tensor) -> Tensor:
        return x if precision == torch.float64 else x.to(dtype).to(precision)

    q, k, v, grad_out = (x.detach().to(precision) for x in (q, k, v, grad_out))
    scale, kv_idx = 1 / math.sqrt(q.shape[-1]), torch.arange(k.shape[0], device=k.device)
    out, lse, dq = torch.empty_like(grad_out), torch.empty_like(q[..., 0]), torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for head in range(q.shape[0]):
        for start in range(0, q.shape[1], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            q_idx = torch.arange(q.shape[1], device=q.device)[rows, None]
            with torch.enable_grad():
                raw = (q[head, rows] @ k.T * scale).requires_grad_()
                scores = modified(raw, head, q_idx, kv_idx)
            visible = scores.detach().masked_fill(~seen(head, q_idx, kv_idx), -torch.inf)
            lse[head, rows] = visible.logsumexp(dim=-1)
            p = (visible - lse[head, rows].masked_fill(lse[head, rows] == -torch.inf, 0.0)[:, None]).exp()
            out[head, rows] = rounded(rounded(p) @ v)
            delta = (out[head, rows] * grad_out[head, rows]).sum(dim=-1)
            ds = p * (grad_out[head, rows] @ v.T - delta[:, None])
            (ds,) = torch.autograd.grad(scores, raw, ds) if scores is not raw else (ds,)
            ds = rounded(ds)
            dq[head, rows] = ds @ k * scale
            dk += ds.T @ q[head, rows] * scale
            dv += rounded(p).T @ grad_out[head, rows]
    found = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    return {"lse": lse, **{name: rounded(x) for name, x in found.items()}}

"""The recurrences token by token, as their papers write them, over a whole sequence: the oracle of what ranks compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# B batch, S tokens, H heads; documents: int [B, S], equal within a document, -1 at padding


def documents_of(row: Tensor) -> list[Tensor]:
    """The tokens of each document of a row."""
    return [(row == i).nonzero().squeeze(1) for i in row.unique().tolist() if i >= 0]


def each_document(documents: Tensor) -> list[tuple[int, Tensor]]:
    """Its row and its tokens."""
    return [(i, document) for i, row in enumerate(documents) for document in documents_of(row)]


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, documents: Tensor, *, use_qk_l2norm: bool = False
) -> Tensor:
    """``S <- diag(exp g) S;  S <- S + beta k (v - S^T k)^T;  o = S^T q / sqrt(Dk)``; 0 at padding."""
    groups, dim = v.shape[2] // k.shape[2], k.shape[3]
    q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    if use_qk_l2norm:
        q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    g = g if g.ndim == 4 else g[..., None]
    out = [[torch.zeros_like(v[0, 0])] * v.shape[1] for _ in v]
    for row, document in each_document(documents):
        state = v.new_zeros(v.shape[2], dim, v.shape[3])
        for t in document.tolist():
            state = state * g[row, t].exp()[..., None]
            recalled = torch.einsum("hkv,hk->hv", state, k[row, t])
            state = state + torch.einsum("hk,hv->hkv", k[row, t], beta[row, t][:, None] * (v[row, t] - recalled))
            out[row][t] = torch.einsum("hkv,hk->hv", state, q[row, t]) * dim**-0.5
    return torch.stack([torch.stack(row) for row in out])


def state_space(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, documents: Tensor) -> Tensor:
    """``S <- exp(dt A) S + B (dt x)^T;  y = S^T C + D x``; 0 at padding."""
    groups = x.shape[2] // B.shape[2]
    B, C = (y.repeat_interleave(groups, dim=2) for y in (B, C))
    out = [[torch.zeros_like(x[0, 0])] * x.shape[1] for _ in x]
    for row, document in each_document(documents):
        state = x.new_zeros(x.shape[2], B.shape[3], x.shape[3])
        for t in document.tolist():
            state = state * (dt[row, t] * A).exp()[:, None, None]
            state = state + torch.einsum("hk,hv->hkv", B[row, t], dt[row, t][:, None] * x[row, t])
            out[row][t] = torch.einsum("hkv,hk->hv", state, C[row, t]) + D[:, None] * x[row, t]
    return torch.stack([torch.stack(row) for row in out])


def convolution(x: Tensor, weight: Tensor, bias: Tensor, documents: Tensor) -> Tensor:
    """Each document by itself, zeros in front of it; 0 at padding."""
    rows = []
    for row in range(len(x)):
        made = torch.zeros_like(x[row])
        for document in documents_of(documents[row]):
            alone = F.pad(x[row : row + 1, :, document], (weight.shape[1] - 1, 0))
            made = made.index_copy(1, document, F.conv1d(alone, weight[:, None], bias, groups=len(weight))[0])
        rows.append(made)
    return F.silu(torch.stack(rows))

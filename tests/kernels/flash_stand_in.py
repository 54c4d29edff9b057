"""A stand-in for FlashAttention-4: its two calls, with the signatures of 4.0.0b36, computed densely in fp32 from the lists
of blocks and the mods as they are passed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch._guards import active_fake_mode

from cute_scalars import LANGUAGE, Scalar, Table


class BlockSparseTensors(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: Tensor | None = None
    dq_write_order_full: Tensor | None = None
    spt: bool | None = None


class Vector(Scalar):
    """Of one element, as the mods get them and return them."""

    def __getitem__(self, place: int) -> Scalar:
        assert place == 0
        return Scalar(self.values)

    def __setitem__(self, place: int, value: Scalar) -> None:
        assert place == 0
        assert value.values.dtype == self.values.dtype
        self.values = value.values

    def load(self) -> Vector:
        return self


def make_rmem_tensor(size: int, kind: Any) -> Vector:
    assert size == 1
    return Vector(kind(0).values)


math = LANGUAGE.cute.math
VECTORS = SimpleNamespace(
    **{name: value for name, value in vars(LANGUAGE).items() if name != "cute"},
    cute=SimpleNamespace(math=math, make_rmem_tensor=make_rmem_tensor),
)


def forward(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
    window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
    intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
    block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None,
    q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
    seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
):  # fmt: skip
    if active_fake_mode() is not None:
        return
    for x in (q, k, v, out):
        assert x.dtype in (torch.bfloat16, torch.float16) and x.stride(-1) == 1
    given = Given(q, k, v, softmax_scale, score_mod, mask_mod, aux_tensors)
    found, lse_found = given.attended(given.seen(block_sparse_tensors, by_query=True))
    out.copy_(rearrange(found, "b h s d -> b s h d"))
    lse.copy_(lse_found)


def backward(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
    num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
    AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
    learnable_sink=None,
):  # fmt: skip
    if active_fake_mode() is not None:
        return
    for x in (q, k, v, out, dout, dq, dk, dv):
        assert x.dtype in (torch.bfloat16, torch.float16) and x.stride(-1) == 1
    given = Given(q, k, v, softmax_scale, score_mod, mask_mod, aux_tensors)
    seen = given.seen(block_sparse_tensors, by_query=False)
    found = given.gradients(seen, out, dout, lse, dlse, score_mod_bwd)
    for grad, value in zip((dq, dk, dv), found, strict=True):
        grad.copy_(value)


class Given:
    """The tensors as [B, Hq, tokens, dim] fp32, and the mods at all their pairs."""

    def __init__(self, q, k, v, scale, score_mod, mask_mod, aux_tensors) -> None:
        self.group = group = q.shape[2] // k.shape[2]
        self.scale = scale
        self.q = rearrange(q.float(), "b s h d -> b h s d")
        self.k, self.v = (repeat(x.float(), "b s h d -> b (h g) s d", g=group) for x in (k, v))
        self.mask_mod, self.score_mod = mask_mod, score_mod
        self.aux = [Table(x) for x in aux_tensors]
        self.raw = self.q @ self.k.mT * scale
        sizes = self.raw.shape
        self.at = [
            Vector(torch.arange(n, dtype=torch.int32).view(-1, *[1] * (3 - axis))) for axis, n in enumerate(sizes)
        ]

    def seen(self, tables: BlockSparseTensors, by_query: bool) -> Tensor:
        """Which pairs are attended to, [B, Hq, S, K]."""
        q_len, kv_len = self.raw.shape[2:]
        verdicts = torch.zeros(q_len, kv_len, dtype=torch.int8)
        lists = ((tables.mask_block_cnt, tables.mask_block_idx, 1), (tables.full_block_cnt, tables.full_block_idx, 2))
        for count, index, verdict in lists:
            assert count.dtype == index.dtype == torch.int32
            rows, cols = tables.block_size if by_query else tables.block_size[::-1]
            assert count.shape[2] == -(-(q_len if by_query else kv_len) // rows), "a count for every row of blocks"
            for row in range(count.shape[2]):
                listed = index[0, 0, row, : count[0, 0, row]].tolist()
                assert listed == sorted(set(listed)), "the last one alone is checked for keys beyond the end"
                for col in listed:
                    at = slice(row * rows, row * rows + rows), slice(col * cols, col * cols + cols)
                    place = verdicts[at if by_query else at[::-1]]
                    assert place.numel() and not place.any(), "a block is listed once, and inside"
                    place.fill_(verdict)
        masked = self.mask_mod(*self.at, None, self.aux).values
        return (verdicts == 2) | ((verdicts == 1) & masked)

    def attended(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """out [B, Hq, S, Dv] and lse [B, Hq, S]."""
        scores = self.scores(seen)
        lse = torch.logsumexp(scores, dim=-1)
        p = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
        return p @ self.v, lse

    def gradients(self, seen: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor, score_mod_bwd=None) -> Any:
        """dq, dk and dv, [B, tokens, heads, dim]."""
        p = (self.scores(seen) - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
        out, dout = (rearrange(x.float(), "b s h d -> b h s d") for x in (out, dout))
        delta = (out * dout).sum(dim=-1) - dlse
        ds = p * (dout @ self.v.mT - delta.unsqueeze(-1))
        if score_mod_bwd is not None:
            ds = self.modified(score_mod_bwd, ds, self.raw)
        yield rearrange(ds @ self.k * self.scale, "b h s d -> b s h d")
        for whole in (ds.mT @ self.q * self.scale, p.mT @ dout):
            yield rearrange(whole, "b (h g) s d -> b s h g d", g=self.group).sum(dim=3)

    def scores(self, seen: Tensor) -> Tensor:
        scores = self.raw if self.score_mod is None else self.modified(self.score_mod, self.raw)
        return scores.masked_fill(~seen, -torch.inf)

    def modified(self, mod, *numbers: Tensor) -> Tensor:
        *b_and_h, q_idx, kv_idx = self.at
        named = {"q_idx": q_idx, "kv_idx": kv_idx, "seqlen_info": None, "aux_tensors": self.aux}
        return mod(*map(Vector, numbers), *b_and_h, **named).values.expand_as(self.raw)


LIBRARY = SimpleNamespace(forward=forward, backward=backward, BlockSparseTensors=BlockSparseTensors, language=VECTORS)

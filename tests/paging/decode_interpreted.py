"""Decoding over ranks by the fused kernels, interpreted, for a process in which Triton interprets: see `interpreted`."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from serving import ALL_HEADS, MASKS, SCORES, Service
from torch import Tensor

import cpflex
from cpflex.paging import traffic
from cpflex.testing import run_ranks


def steps(group: Any, mask: str, score: str, rows: Any, travel: Any, backend: str) -> list[Tensor]:
    """out and lse of three steps: chunks beside single tokens, then single tokens, with splits; NaN in rows of nobody."""
    service = Service(group, seed=3)
    for seq, count in (("a", 30), ("b", 12)):
        service.reserve(seq, count)
    traced, found = cpflex.mask_mod(MASKS[mask], num_heads=ALL_HEADS), []
    plan = None
    for new in ({"a": 21, "b": 4}, {"a": 1, "b": 2}, {"a": 1, "b": 2}):
        if plan is None or not plan.fits(new):
            plan = cpflex.make_decode_plan(traced, service.pages, new, 8, rows, plan, splits=2, travel=travel)
        q, k, v = (service.drawn(heads, sum(new.values()), dim) for heads, dim in ((4, 8), (2, 8), (2, 12)))
        service.pools[0].assign(service.mine(k, plan, keys=True), service.mine(v, plan, keys=True), plan)
        found += cpflex.flex_attention(
            service.mine(q, plan), service.pools[0].k, service.pools[0].v, SCORES[score], plan, enable_gqa=True,
            return_lse=True, kernel_options={"backend": backend},
        )  # fmt: skip
        plan.advance()
    return found


def check(mask: str, score: str, rows: Any, travel: Any = None) -> None:
    """Two ranks, as threads; keys that travel come in waves."""
    with mock.patch.object(traffic, "ROWS_AT_ONCE", 8):
        fused, plain = (
            run_ranks(lambda group, b=b: steps(group, mask, score, rows, travel, b), 2) for b in ("triton", "reference")
        )
    for rank, (mine, twins) in enumerate(zip(fused, plain, strict=True)):
        for x, y in zip(mine, twins, strict=True):
            assert x.shape == y.shape and not x.isnan().any()
            torch.testing.assert_close(x, y, rtol=5e-6, atol=5e-6, msg=lambda said, rank=rank: f"rank {rank}: {said}")

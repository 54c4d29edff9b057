"""Every format with two lengths: an ordinary mask_mod, planned over another sequence's layout, equal to dense attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

import pytest
import torch
from definitions import (
    as_bsr,
    as_intervals,
    dense_blocks,
    dense_bsr,
    dense_flashmask,
    dense_intervals,
    dense_ranges,
    dense_varlen,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from looks import assert_is, look
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import cpflex
from cpflex import masks_from
from cpflex.masks import MaskMod
from cross_cases import CrossProblem, assert_right, on_threads
from oracle import Attention, dense_attention

Q, K = 120, 300
CU_Q, CU_K = [0, 30, 31, 31, 120], [0, 100, 100, 130, 300]
SLICES = [(0, 40), (40, 120), (40, 120)], [(0, 100), (0, 30), (200, 300)], [1, 0, 3]


def table(*lead: int) -> Tensor:
    return torch.rand(*lead, 15, 15, generator=torch.Generator().manual_seed(2)) < 0.3


def columns() -> Tensor:
    return (torch.arange(K) // 60 * 24 + 24).clamp(max=Q).int()[None, None, :, None]


def window() -> Tensor:
    """bool [1, Q, K]: around two fifths, and the first keys."""
    q, k = torch.arange(Q)[:, None], torch.arange(K)
    return (((5 * q - 2 * k).abs() < 90) | (k < 7))[None]


def parts() -> tuple[Tensor, Tensor, Tensor]:
    """indptr, indices and masks inside of blocks of 8 x 20."""
    indptr, indices = as_bsr(table()[None, None])
    return indptr[0, 0], indices, torch.rand(len(indices), 8, 20, generator=torch.Generator().manual_seed(3)) < 0.6


def dense_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return ((5 * q - 2 * k).abs() < 90) | (k < 7)


FORMATS: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {
    "varlen": (
        lambda: masks_from.varlen(CU_Q, CU_K, causal=True, window_size=(50, 0)),
        lambda: dense_varlen(CU_Q, CU_K, True, (50, 0)),
    ),
    "varlen, not all used": (
        lambda: masks_from.varlen(CU_Q, CU_K, causal=True, seqused_k=[60, 0, 30, 150]),
        lambda: dense_varlen(CU_Q, CU_K, True, (-1, -1), [60, 0, 30, 150]),
    ),
    "ranges": (
        lambda: masks_from.ranges(*SLICES, q_len=Q, kv_len=K),
        lambda: dense_ranges(*SLICES, Q, K),
    ),
    "flashmask": (
        lambda: masks_from.flashmask(columns(), True, q_len=Q),
        lambda: dense_flashmask(columns(), True, Q),
    ),
    "intervals": (
        lambda: masks_from.intervals(as_intervals(window()), K),
        lambda: dense_intervals(as_intervals(window()), [Q], [K]),
    ),
    "dense": (lambda: masks_from.dense(window()[None]), lambda: window()),
    "blocks": (
        lambda: masks_from.blocks(table(4), (8, 20)),
        lambda: dense_blocks(table(4), [8] * 15, [20] * 15),
    ),
    "bsr": (lambda: masks_from.bsr(*parts()[:2], (8, 20), kv_len=K), lambda: dense_blocks(table(), [8] * 15, [20] * 15)),
    "bsr, masks inside": (
        lambda: masks_from.bsr(*parts()[:2], (8, 20), kv_len=K, mask=parts()[2]),
        lambda: dense_bsr(parts()[0].tolist(), parts()[1].tolist(), parts()[2], Q, K),
    ),
    "BlockMask": (lambda: create_block_mask(dense_window, None, None, Q, K, device="cpu"), lambda: window()),
}  # fmt: skip


@dataclass(frozen=True)
class Read(CrossProblem):
    """A rectangle whose mask comes from a reader."""

    @cached_property
    def mask_mod(self) -> Any:
        return FORMATS[self.mask][0]()

    def dense(self, precision: torch.dtype = torch.float64) -> Attention:
        seen = FORMATS[self.mask][1]()
        seen = seen.view(*[1] * (4 - seen.ndim), *seen.shape)
        named = [self.tensors[name] for name in ("q", "k", "v", "grad_out", "grad_lse")]

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return seen[b * (seen.shape[0] > 1), h * (seen.shape[1] > 1), q, k]

        return dense_attention(*named, mask_mod, precision=precision)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_of_two_lengths_is_dense_attention_over_other_keys(name: str):
    problem = Read(name, Q, K, "zigzag", world_size=3, score=False)
    results = on_threads(problem)
    assert_right(problem, results)
    assert all(one["unproven"] == 0 for one in results)


@pytest.mark.parametrize("name", FORMATS)
def test_a_reader_returns_an_ordinary_mask_mod(name: str):
    """Planned, combined, and given to torch."""
    made, expected = (make() for make in FORMATS[name])
    mask = cpflex.masks_from.block_mask(made) if isinstance(made, BlockMask) else made
    assert isinstance(mask, MaskMod)
    expected = expected.view(*[1] * (4 - expected.ndim), *expected.shape)
    below = torch.arange(K) <= 2 * torch.arange(Q)[:, None]
    both = mask & (lambda b, h, q, k: k <= 2 * q)
    assert torch.equal(look(both, tuple(expected.shape)), expected & below)  # pyright: ignore
    assert torch.equal(look(~mask, tuple(expected.shape)), ~expected)  # pyright: ignore
    torchs = create_block_mask(mask, None, expected.shape[1], Q, K, device="cpu", BLOCK_SIZE=(8, 20))
    visited = expected.unflatten(3, (15, 20)).unflatten(2, (15, 8)).any(dim=5).any(dim=3)
    assert torch.equal(torchs.to_dense().bool(), visited)


def test_packed_sequences_of_any_lengths_are_flash_attns():
    @settings(max_examples=30, derandomize=True, database=None)
    @given(st.randoms(use_true_random=True))
    def run(rng: Random) -> None:
        count = rng.randint(1, 4)
        lengths = [[rng.choice([0, 1, 3, 8, 13]) for _ in range(count)] for _ in range(2)]
        cu_q, cu_k = ([0, *torch.tensor(n).cumsum(0).tolist()] for n in lengths)
        if not cu_q[-1] or not cu_k[-1]:
            return
        used = [rng.randint(0, n) for n in lengths[1]] if rng.random() < 0.5 else None
        window, causal = (rng.choice([-1, 0, 2, 9]), rng.choice([-1, 0, 4])), rng.random() < 0.5
        mask = masks_from.varlen(cu_q, cu_k, causal=causal, window_size=window, seqused_k=used)
        assert_is(mask, dense_varlen(cu_q, cu_k, causal, window, used), tile=None)

    run()

"""Readers: each format means what its library says, on squares and rectangles, and its tiles are proven."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from definitions import (
    dense_blocks,
    dense_bsr,
    dense_flashmask,
    dense_intervals,
    dense_ranges,
    dense_varlen,
    packed_as_flashinfer,
)
from looks import assert_is, undecided
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import cpflex
from cpflex import masks_from

CU = [0, 8, 9, 9, 30, 48]
OTHER_CU = [0, 3, 20, 26, 40, 56]


# -- packed sequences


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("window", [(-1, -1), (5, -1), (-1, 4), (5, 2), (0, 0), (-1, 0), (100, 0)], ids=str)
@pytest.mark.parametrize("cu_k", [CU, OTHER_CU], ids=["square", "rectangle"])
def test_varlen_is_flash_attns(cu_k: list[int], window: tuple[int, int], causal: bool):
    mask = masks_from.varlen(torch.tensor(CU, dtype=torch.int32), cu_k, causal=causal, window_size=window)
    assert_is(mask, dense_varlen(CU, cu_k, causal, window), tile=None)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("window", [(-1, -1), (5, 2)], ids=str)
@pytest.mark.parametrize(
    ("cu_k", "used"), [(CU, [8, 0, 0, 9, 18]), (OTHER_CU, [0, 17, 1, 14, 15]), (CU, [8, 1, 0, 21, 18])], ids=str
)
def test_keys_that_are_not_used_are_hidden_and_move_the_diagonal(
    cu_k: list[int], used: list[int], window: tuple[int, int], causal: bool
):
    """A cache with room: torch's and flash-attn's seqused_k."""
    options: dict[str, Any] = {"causal": causal, "window_size": window}
    mask = masks_from.varlen(CU, cu_k, **options, seqused_k=torch.tensor(used, dtype=torch.int32))
    assert_is(mask, dense_varlen(CU, cu_k, causal, window, used), tile=None)


def test_no_tile_of_keys_that_are_not_used_is_left_unproven():
    cu, used = [0, 16, 32, 64], [8, 16, 24]
    mask = masks_from.varlen(cu, seqused_k=used)
    assert_is(mask, dense_varlen(cu, cu, False, (-1, -1), used), tile=8)


@pytest.mark.parametrize(("q_len", "kv_len"), [(3, 5), (2, 7), (4, 4)], ids=str)
def test_causal_of_one_sequence_is_torchs_lower_right_mask(q_len: int, kv_len: int):
    torchs = causal_lower_right(q_len, kv_len)._materialize("cpu")
    assert_is(masks_from.varlen([0, q_len], [0, kv_len], causal=True), torchs, tile=None)
    assert_is(masks_from.ranges([(0, q_len)], [(0, kv_len)], 1, q_len=q_len, kv_len=kv_len), torchs, tile=None)


def test_varlen_draws_what_its_docstring_does():
    drawn = [
        line.split()
        for line in (masks_from.varlen.__doc__ or "").splitlines()
        if set(line.strip()) in ({"1", "."}, {"."})
    ]
    mask = masks_from.varlen([0, 3, 7], [0, 5, 7], causal=True)
    assert_is(mask, torch.tensor([[x == "1" for x in row] for (row,) in drawn]), tile=None)


def test_queries_in_order_are_the_masks_that_there_are():
    """So that a plan from varlen is the plan of causal & document."""
    own = cpflex.document(cu_seqlens=CU)
    for mask, expected in (
        (masks_from.varlen(CU, causal=True), own & cpflex.causal()),
        (masks_from.varlen(CU, causal=True, window_size=(4, 9)), own & (cpflex.causal() & cpflex.sliding_window(5))),
    ):
        plans = [cpflex.make_plan(one, CU[-1], rank=0, world_size=2) for one in (mask, expected)]
        assert plans[0].kinds["mask"].mask.content_key == plans[1].kinds["mask"].mask.content_key


def test_one_query_per_sequence_sees_all_its_keys():
    """A decode step: aligned at the last key, so causal hides nothing."""
    mask = masks_from.varlen([0, 1, 2], [0, 5, 12], causal=True)
    assert_is(mask, dense_blocks(torch.eye(2, dtype=torch.bool), [1, 1], [5, 7]), tile=None)


# -- FlashMask


def columns_of(causal: bool, forms: int, size: tuple[int, int, int], q_len: int) -> Tensor:
    random = torch.Generator().manual_seed(forms + causal)
    return torch.randint(0, q_len + 1, (*size, forms), generator=random, dtype=torch.int32)


@pytest.mark.parametrize(("causal", "forms"), [(True, 1), (True, 2), (False, 2), (False, 4)], ids=str)
@pytest.mark.parametrize("q_len", [24, 17, 40])
@pytest.mark.parametrize("heads", [(1, 1), (2, 3)], ids=str)
def test_flashmask_is_paddles(causal: bool, forms: int, q_len: int, heads: tuple[int, int]):
    columns = columns_of(causal, forms, (*heads, 24), q_len)
    mask = masks_from.flashmask(columns, causal, q_len=q_len)
    assert_is(mask, dense_flashmask(columns, causal, q_len), tile=None)


FLASHMASKS = {
    "causal": (True, lambda s: torch.full((s, 1), s)),
    "causal documents": (True, lambda s: torch.tensor([8, 8, 32, s]).repeat_interleave(s // 4)[:, None].clamp(min=8)),
    "sliding window": (True, lambda s: (torch.arange(s) + 9).clamp(max=s)[:, None]),
    "bidirectional window": (False, lambda s: torch.stack([torch.arange(s) + 9, torch.arange(s) - 5], 1).clamp(0, s)),
    "full": (False, lambda s: torch.tensor([[s, 0]]).expand(s, 2)),
    "global and window": (
        False,
        lambda s: torch.stack(
            [torch.where(torch.arange(s) < 8, s, torch.arange(s) + 8).clamp(max=s), torch.full((s,), s)]
            + [
                torch.where(torch.arange(s) < 8, 0, 8),
                torch.where(torch.arange(s) < 8, 0, torch.arange(s) - 7).clamp(min=0),
            ],
            1,
        ),
    ),
    "prefix of 16": (
        False,
        lambda s: torch.stack([torch.full((s,), s), torch.where(torch.arange(s) < 16, 0, torch.arange(s))], 1),
    ),
    "nothing": (True, lambda s: torch.zeros(s, 1, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", FLASHMASKS)
def test_no_tile_of_a_flashmask_that_people_use_is_left_unproven(name: str):
    causal, make = FLASHMASKS[name]
    columns = make(64).int()[None, None]
    assert_is(masks_from.flashmask(columns, causal), dense_flashmask(columns, causal, 64), tile=8)


def test_columns_of_key_heads_serve_their_groups_of_query_heads():
    columns = columns_of(True, 2, (1, 2, 24), 24)
    grouped = dense_flashmask(columns, True, 24).repeat_interleave(3, dim=1)
    assert_is(masks_from.flashmask(columns, True, num_heads=6), grouped, tile=None)


# -- MagiAttention

SLICES: dict[str, tuple[list, list, list, int, int]] = {
    "causal documents": ([(0, 8), (8, 24), (24, 48)], [(0, 8), (8, 24), (24, 48)], [1, 1, 1], 48, 48),
    "each type, as drawn": ([(i, i + 3) for i in (0, 3, 6, 9)], [(0, 5)] * 4, [0, 1, 2, 3], 12, 5),
    "each type, more queries than keys": ([(i, i + 5) for i in (0, 5, 10, 15)], [(1, 3)] * 4, [0, 1, 2, 3], 20, 4),
    "a query in several ranges": ([(0, 16), (8, 16), (8, 40)], [(0, 8), (8, 16), (24, 40)], [0, 1, 2], 40, 40),
    "a window as Magi slices it": ([(0, 4), (4, 20)], [(0, 4), (1, 20)], [1, 3], 20, 20),
    "touching ranges": ([(0, 16), (0, 16)], [(0, 8), (8, 16)], [0, 0], 16, 16),
    "none": ([], [], [], 8, 8),
    "empty ranges": ([(4, 4), (0, 8)], [(0, 8), (8, 8)], [0, 1], 8, 8),
}


@pytest.mark.parametrize("name", SLICES)
def test_ranges_are_magis(name: str):
    q, k, types, q_len, kv_len = SLICES[name]
    mask = masks_from.ranges(q, k, types, q_len=q_len, kv_len=kv_len)
    assert_is(mask, dense_ranges(q, k, types, q_len, kv_len), tile=None)


class AttnMaskType(enum.Enum):
    FULL = "full"
    BICAUSAL = "bi_causal"


def test_ranges_are_read_as_magi_holds_them():
    q, k = [(0, 4), (4, 8)], [(0, 4), (2, 8)]
    expected = dense_ranges(q, k, [0, 3], 8, 8)
    for types in ([0, 3], torch.tensor([0, 3]), ["FULL", "bi_causal"], [AttnMaskType.FULL, AttnMaskType.BICAUSAL]):
        assert_is(masks_from.ranges(torch.tensor(q), torch.tensor(k), types, q_len=8), expected, tile=None)
    attn_ranges = [[SimpleNamespace(start=x, end=y) for x, y in pairs] for pairs in (q, k)]
    assert_is(masks_from.ranges(*attn_ranges, types=[0, 3], q_len=8), expected, tile=None)
    assert_is(masks_from.ranges(q, k, 1, q_len=8), dense_ranges(q, k, [1, 1], 8, 8), tile=None)


def test_many_full_ranges_of_a_query_become_a_table():
    q, k = [(0, 40)] * 40 + [(40, 80)] * 2, [(2 * i, 2 * i + 1) for i in range(40)] + [(0, 8), (8, 80)]
    mask = masks_from.ranges(q, k, q_len=80)
    assert_is(mask, dense_ranges(q, k, [0] * 42, 80, 80), tile=8)


# -- cuDNN


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("ends", [1, 3, 5])
@pytest.mark.parametrize("kv_len", [24, 40])
def test_intervals_are_cudnns(heads: int, ends: int, kv_len: int):
    mask_func = torch.randint(0, kv_len + 1, (heads, ends, 48)).sort(dim=1).values.int()
    expected = dense_intervals(mask_func, [48], [kv_len])
    assert_is(masks_from.intervals(mask_func, kv_len), expected, tile=None)
    batched = torch.stack([dense_intervals(part, [24], [kv_len]) for part in mask_func.chunk(2, dim=2)])
    assert_is(masks_from.intervals(mask_func, kv_len, batch_size=2), batched, tile=None)


def test_intervals_of_packed_sequences_count_from_their_own_first_key():
    keys = torch.tensor(OTHER_CU).diff()
    limit = keys.repeat_interleave(torch.tensor(CU).diff())
    mask_func = (torch.rand(2, 3, CU[-1]) * (limit + 1)).int().sort(dim=1).values
    expected = dense_intervals(mask_func, torch.tensor(CU).diff().tolist(), keys.tolist())
    mask = masks_from.intervals(mask_func, cu_seqlens_q=CU, cu_seqlens_k=OTHER_CU)
    shared = torch.zeros(CU[-1], OTHER_CU[-1], dtype=torch.bool)
    for q0, q1, k0, k1 in zip(CU, CU[1:], OTHER_CU, OTHER_CU[1:], strict=False):
        shared[q0:q1, k0:k1] = True
    assert not (expected & ~shared).any()
    assert_is(mask, expected, tile=None)


def test_no_tile_of_a_window_with_sinks_is_left_unproven():
    place = torch.arange(64)
    mask_func = torch.stack(
        [torch.full((64,), 8).minimum(place + 1), (place - 15).clamp(min=8), place.clamp(min=7) + 1]
    )
    assert_is(masks_from.intervals(mask_func[None]), dense_intervals(mask_func[None], [64], [64]), tile=8)


# -- tables of blocks


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("size", [8, (16, 8), (1, 8), (5, 3)], ids=str)
def test_blocks_are_blown_up(size: Any, lead: tuple[int, ...], density: float):
    table = torch.rand(*lead, 6, 9) < density
    q_size, kv_size = size if isinstance(size, tuple) else (size, size)
    q_len, kv_len = 6 * q_size - q_size // 2, 9 * kv_size - 2
    expected = dense_blocks(table, [q_size] * 6, [kv_size] * 9)[..., :q_len, :kv_len]
    mask = masks_from.blocks(table.int(), size, q_len=q_len, kv_len=kv_len)
    assert_is(mask, expected, tile=8 if kv_size == 8 and q_size % 8 == 0 else None)


def test_blocks_have_sizes_of_their_own():
    """FlashInfer's example of VariableBlockSparseAttentionWrapper."""
    table = torch.tensor([[0, 0, 1], [1, 0, 1], [0, 1, 1]])
    mask = masks_from.blocks(table[None], (torch.tensor([1, 2, 3]), torch.tensor([3, 1, 2])))
    assert_is(mask, dense_blocks(table.bool(), [1, 2, 3], [3, 1, 2]), tile=None)
    irregular = torch.rand(12, 12) < 0.5
    sizes = torch.tensor([0, 3, 1, 8, 2, 2, 5, 1, 1, 1, 4, 4])
    mask = masks_from.blocks(irregular, (sizes, 2))
    assert_is(mask, dense_blocks(irregular, sizes.tolist(), [2] * 12), tile=None)


def test_bsr_is_flashinfers():
    """Its example: M = N = 3, blocks of one."""
    indptr, indices = torch.tensor([0, 1, 3, 5], dtype=torch.int32), torch.tensor([2, 0, 2, 1, 2], dtype=torch.int32)
    expected = torch.tensor([[0, 0, 1], [1, 0, 1], [0, 1, 1]]).bool()
    assert_is(masks_from.bsr(indptr, indices, 1, q_len=3, kv_len=3), expected, tile=None)
    assert_is(masks_from.bsr(indptr, indices, (4, 2), kv_len=5), dense_blocks(expected, [4] * 3, [2, 2, 1]), tile=None)


INDPTR, INDICES = [0, 2, 2, 5, 6], [3, 0, 1, 0, 2, 3]
"""Four rows of blocks, one of them without any, and of four blocks of keys; in any order."""


@pytest.mark.parametrize("size", [(16, 8), (8, 24), (3, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_masks_inside_of_blocks_are_flashinfers(size: tuple[int, int], density: float):
    mask = torch.rand(len(INDICES), *size) < density
    mask[1], mask[4] = True, torch.ones(size).tril().bool()
    kv_len = 4 * size[1] - size[1] // 2
    expected = dense_bsr(INDPTR, INDICES, mask, 4 * size[0], kv_len)
    given: dict[str, Any] = {"block_size": size, "q_len": 4 * size[0], "kv_len": kv_len}
    exact = 8 if size[0] % 8 == size[1] % 8 == 0 else None
    assert_is(masks_from.bsr(INDPTR, INDICES, **given, mask=mask), expected, tile=exact)
    assert_is(masks_from.bsr(INDPTR, INDICES, **given, mask=packed_as_flashinfer(mask, INDPTR)), expected, tile=exact)
    ragged = {**given, "q_len": 3 * size[0] + 1}
    assert_is(masks_from.bsr(INDPTR, INDICES, **ragged, mask=mask), expected[: 3 * size[0] + 1], tile=None)


def test_masks_inside_of_blocks_of_each_head():
    indptr = torch.tensor([[INDPTR, [6 + n for n in INDPTR]]])
    mask = torch.rand(2 * len(INDICES), 8, 8) < 0.5
    heads = [dense_bsr(INDPTR, INDICES, part, 32, 32) for part in mask.chunk(2)]
    read = masks_from.bsr(indptr, 2 * INDICES, 8, kv_len=32, mask=mask, num_heads=4)
    assert_is(read, torch.stack(heads).repeat_interleave(2, dim=0), tile=None)


def test_a_selection_per_token_and_key_head_is_read_as_nsa_makes_it():
    indices = torch.tensor([[[[0, -1], [0, 0], [1, 0], [1, -1]], [[-1, -1], [1, 0], [2, 0], [2, 1]]]])
    table = torch.zeros(1, 2, 4, 3, dtype=torch.bool)
    for head in range(2):
        for row in range(4):
            table[0, head, row, indices[0, head, row][indices[0, head, row] >= 0]] = True
    expected = dense_blocks(table, [1] * 4, [2] * 3)[..., :5].repeat_interleave(2, dim=1)
    assert_is(masks_from.selected(indices, (1, 2), q_len=4, kv_len=5, num_heads=4), expected, tile=None)


def test_a_table_too_large_to_be_kept_is_intervals_of_each_query():
    indices = torch.arange(0, 9000, 1000).expand(9000, 9)
    mask = masks_from.selected(indices, 1, q_len=9000)
    q, k = torch.tensor([[0], [8999]]), torch.arange(9000)
    assert torch.equal(mask(torch.tensor(0), torch.tensor(0), q, k), (k % 1000 == 0).expand(2, 9000))


# -- dense


@pytest.mark.parametrize("lead", [(), (1, 1), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize(
    "make", [lambda *s: torch.rand(s) < 0.5, lambda *s: torch.ones(s).tril(2).bool()], ids=["random", "band"]
)
def test_dense_masks_are_themselves_bool_or_additive(make: Callable, lead: tuple[int, ...]):
    seen = make(*lead, 24, 40)
    assert_is(masks_from.dense(seen), seen, tile=8)
    for hidden in (-math.inf, torch.finfo(torch.float32).min, -65504.0):
        additive = torch.zeros(seen.shape).masked_fill(~seen, hidden)
        assert_is(masks_from.dense(additive), seen, tile=8)
    half = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    assert_is(masks_from.dense(half), seen, tile=8)


@pytest.mark.hf
def test_the_four_dimensional_mask_of_transformers_is_read():
    masking = pytest.importorskip("transformers.masking_utils")
    padding = torch.ones(2, 24, dtype=torch.bool)
    padding[1, 17:] = False
    make = {"batch_size": 2, "cache_position": torch.arange(24), "kv_length": 24, "attention_mask": padding}
    try:
        additive = masking.eager_mask(**make)
    except TypeError:  # as newer releases call it
        make = {"batch_size": 2, "q_length": 24, "kv_length": 24, "attention_mask": padding}
        additive = masking.eager_mask(**make)
    expected = torch.ones(24, 24).tril().bool() & padding[:, None, None]
    assert_is(masks_from.dense(additive), expected, tile=8)


# -- what cannot be read

ONES = torch.ones(4, 4)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "varlen: falls": (lambda: masks_from.varlen([0, 5, 3]), ValueError, "cu_seqlens_q must start at 0 and never fall"),
    "varlen: floats": (lambda: masks_from.varlen(torch.tensor([0.0, 4.0])), ValueError, "must be integers"),
    "varlen: no token": (lambda: masks_from.varlen([0, 0]), ValueError, "at least 1"),
    "varlen: other sequences": (lambda: masks_from.varlen([0, 4], [0, 2, 4]), ValueError, "equally many; got|sequences; got 1 and 2"),
    "varlen: pages": (
        lambda: masks_from.varlen([0, 4], block_table=torch.zeros(1, 4).int()), NotImplementedError, "keys that lie in pages",
    ),
    "varlen: used of fewer sequences": (
        lambda: masks_from.varlen([0, 4, 8], seqused_k=[4]), ValueError, "each of 2 sequences; got 1",
    ),
    "varlen: more used than there are": (
        lambda: masks_from.varlen([0, 4, 8], seqused_k=[4, 5]), ValueError, "got 5 of 4 for sequence 1",
    ),
    "varlen: window of -2": (lambda: masks_from.varlen([0, 4], window_size=(-2, 0)), ValueError, "integers of at least -1"),
    "varlen: window of one": (lambda: masks_from.varlen([0, 4], window_size=4), ValueError, r"\(left, right\)"),
    "flashmask: causal of four": (
        lambda: masks_from.flashmask(torch.zeros(1, 1, 4, 4).int(), True),
        ValueError,
        r"1 or 2\] with causal=True",
    ),
    "flashmask: one, not causal": (lambda: masks_from.flashmask(torch.zeros(1, 1, 4, 1).int(), False), ValueError, "2 or 4"),
    "flashmask: rows beyond": (lambda: masks_from.flashmask(torch.full((1, 1, 4, 1), 5), True), ValueError, "0 to q_len=4"),
    "flashmask: rows below": (lambda: masks_from.flashmask(torch.full((1, 1, 4, 1), -1), True), ValueError, "got -1 .. -1"),
    "flashmask: three dims": (lambda: masks_from.flashmask(torch.zeros(1, 4, 1).int(), True), ValueError, r"\[B, H, kv_len, n\]"),
    "flashmask: heads": (
        lambda: masks_from.flashmask(torch.zeros(1, 2, 4, 1).int(), True, num_heads=3),
        ValueError,
        "has 2 heads; num_heads=3 must be a multiple",
    ),
    "ranges: out of the sequence": (lambda: masks_from.ranges([(0, 9)], [(0, 4)], q_len=8), ValueError, r"within 0 .. 8; got \[0, 9\]"),
    "ranges: backwards": (lambda: masks_from.ranges([(3, 1)], [(0, 4)], q_len=8), ValueError, "from start to end"),
    "ranges: unequal": (lambda: masks_from.ranges([(0, 1)], [(0, 4), (4, 5)], q_len=8), ValueError, "equally many; got 1 and 2"),
    "ranges: a fifth type": (lambda: masks_from.ranges([(0, 1)], [(0, 4)], [4], q_len=8), ValueError, "must be one of"),
    "ranges: types": (lambda: masks_from.ranges([(0, 1)], [(0, 4)], [0, 0], q_len=8), ValueError, "or one each: 1; got 2"),
    "ranges: floats": (lambda: masks_from.ranges([(0.0, 1.0)], [(0, 4)], q_len=8), ValueError, "integers"),
    "ranges: overlap": (
        lambda: masks_from.ranges([(0, 4), (2, 6)], [(0, 4), (3, 6)], q_len=8),
        ValueError,
        "query 2 sees key 3 in two",
    ),
    "ranges: a table overlaps": (
        lambda: masks_from.ranges([(0, 80)] * 40, [(2 * i, 2 * i + 3) for i in range(38)] + [(0, 0)] * 2, q_len=80),
        ValueError,
        "query 0 sees key 2 in two",
    ),
    "ranges: many that are causal": (
        lambda: masks_from.ranges([(0, 80)] * 40, [(2 * i, 2 * i + 1) for i in range(40)], "causal", q_len=80),
        NotImplementedError,
        "40 ranges of keys for one query",
    ),
    "intervals: even": (lambda: masks_from.intervals(torch.zeros(1, 2, 4).int()), ValueError, "odd n"),
    "intervals: fall": (lambda: masks_from.intervals(torch.tensor([[[3], [2], [4]]])), ValueError, "must rise"),
    "intervals: beyond": (lambda: masks_from.intervals(torch.tensor([[[3]]])), ValueError, "not exceed"),
    "intervals: too many": (lambda: masks_from.intervals(torch.zeros(1, 33, 4).int()), NotImplementedError, "17 intervals"),
    "intervals: batch": (lambda: masks_from.intervals(torch.zeros(1, 1, 5).int(), batch_size=2), ValueError, "does not divide"),
    "intervals: one cu_seqlens": (
        lambda: masks_from.intervals(torch.zeros(1, 1, 5).int(), cu_seqlens_q=[0, 5]),
        ValueError,
        "go together",
    ),
    "intervals: other queries": (
        lambda: masks_from.intervals(torch.zeros(1, 1, 5).int(), cu_seqlens_q=[0, 4], cu_seqlens_k=[0, 4]),
        ValueError,
        "of 5 queries in all",
    ),
    "dense: a bias": (lambda: masks_from.dense(-ONES), ValueError, "a bias: pass score_mod"),
    "dense: nan": (lambda: masks_from.dense(ONES * math.nan), ValueError, "a bias"),
    "dense: integers": (lambda: masks_from.dense(ONES.int()), ValueError, "compare it"),
    "dense: three dims": (lambda: masks_from.dense(ONES[None]), ValueError, r"\[Q, K\] or \[B, H, Q, K\]"),
    "blocks: floats": (lambda: masks_from.blocks(ONES, 4), ValueError, "bool or integers"),
    "blocks: numbers": (lambda: masks_from.blocks(2 * ONES.int(), 4), ValueError, "0 and 1"),
    "blocks: lengths": (lambda: masks_from.blocks(ONES.bool(), 4, q_len=17), ValueError, "4 blocks of 4 q tokens; q_len=17 has 5"),
    "blocks: no size": (lambda: masks_from.blocks(ONES.bool(), 0), ValueError, "at least 1, or a tensor"),
    "blocks: sizes": (lambda: masks_from.blocks(ONES.bool(), (torch.tensor([1, 2]), 4)), ValueError, "must be 4, as many"),
    "selected: large and irregular": (
        lambda: masks_from.selected(torch.arange(0, 9000, 500).expand(9000, 18), 1, q_len=9000),
        NotImplementedError,
        "use larger blocks",
    ),
    "selected: beyond": (lambda: masks_from.selected(torch.tensor([[4]]), 4, q_len=4), ValueError, "from 0 to 0, or -1"),
    "selected: floats": (lambda: masks_from.selected(ONES, 4, q_len=16), ValueError, "must be integers"),
    "bsr: end": (lambda: masks_from.bsr([0, 1], [0, 0], 4, kv_len=4), ValueError, "ends at 1; there are 2 indices"),
    "bsr: falls": (lambda: masks_from.bsr([0, 2, 1], [0, 1], 4, kv_len=8), ValueError, "never fall"),
    "bsr: twice": (lambda: masks_from.bsr([0, 2], [1, 1], 4, kv_len=8), ValueError, "counted twice"),
    "bsr: a mask of other blocks": (
        lambda: masks_from.bsr([0, 1], [0], 4, kv_len=8, mask=ONES.bool()), ValueError, r"bool \(1, 4, 4\), one for each",
    ),
    "bsr: a packed mask of other blocks": (
        lambda: masks_from.bsr([0, 1], [0], 4, kv_len=8, mask=torch.zeros(3, dtype=torch.uint8)), ValueError, "has 2 bytes; got 3",
    ),
    "bsr: a packed mask of a shorter row": (
        lambda: masks_from.bsr([0, 1], [0], 4, q_len=3, kv_len=8, mask=torch.zeros(2, dtype=torch.uint8)),
        ValueError,
        "whole rows of blocks",
    ),
    "bsr: a large table with many masks in a row": (
        lambda: masks_from.bsr(
            [0, *[5] * 9000], torch.arange(5), 2, kv_len=18000, mask=torch.eye(2, dtype=torch.bool).expand(5, 2, 2)
        ),
        NotImplementedError,
        "67,108,864, with masks inside of them",
    ),
    "bsr: beyond": (lambda: masks_from.bsr([0, 1], [2], 4, kv_len=8), ValueError, "from 0 to 1; got 2 .. 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_cannot_be_is_refused(name: str):
    make, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("length", [23, 25])
def test_a_mask_that_was_read_is_refused_for_another_length(length: int):
    with pytest.raises(ValueError, match=f"was made for .*24.* tokens; seq_len={length}"):
        cpflex.make_plan(masks_from.intervals(torch.ones(1, 1, 24).int()), length)


def test_a_reader_keeps_no_hold_of_what_it_read():
    mask_func = torch.full((1, 1, 8), 3)
    mask = masks_from.intervals(mask_func)
    expected = dense_intervals(mask_func, [8], [8])
    mask_func.zero_()
    assert_is(mask, expected, tile=None)


def test_undecided_tiles_are_noticed_by_these_tests():
    opaque = cpflex.masks_from.dense(torch.ones(16, 16, dtype=torch.bool))
    hidden = type(opaque)(lambda b, h, q, k: torch.sin(q - q + 0.0) * (k + 1) > -1.0, "opaque", [16])
    assert undecided(hidden, torch.ones(1, 1, 16, 16, dtype=torch.bool), 8) == 4

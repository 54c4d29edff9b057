"""The fused kernels of pages compute what their torch twins and the dense oracle do, and compile for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ahead_of_time
import interpreted
import paged_interpreted
import pytest
import torch
from ahead_of_time import CAPABILITIES, launches_compile
from paged import Paged
from test_pages import PROBLEMS

from cpflex.kernels import attend_pages, combining, decode, empty_partials, tuning

Run = Callable[..., Any]
SMALL = {"lens": (70, 17, 40), "new": (1, 3, 2)}


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with interpreted.interpreting() as call:
        yield call


@pytest.mark.parametrize(
    "problem",
    [
        Paged("by_head", "alibi", lens=(70, 17), new=(1, 3)),
        Paged("tree", "softcap", lens=(35,), new=(5,), dims=(80, 24), dtype="bf16", world_size=1),
    ],
    ids=str,
)
def test_fused_partials_equal_their_twin_and_combine_to_dense_attention(run: Run, problem: Paged):
    run(paged_interpreted.check, problem)


@pytest.mark.by_day(12)
@pytest.mark.parametrize(
    "problem",
    [
        *PROBLEMS,
        Paged("causal", "alibi", **SMALL, heads="mqa", dtype="bf16", world_size=1),
        Paged("by_sequence", "key_bias", dims=(192, 128), **SMALL),
        Paged("window", "by_sequence", dims=(64, 256), **SMALL, dtype="fp16"),
        Paged("late", "softcap", dims=(96, 96), **SMALL, dtype="bf16", world_size=4),
    ],
    ids=str,
)
def test_other_masks_heads_and_dims_do_so_too(run: Run, problem: Paged):
    run(paged_interpreted.check, problem)


@pytest.mark.by_day(2)
@pytest.mark.parametrize(("block_q", "block_kv"), [(16, 16), (32, 32)])
def test_rows_and_keys_may_come_in_several_blocks(run: Run, block_q: int, block_kv: int):
    run(
        paged_interpreted.check,
        Paged(lens=(90, 33), new=(9, 1), heads="mqa", page_size=64, world_size=1),
        block_q,
        block_kv,
    )


@pytest.mark.parametrize(
    "check",
    [
        paged_interpreted.check_bits,
        paged_interpreted.check_a_page_fills_while_tables_last,
        paged_interpreted.check_combine,
        paged_interpreted.check_any_strides,
    ],
    ids=lambda check: check.__name__,
)
def test_pages_at_the_edges(run: Run, check: Callable[[], None]):
    run(check)


# -- compiled ahead of time


def compiled(capability: int, problem: Paged) -> list[ahead_of_time.Variant]:
    work, parts = problem.work(0)
    q, k, v = (problem.tensors[name] for name in "qkv")
    into = empty_partials(work.num_partials, q.shape[1], v.shape[3], q.device)
    with launches_compile(capability) as variants:
        decode.attend_pages(q, k, v, work, problem.call("triton"), into)
        combining.combine(into, parts, into)
    return variants


MODS = [("causal", "none"), ("by_head", "alibi"), ("window", "softcap")]
ROWS = {"one token": (1, "gqa"), "eight tokens": (8, "gqa"), "seventy heads": (1, "wide")}
"""16, 32, and the most that a block has."""
UNDER_WAY_KIB = {64: 3 * 16, 128: 2 * 32, 256: 2 * 32}
"""K and V of all blocks that are loaded while one is computed with."""


@pytest.mark.by_day(28)
@pytest.mark.parametrize("mods", MODS, ids="-".join)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_decode_uses_tensor_cores_does_not_spill_and_keeps_loads_coming(
    monkeypatch: pytest.MonkeyPatch, capability: int, head_dim: int, rows: str, mods: tuple[str, str]
):
    new, heads = ROWS[rows]
    dims = (head_dim, head_dim)
    problem = Paged(*mods, (130,), (new,), heads, dims, dtype="bf16", page_size=64, world_size=1)
    most = tuning.rows_for(capability, torch.bfloat16)["decode", head_dim].block_q
    if heads != "wide" or most < 64:  # 16 and 32 rows are multiplied by mma.sync on every GPU
        monkeypatch.setitem(ahead_of_time.TENSOR_CORE_OP, capability, "HMMA")
    kernel, combining_kernel = (ahead_of_time.report(x, capability) for x in compiled(capability, problem))
    assert (kernel.name, combining_kernel.name) == ("decode_kernel", "combine_kernel")
    print(ahead_of_time.HEADER, kernel, sep="\n")
    assert kernel.spills_in_loops == 0 == combining_kernel.spilled_bytes
    assert kernel.spilled_bytes <= 16, kernel  # sm_80, D 64, 32 rows with softcap, which ptxas fits into 128 registers
    assert kernel.tensor_core_ops > 0 and len(kernel.instructions) == 1
    assert kernel.shared_bytes >= UNDER_WAY_KIB[head_dim] << 10, "loads wait for one another"


def test_other_lengths_pages_splits_batches_and_pools_compile_nothing():
    with launches_compile(90) as variants:
        for lens, new, page_size, split in [((70, 35), (1, 1), 16, 3), ((300,), (2,), 64, 1), ((129, 1, 64), (2, 1, 1), 32, 7)]:  # fmt: skip
            problem = Paged("window", "alibi", lens, new, page_size=page_size, pages_per_split=split, dims=(64, 64), dtype="bf16")  # fmt: skip
            work, parts = problem.work(1)
            q, k, v = (problem.tensors[name] for name in "qkv")
            into = empty_partials(work.num_partials, q.shape[1], v.shape[3], q.device)
            decode.attend_pages(q, k, v, work, problem.call("triton"), into)
            combining.combine(into, parts, into)
    assert sorted(variant.name for variant in variants) == ["combine_kernel", "decode_kernel"]


@pytest.mark.parametrize("head_dim", [64, 256])
def test_fp32_is_decoded_without_tensor_cores(head_dim: int):
    problem = Paged(lens=(130,), new=(1,), dims=(head_dim, head_dim), page_size=64, world_size=1)
    row = ahead_of_time.report(compiled(90, problem)[0], 90)
    assert row.tensor_core_ops == 0 == row.spilled_bytes


def test_cpu_tensors_are_refused_where_the_kernels_of_pages_are_not_interpreted():
    problem = Paged(lens=(20,), new=(1,), world_size=1)
    q, k, v = (problem.tensors[name] for name in "qkv")
    with pytest.raises(ValueError, match="CUDA tensors"):
        attend_pages(q, k, v, problem.work(0)[0], problem.call("triton"))


def test_each_gpu_has_rows_for_pages():
    for capability in (80, 86, 90, 100, 120):
        for dtype in (torch.bfloat16, torch.float32):
            rows = tuning.rows_for(capability, dtype)
            assert all((which, width) in rows for which in tuning.PAGE_PASSES for width in tuning.WIDTHS)

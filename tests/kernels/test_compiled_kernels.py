"""The fused kernels as GPUs that are not here would run them: compiled ahead of time, read as machine code."""

from __future__ import annotations

import itertools

import ahead_of_time
import pytest
import torch
from ahead_of_time import CAPABILITIES, HEAD_DIMS, MODS, OTHER_HEAD_DIMS, Report, launches_compile

import cpflex
from cpflex.kernels import Call, backward, delta, empty, forward, tuning
from cpflex.ring.handles import resolve

INSTRUCTIONS = {  # of the masked and of the full loop; Triton 3.7.1, bf16
    (80, 128, "causal", "none", "attend_kernel"): (936, 715),
    (80, 128, "causal", "none", "dq_kernel"): (816, 566),
    (80, 128, "causal", "none", "dkdv_kernel"): (1044, 822),
    (80, 128, "doc_causal", "alibi", "attend_kernel"): (1172, 893),
    (80, 128, "doc_causal", "alibi", "dq_kernel"): (1079, 744),
    (80, 128, "doc_causal", "alibi", "dkdv_kernel"): (1434, 1018),
    (80, 128, "doc_causal", "softcap", "attend_kernel"): (1591, 1293),
    (80, 128, "doc_causal", "softcap", "dq_kernel"): (1624, 1272),
    (80, 128, "doc_causal", "softcap", "dkdv_kernel"): (2054, 1568),
    (90, 64, "causal", "none", "attend_kernel"): (535, 337),
    (90, 64, "doc_causal", "alibi", "attend_kernel"): (760, 532),
    (90, 64, "doc_causal", "softcap", "attend_kernel"): (1193, 914),
    (90, 128, "causal", "none", "attend_kernel"): (556, 372),
    (90, 128, "causal", "none", "dq_kernel"): (542, 318),
    (90, 128, "doc_causal", "alibi", "attend_kernel"): (797, 565),
    (90, 128, "doc_causal", "alibi", "dq_kernel"): (797, 511),
    (90, 128, "doc_causal", "softcap", "attend_kernel"): (1232, 952),
    (90, 128, "doc_causal", "softcap", "dq_kernel"): (1351, 1029),
}
TOLERATED = 1.03
"""Of the instructions of a loop."""


def spills_in_loops_allowed(row: Report, capability: int, head_dim: int) -> int:
    """Instructions of both loops that dq, dk and dv of sm_80 up to 128 dims pay for a second program (docs/kernels.md)."""
    if capability != 80 or not 64 < head_dim <= 128:
        return 0
    return {"attend_kernel": 0, "dq_kernel": 2, "dkdv_kernel": 56}[row.name]


@pytest.mark.by_day(12)
@pytest.mark.parametrize(
    ("capability", "head_dim", "mask", "score"),
    [
        pytest.param(capability, head_dim, *mods, id=f"sm_{capability}-D{head_dim}-{'-'.join(mods)}")
        for capability, head_dim, mods in itertools.product(CAPABILITIES, HEAD_DIMS, MODS)
    ],
)
def test_kernels_use_tensor_cores_do_not_spill_and_do_not_wait(capability: int, head_dim: int, mask: str, score: str):
    rows = ahead_of_time.compile_all(capability, head_dim, mask, score)
    print(ahead_of_time.HEADER, *rows, sep="\n")
    assert [row.name for row in rows] == ["attend_kernel", "dq_kernel", "dkdv_kernel"]
    for row in rows:
        assert row.tensor_core_ops > 0, row
        assert len(row.instructions) >= 2, f"the masked and the full loop are not both there: {row}"
        assert not row.is_serialised, row
        may_spill = spills_in_loops_allowed(row, capability, head_dim)
        assert row.spilled_bytes <= (160 if may_spill > 2 else 8), row  # 8: dk, dv of sm_90, D 128 with softcap
        assert row.spills_in_loops <= may_spill, row
        figures = INSTRUCTIONS.get((capability, head_dim, mask, score, row.name))
        if figures is not None and tuning.triton_release() == (3, 7):
            for found, known in zip(row.instructions, figures, strict=True):
                assert found <= TOLERATED * known, row


@pytest.mark.by_day(6)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_that_write_gradients_in_their_own_dtype_do_not_spill_in_a_loop(capability: int, head_dim: int):
    for row in ahead_of_time.compile_all(capability, head_dim, "doc_causal", "alibi", only="d", alone=True):
        assert row.tensor_core_ops > 0, row
        assert not row.is_serialised, row
        may_spill = spills_in_loops_allowed(row, capability, head_dim)
        assert row.spilled_bytes <= (160 if may_spill > 2 else 24), row  # 24: dk, dv of sm_90, D 128
        assert row.spills_in_loops <= may_spill, row


@pytest.mark.by_day(12)
@pytest.mark.parametrize(
    ("capability", "head_dim", "mask", "score"),
    [
        pytest.param(capability, head_dim, *mods, id=f"sm_{capability}-D{head_dim}-{'-'.join(mods)}")
        for capability, head_dim, mods in itertools.product(CAPABILITIES, OTHER_HEAD_DIMS, MODS)
    ],
)
def test_other_head_dims_use_tensor_cores_and_spill_nothing_in_a_loop(
    capability: int, head_dim: int, mask: str, score: str
):
    for row in ahead_of_time.compile_all(capability, head_dim, mask, score):
        assert row.tensor_core_ops > 0, row
        assert row.spills_in_loops <= spills_in_loops_allowed(row, capability, head_dim), row
        assert not row.is_serialised, row


@pytest.mark.by_day(6)
@pytest.mark.parametrize("score", ["alibi", "relative_bias"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_pass_of_captured_tensors_does_not_spill_in_a_loop(capability: int, head_dim: int, score: str):
    torch.use_deterministic_algorithms(False)
    (row,) = ahead_of_time.compile_all(capability, head_dim, "doc_causal", score, only="captured", wanted=(0,))
    assert row.tensor_core_ops > 0, row
    assert not row.is_serialised, row
    assert row.spilled_bytes <= 40, row  # by pair, sm_100, D 64, with Triton 3.6
    assert row.spills_in_loops == 0, row


@pytest.mark.skipif(tuning.triton_release() < (3, 7), reason="Triton 3.6 serialises them; no row asks for them")
@pytest.mark.by_day(4)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", [90, 100])
def test_tensor_descriptors_become_bulk_copies(capability: int, head_dim: int):
    for row in ahead_of_time.compile_all(capability, head_dim, "doc_causal", "alibi", tma=True):
        assert row.bulk_copies > 0, row
        assert not row.is_serialised, row
        assert row.spilled_bytes <= 8, row  # dK and dV of 128 keys of 128 dims; one reason for which no row asks for it


@pytest.mark.by_day(2)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_fp32_kernels_compile_without_tensor_cores(head_dim: int):
    """tf32 keeps 10 bits of 23."""
    for row in ahead_of_time.compile_all(90, head_dim, "causal", "none", torch.float32):
        assert row.tensor_core_ops == 0
        assert row.spilled_bytes == 0


@pytest.mark.by_day(3)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernel_that_backward_begins_with_does_not_spill(capability: int):
    lse = torch.zeros(2, 4, 256)
    with launches_compile(capability) as variants:
        for dim in (64, 128, 256):
            out = torch.zeros(*lse.shape, dim, dtype=torch.bfloat16)
            for grad_out in (out, torch.zeros((), dtype=out.dtype).expand(out.shape)):
                delta.begin_backward(out, grad_out, lse, lse)
    assert len(variants) == 6
    for variant in variants:
        row = ahead_of_time.report(variant, capability)
        assert row.spilled_bytes == 0, row


def test_new_lengths_documents_windows_ranks_and_batches_compile_nothing():
    mask_mod = None
    with launches_compile(90) as variants:
        for length, world_size, cuts, window, batch, heads in [
            (256, 1, [0, 100, 256], 64, 1, 2),
            (256, 1, [0, 1, 2, 16, 256], 1, 1, 2),
            (256, 4, [0, 37, 256], 100, 1, 2),
            (300, 3, [0, 299, 300], 16, 2, 2),
            (1009, 2, [0, 1009], 2048, 1, 8),
            (2048, 8, [0, 16, 32, 2048], 17, 16, 4),
        ]:
            mask_mod = cpflex.document(cu_seqlens=cuts) & cpflex.sliding_window(window) & cpflex.causal()
            for rank in {0, world_size - 1}:
                plan = cpflex.make_plan(mask_mod, length, rank=rank, world_size=world_size)
                for step in plan.steps:
                    _launch_all(plan.kinds["mask"].mask, step.tile_mask, batch, heads)
    assert sorted(variant.name for variant in variants) == ["attend_kernel", "dkdv_kernel", "dq_kernel"]


def _launch_all(mask, tile_mask, batch: int, heads: int) -> None:
    q = torch.zeros(batch, heads, len(tile_mask.q_positions), 64, dtype=torch.bfloat16)
    k = torch.zeros(batch, heads // 2, len(tile_mask.kv_positions), 64, dtype=torch.bfloat16)
    call, lse = Call(mask, 0.125), torch.zeros(q.shape[:3])
    forward.attend(q, k, k, tile_mask, call, empty(q, 64))
    backward.attend_backward(q, k, k, q, lse, lse, tile_mask, call, torch.zeros(q.shape), [])


def test_the_order_of_programs_begins_with_the_most_work():
    _, (step,), _ = resolve(cpflex.make_plan(cpflex.causal(), 1024).handle).on(torch.device("cpu"))
    work = forward.work_by_query(step.tile_mask, 128, 64)
    items = work.items.view(-1, 8)
    assert items[:, 0].tolist() == list(range(896, -1, -128))
    assert (items[:, 7] + items[:, 4]).tolist() == list(range(16, 0, -2))

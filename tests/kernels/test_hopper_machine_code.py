"""The forward kernel of sm_90 as ptxas makes it: registers, stack, tensor cores that do not wait, instructions."""

from __future__ import annotations

import ahead_of_time
import pytest
import torch
from ahead_of_time import MASKS, SCORES, SEQ_LEN, Report, launches_compile

import cpflex
from cpflex.kernels import Call, empty, hopper_forward, tuning
from cpflex.mods.trace import trace_score_mod
from cpflex.ring.handles import resolve

FIGURES = {  # instructions of the masked and of the full loop of a consumer, bytes of stack; Triton 3.7.1, bf16
    (64, 64, "causal", "none"): (812, 423, 0),
    (64, 64, "doc_causal", "alibi"): (1609, 843, 0),
    (64, 64, "doc_causal", "softcap"): (2450, 1575, 0),
    (96, 96, "causal", "none"): (853, 462, 0),
    (96, 96, "doc_causal", "alibi"): (1798, 894, 48),
    (96, 96, "doc_causal", "softcap"): (2731, 1631, 208),
    (128, 128, "causal", "none"): (853, 462, 0),
    (128, 128, "doc_causal", "alibi"): (1798, 894, 48),
    (128, 128, "doc_causal", "softcap"): (2731, 1631, 208),
    (192, 128, "causal", "none"): (555, 348, 0),
    (192, 128, "doc_causal", "alibi"): (988, 578, 0),
    (192, 128, "doc_causal", "softcap"): (1404, 937, 0),
    (256, 256, "causal", "none"): (635, 417, 0),
    (256, 256, "doc_causal", "alibi"): (1196, 640, 16),
    (256, 256, "doc_causal", "softcap"): (1535, 1006, 0),
}
TOLERATED = 1.03
"""Of the instructions of a loop."""


def compiled(head_dim: int, v_dim: int, mask: str, score: str, dtype: torch.dtype = torch.bfloat16) -> Report:
    """The kernel of a last step that continues a state."""
    plan = cpflex.make_plan(MASKS[mask](), SEQ_LEN)
    mod, (step,), _ = resolve(plan.handle).on(torch.device("cpu"))
    score_mod = None if SCORES[score] is None else trace_score_mod(SCORES[score])
    call = Call(mod, 0.125, score_mod and score_mod.graph, score_mod.captured if score_mod else (), backend="gluon")
    sizes = (4, head_dim), (2, head_dim), (2, v_dim)
    q, k, v = (torch.zeros(2, heads, SEQ_LEN, dim, dtype=dtype) for heads, dim in sizes)
    with launches_compile(90) as variants:
        hopper_forward.attend_and_finish(q, k, v, step.tile_mask, call, empty(q, v_dim))
    (variant,) = variants
    return ahead_of_time.report(variant, 90)


@pytest.mark.by_day(15)
@pytest.mark.parametrize(("head_dim", "v_dim", "mask", "score"), FIGURES)
def test_loops_are_as_short_as_they_were_and_do_not_wait(head_dim: int, v_dim: int, mask: str, score: str):
    row = compiled(head_dim, v_dim, mask, score)
    print(ahead_of_time.HEADER, row, sep="\n")
    masked, full, stack = FIGURES[head_dim, v_dim, mask, score]
    assert row.tensor_core_ops > 0
    assert row.bulk_copies > 0
    assert not row.is_serialised
    assert row.registers == 168  # at the launch: 12 warps; consumers take what the producer gives back
    assert row.shared_bytes <= 227 << 10
    *loops, _last = row.instructions  # of two consumers; then what is around both
    assert len(loops) == 4
    if tuning.triton_release() == (3, 7):
        assert row.spilled_bytes <= stack
        assert max(loops[0::2]) <= TOLERATED * masked, row
        assert max(loops[1::2]) <= TOLERATED * full, row


@pytest.mark.by_day(5)
def test_fp16_is_as_short_as_bf16():
    row = compiled(128, 128, "causal", "none", torch.float16)
    assert not row.is_serialised
    assert row.spilled_bytes == 0
    assert row.instructions[1] <= TOLERATED * FIGURES[128, 128, "causal", "none"][1]


def test_every_row_of_the_table_has_figures():
    dims = {(head_dim, v_dim) for _, which, head_dim, v_dim in tuning.GLUON if which == "forward"}
    assert dims == {key[:2] for key in FIGURES}

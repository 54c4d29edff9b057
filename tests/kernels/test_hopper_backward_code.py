"""The backward kernels of sm_90 as ptxas makes them: registers, stack, tensor cores that do not wait, instructions."""

from __future__ import annotations

import ahead_of_time
import pytest
import torch
from ahead_of_time import MASKS, SCORES, SEQ_LEN, Report, launches_compile

import cpflex
from cpflex.kernels import Call, hopper_backward, tuning
from cpflex.mods.trace import trace_score_mod
from cpflex.ring.handles import resolve

FIGURES = {  # instructions of the masked and of the full loop of a consumer, bytes of stack; Triton 3.7.1, bf16
    ("dkdv", 64, 64, "causal", "none"): (473, 246, 0),
    ("dkdv", 64, 64, "doc_causal", "alibi"): (981, 483, 0),
    ("dkdv", 64, 64, "doc_causal", "softcap"): (1491, 953, 0),
    ("dkdv", 128, 128, "causal", "none"): (539, 286, 8),
    ("dkdv", 128, 128, "doc_causal", "alibi"): (1128, 545, 192),
    ("dkdv", 128, 128, "doc_causal", "softcap"): (1705, 1029, 176),
    ("dq", 64, 64, "causal", "none"): (744, 355, 0),
    ("dq", 64, 64, "doc_causal", "alibi"): (1722, 778, 16),
    ("dq", 64, 64, "doc_causal", "softcap"): (2984, 1767, 184),
    ("dq", 128, 128, "causal", "none"): (803, 389, 16),
    ("dq", 128, 128, "doc_causal", "alibi"): (2247, 828, 136),
    ("dq", 128, 128, "doc_causal", "softcap"): (3328, 1819, 472),
    ("dq", 192, 128, "causal", "none"): (478, 299, 0),
    ("dq", 192, 128, "doc_causal", "alibi"): (1114, 534, 264),
    ("dq", 192, 128, "doc_causal", "softcap"): (1770, 1020, 280),
    ("onepass", 64, 64, "causal", "none"): (626, 388, 0),
    ("onepass", 64, 64, "doc_causal", "alibi"): (1138, 606, 0),
    ("onepass", 64, 64, "doc_causal", "softcap"): (1664, 1087, 8),
    ("onepass", 128, 128, "causal", "none"): (727, 502, 96),
    ("onepass", 128, 128, "doc_causal", "alibi"): (1338, 733, 232),
    ("onepass", 128, 128, "doc_causal", "softcap"): (1953, 1219, 384),
}
TOLERATED = 1.03
"""Of the instructions of a loop."""


def compiled(
    which: str, head_dim: int, v_dim: int, mask: str, score: str, dtype: torch.dtype = torch.bfloat16
) -> Report:
    """The kernel of a step whose gradients are added up."""
    plan = cpflex.make_plan(MASKS[mask](), SEQ_LEN)
    mod, (step,), _ = resolve(plan.handle).on(torch.device("cpu"))
    score_mod = None if SCORES[score] is None else trace_score_mod(SCORES[score])
    call = Call(mod, 0.125, score_mod and score_mod.graph, score_mod.captured if score_mod else (), backend="gluon")
    sizes = (4, head_dim), (2, head_dim), (2, v_dim), (4, v_dim)
    q, k, v, grad_out = (torch.zeros(2, heads, SEQ_LEN, dim, dtype=dtype) for heads, dim in sizes)
    lse, dq = torch.zeros(q.shape[:3]), torch.zeros(q.shape)
    shared = q, k, v, grad_out, (lse, lse), step.tile_mask, call
    with launches_compile(90) as variants:
        if which == "dq":
            hopper_backward._add_dq(*shared, dq)
        else:
            hopper_backward._dk_and_dv(which, *shared, dq.dtype, dq if which == "onepass" else None)
    (variant,) = variants
    return ahead_of_time.report(variant, 90)


@pytest.mark.by_day(20)
@pytest.mark.parametrize(("which", "head_dim", "v_dim", "mask", "score"), FIGURES)
def test_loops_of_backward_are_as_short_as_they_were_and_do_not_wait(
    which: str, head_dim: int, v_dim: int, mask: str, score: str
):
    row = compiled(which, head_dim, v_dim, mask, score)
    print(ahead_of_time.HEADER, row, sep="\n")
    masked, full, stack = FIGURES[which, head_dim, v_dim, mask, score]
    assert row.tensor_core_ops > 0
    assert row.bulk_copies > 0
    assert not row.is_serialised
    assert row.registers == 168  # at the launch: 12 warps; consumers take what the producer gives back
    assert row.shared_bytes <= 227 << 10
    assert len(row.instructions) == 4  # of two consumers
    if tuning.triton_release() == (3, 7):
        assert row.spilled_bytes <= stack
        assert max(row.instructions[0::2]) <= TOLERATED * masked, row
        assert max(row.instructions[1::2]) <= TOLERATED * full, row


@pytest.mark.by_day(15)
@pytest.mark.parametrize("which", ["dq", "dkdv", "onepass"])
def test_backward_in_fp16_is_as_short_as_in_bf16(which: str):
    row = compiled(which, 128, 128, "causal", "none", torch.float16)
    assert not row.is_serialised
    assert row.instructions[1] <= TOLERATED * FIGURES[which, 128, 128, "causal", "none"][1]


def test_every_backward_row_of_the_table_has_figures():
    """96 dims are padded to 128: the same loops."""
    rows = {(which, *dims) for _, which, *dims in tuning.GLUON if which != "forward" and 96 not in dims}
    assert rows == {key[:3] for key in FIGURES}

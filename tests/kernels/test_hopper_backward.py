"""The backward kernels of sm_90, emulated: what they compute, in which interleavings, and who gets them."""

from __future__ import annotations

from unittest import mock

import emulated
import pytest
import torch
from emulated import HOPPER_DIMS, Problem

import cpflex
from cases import pairwise
from cpflex import kernels
from cpflex.kernels import Call, backward, hopper_backward, reference, tuning
from cpflex.kernels.work import work_by_key, work_of_consecutive_queries
from cpflex.ring.handles import resolve

INTERLEAVINGS = 20

FACTORS = {
    "mask": [
        *("full", "causal", "doc_causal", "sliding17", "doc_sliding_causal", "prefix_lm"),
        *("window_per_head", "eviction", "nothing"),
    ],
    "score": ["none", "softcap", "alibi", "relative_bias", "key_bias"],
    "dims": [dims for dims, sizes in HOPPER_DIMS.items() if (90, "dkdv", *sizes) in tuning.GLUON],
    "dtype": ["bf16", "fp16"],
    "seq_len": [5, 127, 160, 300],
    "heads": ["mha", "gqa", "mqa"],
    "world_size": [1, 2, 3],
}
PROBLEMS = [Problem(**row, batch_size=1) for row in pairwise(FACTORS)]

SMALL = [
    Problem("causal", "none", 200, "mqa", "h64", "bf16", batch_size=1),
    Problem("doc_causal", "softcap", 160, "mha", "h64", "fp16", batch_size=1),
    Problem("full", "alibi", 130, "mqa", "h64", "bf16", batch_size=1),
    Problem("sliding17", "none", 160, "mha", "h128", "bf16", batch_size=1),
    Problem("causal", "alibi", 140, "mha", "h64", "bf16", world_size=2, batch_size=1),
    Problem("eviction", "key_bias", 160, "mha", "h96", "fp16", batch_size=1),
]
"""0 to 2 blocks a row, masked and full, ragged tails, rows that see nothing, several heads a walk, steps that add up."""


@pytest.mark.by_day(6)
@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_every_interleaving_of_backward_equals_the_oracle(problem: Problem):
    emulated.check_backward(problem, range(INTERLEAVINGS))


@pytest.mark.by_day(23)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_backward_of_the_kernels_table_equals_the_oracle(problem: Problem):
    emulated.check_backward(problem, range(2))


PLANTED = {
    "p is not hidden": ("        x = gl.where(seen, x, float(\"-inf\"))\n", ""),
    "tails of keys are seen": ("gl.expand_dims(columns < kv_end - kv, 0)", "gl.expand_dims(columns < kv_end, 0)"),
    "dq is not scaled": ("total = dq * scale", "total = dq"),
    "dk is not scaled": ("dk * scale, at", "dk, at"),
    "dq of earlier steps is lost": ("total = total + gl.load(dq_ptr + at, mask=inside, other=0.0)", "total = total"),
    "rows of the next item are written": ("inside = (rows < num_rows) & (cols < DIM)", "inside = (rows < 64) & (cols < DIM)"),
    "the producer stays with the first head": ("            )\n            h += gl.where(anew, 1, 0)", "            )\n"),
    "consumers stay with the first head": ("                h += gl.where(anew, 1, 0)\n    if dq", "    if dq"),
    "K and V are not freed": ("            mbarrier.arrive(free.index(buffer))\n            buffer, phase = turned(buffer, phase, STAGES)\n            if FULL == 0 or score_mod is not None:\n                kv,", "            buffer, phase = turned(buffer, phase, STAGES)\n            if FULL == 0 or score_mod is not None:\n                kv,"),
    "K is freed before ds k": ("            ds = gl.convert_layout((p_vjp * (dp - delta)).to(DTYPE), ds_layout)\n            dq = warpgroup_mma_wait(0, deps=(warpgroup_mma(ds, k, dq, is_async=True),))\n            mbarrier.arrive(free.index(buffer))\n", "            mbarrier.arrive(free.index(buffer))\n            ds = gl.convert_layout((p_vjp * (dp - delta)).to(DTYPE), ds_layout)\n            dq = warpgroup_mma_wait(0, deps=(warpgroup_mma(ds, k, dq, is_async=True),))\n"),
    "Q is freed under its product": ("                dv, dk = warpgroup_mma_wait(0, deps=(dv, dk))\n                mbarrier.arrive(free.index(buffer))\n", "                mbarrier.arrive(free.index(buffer))\n                dv, dk = warpgroup_mma_wait(0, deps=(dv, dk))\n"),
    "dk is not waited for": ("dv, dk = warpgroup_mma_wait(0, deps=(dv, dk))", "dv = warpgroup_mma_wait(1, deps=(dv,))"),
    "lse into a buffer in use": ("            mbarrier.wait(free.index(buffer), phase)\n            copied(q_blocks", "            lse_rows.index(buffer).store(lse)\n            mbarrier.wait(free.index(buffer), phase)\n            copied(q_blocks"),
    "nobody waits for lse": ("count=2)  # the copy", "count=1)  # the copy"),
    "no wait for grad_out": ("            mbarrier.wait(grad_out_full.index(buffer), phase)\n", ""),
    "no wait for K and V": ("    mbarrier.wait(kv_full.index(0), 0)\n", ""),
    "no wait for the queries": ("    mbarrier.wait(q_full.index(consumer), 0)\n", ""),
    "dp is read too early": ("            dp = warpgroup_mma_wait(0, deps=(dp,))\n            delta = ", "            delta = "),
    "buffers of one consumer": ("        mbarrier.init(free.index(i), count=CONSUMERS)\n", "        mbarrier.init(free.index(i), count=1)\n"),
    "the producer begins in the other phase": ("buffer, phase = 0, 1  # a buffer", "buffer, phase = 0, 0  # a buffer"),
    "positions of the first token": ("return gl.load(positions_ptr + first) + offsets", "return gl.load(positions_ptr) + offsets"),
}  # fmt: skip


@pytest.mark.by_day(8)
@pytest.mark.parametrize("name", PLANTED)
def test_faults_planted_in_backward_are_found(name: str, monkeypatch: pytest.MonkeyPatch):
    emulated.check_planted(*PLANTED[name], monkeypatch)


@pytest.mark.by_day(6)
@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_every_interleaving_of_one_pass_equals_the_oracle(problem: Problem):
    emulated.check_backward(problem, range(INTERLEAVINGS), deterministic=False)


@pytest.mark.by_day(46)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_one_pass_of_the_kernels_table_equals_the_oracle(problem: Problem):
    emulated.check_backward(problem, range(2), deterministic=False)


PLANTED_IN_ONE_PASS = {
    "no fence after ds": ("                fence_async_shared()\n                mbarrier.arrive(ds_full.index(turn))\n", "                mbarrier.arrive(ds_full.index(turn))\n"),
    "no fence after dq": ("store(dq * scale)\n                fence_async_shared()\n", "store(dq * scale)\n"),
    "dq is not scaled": ("store(dq * scale)", "store(dq)"),
    "no wait for the other's ds": ("                mbarrier.wait(ds_full.index(turn), turn_phase)\n", ""),
    "one buffer of ds": ("turn, turn_phase = turned(turn, turn_phase, 2)", "turn_phase = turn_phase ^ 1"),
    "dq overwritten while it is added": ("                tma.store_wait(0)\n                dq = warp", "                dq = warp"),
    "the last dq is not waited for": ("    if dq_blocks is not None:\n        tma.store_wait(0)\n", ""),
    "Q is freed under its product": ("                dv, dk = warpgroup_mma_wait(1, deps=(dv, dk))\n                mbarrier.arrive(free.index(buffer))\n", "                mbarrier.arrive(free.index(buffer))\n                dv, dk = warpgroup_mma_wait(1, deps=(dv, dk))\n"),
    "keys of the next item are added": ("inside = inside & gl.expand_dims(rows < end - first, 1)", "inside = inside & gl.expand_dims(rows < 64, 1)"),
    "both make the same columns": ("consumer * HALF, HALF, 1)", "0, HALF, 1)"),
}  # fmt: skip


@pytest.mark.by_day(5)
@pytest.mark.parametrize("name", PLANTED_IN_ONE_PASS)
def test_faults_planted_in_one_pass_are_found(name: str, monkeypatch: pytest.MonkeyPatch):
    emulated.check_planted(*PLANTED_IN_ONE_PASS[name], monkeypatch, deterministic=False)


def test_full_runs_of_short_items_are_walked_with_a_mask():
    """Else keys of the next item would be added to dq."""
    plan = cpflex.make_plan(cpflex.full(), 300)
    _, (step,), _ = resolve(plan.handle).on(torch.device("cpu"))
    work = work_of_consecutive_queries(step.tile_mask, 128, 64, short_are_masked=True)
    for first, end, _, _, masked, _, _, whole in work.items.view(-1, 8).tolist():
        assert (whole == 0) == (end - first < 128)
        assert (masked + whole) * 64 >= 300


@pytest.mark.parametrize(
    ("backend", "deterministic", "torch_is", "head_dim", "expected"),
    [
        ("gluon", False, False, 128, True),
        ("gluon", True, False, 128, False),
        ("gluon", False, True, 128, False),
        ("gluon", False, False, 80, False),
        ("triton", False, False, 128, False),
    ],
)
def test_one_pass_is_where_the_call_and_torch_allow_it_and_there_is_a_row(
    monkeypatch: pytest.MonkeyPatch, backend: str, deterministic: bool, torch_is: bool, head_dim: int, expected: bool
):
    monkeypatch.setattr(tuning, "capability_of", lambda device: 90)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: torch_is)
    mask, _, _ = resolve(cpflex.make_plan(cpflex.causal(), 128).handle).on(torch.device("cpu"))
    q = torch.zeros(1, 1, 128, head_dim, dtype=torch.bfloat16)
    call = Call(mask, 1.0, backend=backend, deterministic=deterministic)
    assert hopper_backward.is_in_one_pass(q, q, call) is expected


def test_the_option_is_a_bool_and_changes_nothing_where_there_is_one_order():
    plan, found = cpflex.make_plan(cpflex.causal(), 128), []
    q = torch.randn(1, 1, 128, 16)
    for options in (None, {"deterministic": False}, {"deterministic": True, "backend": "reference"}):
        leaf = q.clone().requires_grad_()
        cpflex.flex_attention(leaf, leaf, leaf, block_mask=plan, kernel_options=options).sum().backward()
        found.append(leaf.grad)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with pytest.raises(TypeError, match="'deterministic' must be True or False; got 'no'"):
        cpflex.flex_attention(q, q, q, block_mask=plan, kernel_options={"deterministic": "no"})


def test_heads_of_q_alone_have_dq_by_gluon_and_the_rest_by_the_portable_kernel():
    """192 with 128: dk and dv of 64 keys would not fit the registers of a consumer."""
    problem = Problem("causal", "softcap", 100, "mha", "h192dv128", "bf16", batch_size=1)

    def portable(q, k, v, grad_out, tile_mask, call, shared, dtype):
        q, k, v, grad_out, lse, delta = shared[:6]
        dq = torch.zeros(q.shape)
        lse = lse / 1.4426950408889634
        found = reference.attend_backward(q, k, v, grad_out, lse, delta, tile_mask, call, dq, [])
        return tuple(x.to(dtype) for x in found)

    with mock.patch.object(backward, "dk_and_dv", portable):
        emulated.check_backward(problem, range(2))


def test_gradients_of_captured_tensors_are_those_of_the_portable_pass(monkeypatch: pytest.MonkeyPatch):
    """It is called first, with what all portable kernels are called with, and where it adds to."""
    problem, calls = Problem("causal", "key_bias", 100, "mha", "h64", "bf16", batch_size=1), []
    monkeypatch.setattr(hopper_backward, "add_captured_gradients", lambda *args: calls.append(args))
    call, q, ((k, v, tile_mask),), *_ = next(emulated.ranks_of(problem))
    call = Call(call.mask, call.scale, call.score_graph, call.captured, (0,), "gluon")
    numbers, dq = torch.zeros(q.shape[:3]), torch.zeros(q.shape)
    d_captured = [torch.zeros(call.captured[0].shape)]
    with emulated.emulating_backward(call):
        hopper_backward.attend_backward(q, k, v, torch.zeros_like(q), numbers, numbers, tile_mask, call, dq, d_captured)
    ((*_, passed_call, shared, target),) = calls
    assert passed_call is call and target is d_captured
    assert [x.shape for x in shared[:6]] == [x.shape for x in (q, k, v, q, numbers, numbers)]
    assert len(shared) == len(backward.shared_arguments(q, k, v, q, numbers, numbers, tile_mask))


def test_nobody_to_attend_to_gives_gradients_of_zero():
    problem = Problem("causal", "none", 100, "mha", "h64", "bf16", batch_size=1)
    call, q, ((k, v, tile_mask),), *_ = next(emulated.ranks_of(problem))
    numbers, dq = torch.zeros(q.shape[:3]), torch.full(q.shape, torch.nan, dtype=q.dtype)
    none = k[:, :, :0], v[:, :, :0]
    dk, dv = hopper_backward.attend_backward(q, *none, q, numbers, numbers, tile_mask, call, dq, [])
    assert dk.shape == none[0].shape and dv.shape == none[1].shape
    assert (dq == 0).all()


def test_runs_of_consecutive_queries_are_cut_where_positions_jump():
    """The pairs are those of the other table, and within a run positions follow each other."""
    for rank in range(2):
        plan = cpflex.make_plan(cpflex.sliding_window(200) & cpflex.causal(), 800, rank=rank, world_size=2)
        _, steps, _ = resolve(plan.handle).on(torch.device("cpu"))
        for step in steps:
            pairs = []
            for make in (work_by_key, work_of_consecutive_queries):
                work = make(step.tile_mask, 128, 64)
                pairs.append(set())
                for row, _, *walks in work.items.view(-1, 8).tolist():
                    for first_run, end_run in (walks[:2], walks[3:5]):
                        for begin, end in work.runs[first_run:end_run].tolist():
                            pairs[-1] |= {(row, query) for query in range(begin, end)}
                            if make is work_of_consecutive_queries:
                                assert (step.tile_mask.q_positions[begin:end].diff() == 1).all()
            assert pairs[0] == pairs[1]


# -- who gets them


@pytest.mark.parametrize(
    ("head_dim", "v_dim", "dtype", "served"),
    [
        (64, 64, torch.bfloat16, {"dq", "dkdv"}),
        (96, 96, torch.float16, {"dq", "dkdv"}),
        (128, 128, torch.bfloat16, {"dq", "dkdv"}),
        (192, 128, torch.bfloat16, {"dq"}),
        (256, 256, torch.bfloat16, set()),
        (128, 128, torch.float32, set()),
        (80, 80, torch.bfloat16, set()),
    ],
)
def test_the_table_says_which_passes_are_served(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, v_dim: int, dtype: torch.dtype, served: set[str]
):
    monkeypatch.setattr(tuning, "capability_of", lambda device: 90)
    monkeypatch.setattr(kernels, "_is_fused", lambda q, backend: True)
    mask, _, _ = resolve(cpflex.make_plan(cpflex.causal(), 128).handle).on(torch.device("cpu"))
    q, v = (torch.zeros(1, 1, 128, dim, dtype=dtype) for dim in (head_dim, v_dim))
    assert {which for which in ("dq", "dkdv") if tuning.is_served_by_gluon(which, q, v, "gluon")} == served
    for backend, module in (("gluon", hopper_backward if served else backward), ("triton", backward), (None, backward)):
        assert kernels._backward(q, v, Call(mask, 1.0, backend=backend)) is module

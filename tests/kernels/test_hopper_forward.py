"""The forward kernel of sm_90, emulated: what it computes, in which interleavings, and who gets it."""

from __future__ import annotations

from dataclasses import replace

import emulated
import pytest
import torch
from emulated import HOPPER_DIMS, Problem
from gluon_emulator import Fault

import cpflex
from cases import pairwise
from cpflex import kernels
from cpflex.kernels import Call, forward, hopper_forward, require_support, tuning
from cpflex.kernels.work import work_by_query, work_of_consecutive_keys
from cpflex.ring.handles import resolve

INTERLEAVINGS = 20

FACTORS = {
    "mask": [
        *("full", "causal", "doc_causal", "sliding17", "doc_sliding_causal", "prefix_lm"),
        *("window_per_head", "eviction", "nothing"),
    ],
    "score": ["none", "softcap", "alibi", "relative_bias", "key_bias"],
    "dims": list(HOPPER_DIMS),
    "dtype": ["bf16", "fp16"],
    "seq_len": [1, 127, 160, 400],
    "heads": ["mha", "gqa", "mqa"],
    "world_size": [1, 2, 3],
}
PROBLEMS = [Problem(**row, batch_size=1) for row in pairwise(FACTORS)]


@pytest.mark.by_day(46)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_interleaving_equals_the_twin_and_the_oracle(problem: Problem):
    emulated.check(problem, range(INTERLEAVINGS))


SMALL = Problem("causal", "alibi", 300, "mqa", "h64", "bf16", world_size=2, batch_size=1)
"""0 to 2 blocks a row, masked and full, a ragged tail, a carried state."""


def test_carried_states_ragged_tails_and_idle_rows_equal_the_twin():
    emulated.check(SMALL, range(2))


PLANTED = {
    "V freed a block early": ("pred=done >= 2)", "pred=done >= 1)"),
    "V freed under its product": ("gl.where(v_at == 0, V_STAGES - 1, v_at - 1)), pred=done >= 2", "v_at)"),
    "no wait for V": ("            mbarrier.wait(v_full.index(v_at), v_phase)\n            v = v_rows", "            v = v_rows"),
    "no wait for Q": ("    mbarrier.wait(q_full.index(consumer), 0)\n", ""),
    "K freed under its product": ("s = warpgroup_mma_wait(1, deps=(s,))", "s = warpgroup_mma_wait(2, deps=(s,))"),
    "K freed by one consumer": ("mbarrier.init(k_free.index(i), count=CONSUMERS)", "mbarrier.init(k_free.index(i), count=1)"),
    "the producer begins in the other phase": ("k_at, k_phase, v_at, v_phase = 0, 1, 0, 1", "k_at, k_phase, v_at, v_phase = 0, 0, 0, 1"),
    "V is that of the block itself": ("before = kv\n", "before = kv + 1\n"),
    "ragged tails are seen": ("seen = inside & mask_mod", "seen = (inside | True) & mask_mod"),
    "the state keeps its old maximum": ("        m = m_new\n", ""),
    "the first block is walked over again": ("if (done == 0) & (num_blocks > 0):", "if (done == 0) & (num_blocks < 0):"),
    "positions of the block before": ("first_idx = gl.load(kv_positions_ptr + gl.minimum(kv", "first_idx = gl.load(kv_positions_ptr + gl.minimum(kv * 0"),
}  # fmt: skip


@pytest.mark.by_day(4)
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(name: str, monkeypatch: pytest.MonkeyPatch):
    (old, new), emulator = PLANTED[name], emulated.Emulated
    monkeypatch.setattr(emulated, "Emulated", lambda *args: emulator(*args, edits={old: new}))
    problem = Problem("causal", "none", 300, "mqa", "h64", "bf16", world_size=2, batch_size=1)
    if " freed " in name:  # a ring of buffers has to turn
        problem = Problem("full", "none", 700, "mqa", "h64", "bf16", batch_size=1)
    with pytest.raises((Fault, AssertionError)) as raised:
        emulated.check(problem, range(4))
    print(str(raised.value)[:200])


def test_runs_of_consecutive_keys_are_cut_where_positions_jump():
    """The pairs are those of the other table, and within a run positions follow each other."""
    for rank in range(2):
        plan = cpflex.make_plan(cpflex.sliding_window(200) & cpflex.causal(), 800, rank=rank, world_size=2)
        _, steps, _ = resolve(plan.handle).on(torch.device("cpu"))
        for step in steps:
            pairs, positions = [], step.tile_mask.kv_positions
            for make in (work_by_query, work_of_consecutive_keys):
                work = make(step.tile_mask, 128, 64)
                pairs.append(set())
                for row, _, *walks in work.items.view(-1, 8).tolist():
                    for first_run, end_run, num_blocks in (walks[:3], walks[3:]):
                        runs = work.runs[first_run:end_run].tolist()
                        pairs[-1] |= {(row, key) for begin, end in runs for key in range(begin, end)}
                        assert num_blocks == sum(-(-(end - begin) // 64) for begin, end in runs)
                        for begin, end in runs if make is work_of_consecutive_keys else []:
                            assert (positions[begin:end].diff() == 1).all()
            assert pairs[0] == pairs[1]


# -- who gets it


def a_call(backend: str | None = "gluon") -> Call:
    mask, _, _ = resolve(cpflex.make_plan(cpflex.causal(), 128).handle).on(torch.device("cpu"))
    return Call(mask, 1.0, backend=backend)


@pytest.mark.parametrize(
    ("head_dim", "v_dim", "dtype", "module"),
    [
        *((dim, v_dim, torch.bfloat16, hopper_forward) for dim, v_dim in HOPPER_DIMS.values()),
        (128, 128, torch.float16, hopper_forward),
        (128, 128, torch.float32, forward),
        (80, 80, torch.bfloat16, forward),
        (128, 64, torch.bfloat16, forward),
    ],
)
def test_the_table_says_which_kernel_serves_a_call(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, v_dim: int, dtype: torch.dtype, module: object
):
    monkeypatch.setattr(tuning, "capability_of", lambda device: 90)
    q, v = (torch.zeros(1, 1, 128, dim, dtype=dtype) for dim in (head_dim, v_dim))
    assert kernels._forward(q, v, a_call()) is module
    assert kernels._forward(q, v, a_call("triton")) is forward
    assert kernels._forward(q, v, a_call(None)) is forward
    rows = {key: replace(row, is_default=True) for key, row in tuning.GLUON.items()}
    monkeypatch.setattr(tuning, "GLUON", rows)  # as when a GPU has proven them
    assert kernels._forward(q, v, a_call(None)) is module
    assert kernels._forward(q, v, a_call("triton")) is forward
    monkeypatch.setattr(tuning, "GLUON", {key: replace(row, releases=((3, 5),)) for key, row in rows.items()})
    assert kernels._forward(q, v, a_call()) is kernels._forward(q, v, a_call(None)) is forward


def test_a_default_is_one_of_its_architecture_and_rows_name_releases_that_were_compiled(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(tuning, "GLUON", {key: replace(row, is_default=True) for key, row in tuning.GLUON.items()})
    q = torch.zeros(1, 1, 128, 128, dtype=torch.bfloat16)
    for capability in (80, 89, 100, 120):
        monkeypatch.setattr(tuning, "capability_of", lambda device, capability=capability: capability)
        assert kernels._forward(q, q, a_call(None)) is forward
    for (_, which, *_), row in tuning.GLUON.items():
        assert which in tuning.PASSES + ("onepass",)
        assert row.releases and set(row.releases) <= set(tuning.GATED)


@pytest.mark.parametrize(
    ("capability", "release", "refusal"),
    [
        (90, (3, 7), None),
        (80, (3, 7), r"needs sm_90 .H100, H200.; cuda.* is sm_80; .*triton"),
        (100, (3, 7), "is sm_100; .*triton"),
        (90, (3, 5), "needs Triton 3.6 to 3.9; this is 3.5; .*triton"),
        (90, (3, 10), "needs Triton 3.6 to 3.9; this is 3.10; .*triton"),
    ],
)
def test_other_gpus_and_older_releases_are_refused(
    monkeypatch: pytest.MonkeyPatch, capability: int, release: tuple[int, int], refusal: str | None
):
    monkeypatch.setattr(tuning, "capability_of", lambda device: capability)
    monkeypatch.setattr(tuning, "triton_release", lambda: release)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        q = torch.empty(1, 1, 128, 64, device="cuda", dtype=torch.bfloat16)
    if refusal is None:
        require_support(q, 64, a_call())
    else:
        with pytest.raises(NotImplementedError, match=refusal):
            require_support(q, 64, a_call())


def test_cpu_tensors_are_refused():
    plan = cpflex.make_plan(cpflex.causal(), 128)
    q = torch.zeros(1, 1, 128, 64)
    with pytest.raises(ValueError, match="backend 'gluon' needs CUDA tensors"):
        cpflex.flex_attention(q, q, q, block_mask=plan, kernel_options={"BACKEND": "GLUON"})

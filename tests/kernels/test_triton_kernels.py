"""The fused kernels compute what their torch twin and the dense oracle do: interpreted, forward and all gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import interpreted
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cpflex
from cases import Problem, pairwise
from chunk_cases import ChunkProblem
from cpflex import kernels
from cpflex.kernels import Call, require_support, tuning
from cpflex.kernels.launch import rows_are_near
from cpflex.testing import run_ranks

Run = Callable[..., Any]

FACTORS = {
    "mask": [
        *("full", "causal", "doc_causal", "sliding17", "doc_sliding_causal", "prefix_lm", "neighbourhood_2d"),
        *("block_diffusion", "window_per_head", "head_and_batch", "eviction", "nothing"),
    ],
    "score": ["none", "softcap", "alibi", "relative_bias", "key_bias", "log_position", "temperature"],
    "dims": ["d16", "d24", "d64", "d80", "d96dv64", "d128", "d192dv128", "d256"],
    "dtype": ["fp32", "bf16", "fp16"],
    "seq_len": [1, 127, 160, 200],
    "heads": ["mha", "gqa", "mqa"],
    "world_size": [1, 2, 3],
}


PROBLEMS = [Problem(**row, batch_size=1) for row in pairwise(FACTORS)]
PROBLEMS += [
    Problem("head_and_batch", "key_bias", 160, "gqa"),
    Problem("doc_per_batch", "alibi", 200, "mqa", world_size=2),
]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with interpreted.interpreting() as call:
        yield call


@pytest.mark.by_day(20)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_fused_kernels_equal_their_twin_and_the_oracle(run: Run, problem: Problem):
    run(interpreted.check, problem)


def test_ranks_on_the_cpu_may_ask_for_fused_kernels(run: Run):
    run(interpreted.check_public_call)


@pytest.mark.by_day(12)
@pytest.mark.parametrize("problem", [
    ChunkProblem("window and sinks", (0, 40, 70)),
    ChunkProblem("by head", (0, 40, 41, 60), "zigzag", "ring"),
], ids=str)  # fmt: skip
def test_fused_kernels_compute_chunks(run: Run, problem: ChunkProblem):
    run(interpreted.check_chunks, problem)


@pytest.mark.by_day(9)
@pytest.mark.parametrize("check", [interpreted.check_grid], ids=["2x2"])
def test_heads_of_later_ranks_are_shifted_in_fused_kernels_too(run: Run, check: Callable[[], None]):
    run(check)


def test_any_strides_are_accepted(run: Run):
    run(interpreted.check_strides)


def test_rows_may_be_further_apart_than_an_int32(run: Run):
    run(interpreted.check_far_rows)
    run(interpreted.check_wide_offsets)


@pytest.mark.parametrize(
    ("stride", "rows", "is_near"),
    [(16, 300, True), (16909319, 300, True), (16909320, 300, False), (1 << 40, 1, True), (0, 300, True)],
)
def test_offsets_within_a_block_are_int32_up_to_the_last_that_fits(stride: int, rows: int, is_near: bool):
    """Of 128 rows, with the 16 columns that a block has at least."""
    x = torch.empty_strided((1, 1, rows, 8), (0, 0, stride, 1), device="meta")
    assert rows_are_near(x) == is_near
    assert is_near == (rows == 1 or 127 * stride + 15 < 2**31)


@pytest.mark.parametrize(
    "problem", [Problem("full", "softcap", 200, "gqa", "d80", world_size=2, batch_size=1)], ids=str
)
def test_tensor_descriptors_change_nothing(run: Run, problem: Problem):
    run(interpreted.check_descriptors, problem)


@pytest.mark.parametrize("problem", [Problem("causal", "relative_bias", 130, "gqa", "d24", world_size=2)], ids=str)
def test_dk_and_dv_may_be_launched_apart(run: Run, problem: Problem):
    run(interpreted.check_apart, problem)


@pytest.mark.by_day(2)
@pytest.mark.parametrize(
    "problem",
    [Problem("causal", "relative_bias", 130, "gqa", d, world_size=2, batch_size=1) for d in ("d80", "d192dv128")],
    ids=str,
)
def test_rows_in_pieces_are_rows_that_are_padded(run: Run, problem: Problem):
    run(interpreted.check_padded, problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_an_only_step_are_written_in_their_own_dtype(run: Run, dtype: torch.dtype):
    run(interpreted.check_alone, dtype)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_any_scale_is_accepted(run: Run, scale: float):
    run(interpreted.check_scale, scale)


@pytest.mark.by_day(4)
@pytest.mark.parametrize(
    "name",
    [
        *("-inf for some queries", "-inf for some keys", "the lowest number for all", "not finite where hidden"),
        *("a number", "without the score", "by query", "by key and head", "by query and key", "by the score"),
    ],
)
def test_odd_score_mods_equal_their_twin(run: Run, name: str):
    run(interpreted.check_score_mod, name)


def test_backward_begins_as_its_twin_does(run: Run):
    run(interpreted.check_what_backward_begins_with)


@pytest.mark.parametrize(("rows", "cols"), [(64, 32), (32, 32), (16, 64)])
@pytest.mark.parametrize(
    "places",
    [
        *("by distance", "by clamped distance", "by bucket of distance", "one for all"),
        *("one for each pair", "of two sequences"),
    ],
)
def test_pairs_of_a_diagonal_with_one_place_are_added_at_once(run: Run, places: str, rows: int, cols: int):
    run(interpreted.check_scatter, places, rows, cols)


def test_gradients_of_tables_too_large_for_atomic_additions_are_refused(run: Run):
    run(interpreted.check_refusal_of_large_tables)


def test_atomic_additions_are_refused_when_torch_wants_determinism(run: Run):
    run(interpreted.check_refusal_of_atomics)


def test_what_is_hidden_reaches_nothing(run: Run):
    run(interpreted.check_what_is_hidden_reaches_nothing)


def test_the_same_inputs_give_the_same_bits(run: Run):
    run(interpreted.check_bits)


def test_a_state_that_saw_nothing_is_not_read(run: Run):
    run(interpreted.check_a_state_of_nothing_is_not_read)


# -- which backend, and what it refuses


def a_call(backend: str | None = None) -> Call:
    return Call(interpreted.tile_mask_of(cpflex.causal(), 128)[0], 1.0, backend=backend)


def on_a_gpu(*shape: int) -> torch.Tensor:
    """As far as can be told without looking at its elements."""
    with FakeTensorMode():
        return torch.empty(shape, device="cuda")


def test_cpu_tensors_are_refused_where_kernels_are_not_interpreted():
    q = torch.zeros(1, 1, 128, 16)
    with pytest.raises(ValueError, match="CUDA tensors"):
        require_support(q, 16, a_call("triton"))
    with pytest.raises(ValueError, match="must be one of"):
        require_support(q, 16, a_call("cuda"))


def test_a_refusal_reaches_every_rank():
    def rank(group) -> str:
        plan = cpflex.make_plan(cpflex.causal(), 300, group)
        q = torch.zeros(1, 1, plan.local_len, 16)
        with pytest.raises(ValueError, match="CUDA tensors"):
            cpflex.flex_attention(q, q, q, block_mask=plan, kernel_options={"backend": "triton"})
        return "refused"

    assert run_ranks(rank, world_size=3, timeout=60) == ["refused"] * 3


def test_cpu_tensors_do_not_need_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    q = torch.zeros(1, 1, 128, 16)
    require_support(q, 16, a_call())
    with pytest.raises(NotImplementedError, match=r"needs the package triton.*reference"):
        require_support(q, 16, a_call("triton"))


@pytest.mark.parametrize(
    ("capability", "head_dim", "v_dim", "refusal"),
    [
        (90, 256, 16, None),
        (80, 16, 256, None),
        (90, 257, 16, "head dims up to 256; got 257.*reference"),
        (90, 16, 320, "head dims up to 256; got 320.*reference"),
        (75, 64, 64, "sm_80 .A100. or later.*reference"),
        (1, 64, 64, "sm_80 .A100. or later.*reference"),
    ],
)
def test_cuda_tensors_get_fused_kernels_or_a_refusal(
    monkeypatch: pytest.MonkeyPatch, capability: int, head_dim: int, v_dim: int, refusal: str | None
):
    monkeypatch.setattr(tuning, "capability_of", lambda device: capability)
    q = on_a_gpu(1, 1, 128, head_dim)
    require_support(q, v_dim, a_call("reference"))
    with contextlib.nullcontext() if refusal is None else pytest.raises(NotImplementedError, match=refusal):
        require_support(q, v_dim, a_call())


def test_a_mod_without_a_triton_form_is_refused_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "capability_of", lambda device: 90)
    unsigned = torch.zeros(128, dtype=torch.uint16)
    mask, _ = interpreted.tile_mask_of(lambda b, h, q, k: unsigned[q] == unsigned[k], 128)
    with pytest.raises(NotImplementedError, match=r"has no Triton form.*reference"):
        require_support(on_a_gpu(1, 1, 128, 64), 64, Call(mask, 1.0))

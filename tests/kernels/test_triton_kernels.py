"""The fused kernels compute what their torch twin and the dense oracle do: interpreted, forward and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import interpreted
import pytest
import torch

from cases import Problem, pairwise

pytestmark = pytest.mark.slow  # the interpreter takes seconds a case

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
    with interpreted.process() as call:
        yield call


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_fused_kernels_equal_their_twin_and_the_oracle(run: Run, problem: Problem):
    run(interpreted.check, problem)


def test_any_strides_are_accepted(run: Run):
    run(interpreted.check_strides)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_any_scale_is_accepted(run: Run, scale: float):
    run(interpreted.check_scale, scale)


@pytest.mark.parametrize(
    "name",
    [
        *("-inf for some queries", "-inf for some keys", "the lowest number for all", "not finite where hidden"),
        *("a number", "without the score", "by query", "by key and head", "by query and key", "by the score"),
    ],
)
def test_odd_score_mods_equal_their_twin(run: Run, name: str):
    run(interpreted.check_score_mod, name)


def test_atomic_additions_are_refused_when_torch_wants_determinism(run: Run):
    run(interpreted.check_refusal_of_atomics)


def test_what_is_hidden_reaches_nothing(run: Run):
    run(interpreted.check_what_is_hidden_reaches_nothing)


def test_the_same_inputs_give_the_same_bits(run: Run):
    run(interpreted.check_bits)


def test_a_state_that_saw_nothing_is_not_read(run: Run):
    run(interpreted.check_a_state_of_nothing_is_not_read)


def test_cpu_tensors_are_refused_where_kernels_are_not_interpreted():
    mask, tile_mask = interpreted.tile_mask_of(interpreted.cpflex.causal(), 128)
    q = torch.zeros(1, 1, 128, 16)
    with pytest.raises(ValueError, match="CUDA tensors"):
        interpreted.attend(q, q, q, tile_mask, interpreted.Call(mask, 1.0, backend="triton"), interpreted.empty(q, 16))
    with pytest.raises(ValueError, match="must be one of"):
        interpreted.attend(q, q, q, tile_mask, interpreted.Call(mask, 1.0, backend="cuda"), interpreted.empty(q, 16))

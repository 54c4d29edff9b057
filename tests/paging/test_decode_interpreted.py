"""Pages, plans and ranks with the fused kernels under them give what they give with plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import decode_interpreted
import pytest

import cpflex
from another_process import another_process


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    with another_process(TRITON_INTERPRET="1", OPENBLAS_NUM_THREADS="1") as call:
        yield call


@pytest.mark.by_day(4)
@pytest.mark.parametrize(
    ("mask", "score", "rows", "travel"),
    [
        ("window", "alibi", cpflex.everyone, None),
        ("by head", "softcap", cpflex.by_head, None),
        ("by sequence", "by sequence", cpflex.by_sequence, cpflex.queries),
        ("nothing before 20", "biases", cpflex.everyone, None),
        ("sinks and window", "softcap", cpflex.by_token, cpflex.keys),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_fused_kernels_decode_over_ranks_as_plain_torch_does(
    run: Callable[..., Any], mask: str, score: str, rows: Any, travel: Any
):
    run(decode_interpreted.check, mask, score, rows, travel)

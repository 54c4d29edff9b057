"""How much a call makes the host do on a GPU: upper bounds, which a change may only lower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import checks
import pytest

Run = Callable[..., Any]

COUNTED = ("h2d", "d2h", "h2d_async", "operation", "launch", "exchange", "number", "object")
"""Blocking copies, asynchronous ones, operations of torch, launches; what is said to other ranks. Nothing waits for the
device."""

Counts = tuple[int, ...]
BUDGETS: dict[tuple[int, str, bool], dict[str, Counts]] = {  # ranks, mask, whether after plan.to("cuda")
    (1, "causal", False): {
        # what backward needs comes when it is compiled, and so do tables of the kernels of sm_90
        "first forward": (0, 0, 4, 0, 1, 0, 0, 0),
        "first backward": (0, 0, 0, 1, 3, 0, 0, 0),
        "second forward": (0, 0, 0, 0, 1, 0, 0, 0),
        "second backward": (0, 0, 0, 1, 3, 0, 0, 0),
    },
    (1, "causal", True): {
        "to": (0, 0, 1, 0, 0, 0, 0, 0),
        "first forward": (0, 0, 0, 0, 1, 0, 0, 0),
        "first backward": (0, 0, 0, 1, 3, 0, 0, 0),
    },
    (8, "causal", False): {
        "first forward": (0, 0, 4, 5, 8, 7, 1, 0),
        "first backward": (0, 0, 1, 32, 17, 14, 1, 0),
        "second forward": (0, 0, 0, 5, 8, 7, 1, 0),
        "second backward": (0, 0, 0, 32, 17, 14, 1, 0),
    },
    (8, "causal", True): {
        "to": (0, 0, 1, 0, 0, 0, 0, 0),
        "first forward": (0, 0, 0, 5, 8, 7, 1, 0),
        "first backward": (0, 0, 0, 32, 17, 14, 1, 0),
    },
    (8, "documents", False): {
        "first forward": (0, 0, 4, 9, 2, 1, 1, 0),
        "first backward": (0, 0, 0, 16, 5, 2, 1, 0),
        "second forward": (0, 0, 0, 9, 2, 1, 1, 0),
        "second backward": (0, 0, 0, 16, 5, 2, 1, 0),
    },
}


@pytest.mark.parametrize("case", BUDGETS, ids=lambda case: f"{case[0]}-ranks-{case[1]}{'-moved' * case[2]}")
def test_a_call_stays_within_its_budget(run: Run, case: tuple[int, str, bool]):
    counts = run(checks.call_counts, *case)
    print(counts)
    for name, limits in BUDGETS[case].items():
        found = counts[name]
        over = {k: (found.get(k, 0), n) for k, n in zip(COUNTED, limits, strict=True) if found.get(k, 0) > n}
        assert not over, f"{name}: (found, allowed) {over}"
        assert found.keys() <= {*COUNTED}, f"{name}: {found}"


def test_a_second_call_copies_nothing(run: Run):
    counts = run(checks.call_counts, 8, "causal", False)
    for name in ("second forward", "second backward"):
        assert not {"h2d", "d2h", "h2d_async", "d2h_async", "sync"} & counts[name].keys(), counts[name]

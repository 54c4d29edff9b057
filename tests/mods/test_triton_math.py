"""Laws of the device functions that generated mods call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ulps

from another_process import another_process


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable[..., Any]]:
    with another_process(TRITON_INTERPRET="1") as call:
        yield call


@pytest.mark.parametrize("name", ulps.EXACT)
def test_errors_are_under_4_ulp_everywhere_also_with_reciprocals_that_are_not_exact(interpreter, name: str):
    for off_by in (-1, 0, 1):
        error, at = interpreter(ulps.worst, name, off_by)
        assert error < 4, f"{error:.2f} ulp at {at}, reciprocals off by {off_by}"


def test_tanh_keeps_zeros_and_ends_at_1(interpreter):
    found = interpreter(ulps.tanh_of_special)
    assert str(found) == "[0.0, -0.0, 1.0, -1.0, 1.0, -1.0]"

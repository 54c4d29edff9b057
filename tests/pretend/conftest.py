"""One process that pretends a GPU, for all tests here: it must hold nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import checks
import pytest
import stand_ins


@pytest.fixture(scope="session")
def run() -> Iterator[Callable[..., Any]]:
    if reason := stand_ins.why_not():
        pytest.skip(reason)
    with checks.process() as call:
        yield call

"""One process that pretends a GPU, for all tests here: it must hold nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import stand_ins

from another_process import another_process


@pytest.fixture(scope="session")
def run() -> Iterator[Callable[..., Any]]:
    if reason := stand_ins.why_not():
        pytest.skip(reason)
    with another_process(OPENBLAS_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") as call:
        yield call

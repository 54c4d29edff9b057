"""What a benchmark of planning measures: CPU time, in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any


def least_ms(function: Callable[[], Any]) -> float:
    """Of three runs, in CPU time of this process: other load on the machine does not count."""
    times = []
    for _ in range(3):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def in_own_process(function: Callable, *args: Any) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)

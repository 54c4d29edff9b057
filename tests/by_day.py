"""What a quick run takes of a large matrix: another part every day, all of it in as many days as the matrix says."""

from __future__ import annotations

import datetime
import zlib
from collections import Counter
from collections.abc import Sequence

import pytest


def mark_what_is_not_due(items: Sequence[pytest.Item], day: datetime.date) -> None:
    """Cases of a matrix marked ``by_day`` that are not of this day's part become slow ones."""
    counts: Counter[str] = Counter()
    for item in items:
        if marker := item.get_closest_marker("by_day"):
            matrix = item.nodeid.partition("[")[0]
            if not is_due(matrix, counts[matrix], *marker.args, day):
                item.add_marker(pytest.mark.slow)
            counts[matrix] += 1


def is_due(matrix: str, index: int, days: int, day: datetime.date) -> bool:
    """Whether the ``index``-th case of a matrix is of this day's part; matrices do not all begin on one day."""
    return (zlib.crc32(matrix.encode()) + index + day.toordinal()) % days == 0

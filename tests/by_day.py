"""What a quick run takes of a large matrix: another part every day, all of it in as many days as the matrix says."""

from __future__ import annotations

import datetime
import zlib


def is_due(matrix: str, index: int, days: int, day: datetime.date) -> bool:
    """Whether the ``index``-th case of a matrix is of this day's part; matrices do not all begin on one day."""
    return (zlib.crc32(matrix.encode()) + index + day.toordinal()) % days == 0

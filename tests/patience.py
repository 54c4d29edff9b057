"""How long to wait on a machine that is busy with other things: deadlines that only a hang should meet."""

from __future__ import annotations

import os
from pathlib import Path

MOST = 12.0


def patience(seconds: float) -> float:
    """``seconds`` of a quiet machine, times the processes that share a core now."""
    sharing = os.getloadavg()[0]
    if (now := Path("/proc/loadavg")).exists():  # the average comes a minute late
        sharing = max(sharing, float(now.read_text().split()[3].split("/")[0]))
    return seconds * min(MOST, max(1.0, sharing / (os.cpu_count() or 1)))

"""A quick run takes a part of a large matrix: by and by all of it, and what is asked for by name."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections import Counter
from pathlib import Path

from by_day import is_due

ROOT = Path(__file__).parents[1]
MATRIX = "tests/kernels/test_triton_kernels.py"


def test_every_case_has_its_day_and_every_day_its_cases():
    first = datetime.date(2026, 12, 30)
    for matrix, days in (("a", 1), ("a", 3), ("b", 3), ("c", 4)):
        due = [
            [i for i in range(10) if is_due(matrix, i, days, first + datetime.timedelta(d))] for d in range(2 * days)
        ]
        assert due[:days] == due[days:]
        assert Counter(i for part in due[:days] for i in part) == Counter(range(10))
        assert min(map(len, due)) >= 10 // days


def collected(*arguments: str) -> int:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", MATRIX, *arguments]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    return sum("test_fused_kernels_equal_their_twin_and_the_oracle[" in line for line in said.splitlines())


def test_a_quick_run_takes_a_part_and_a_full_one_everything():
    quick, everything = collected("-m", "not slow"), collected()
    assert 4 * (quick - 1) < everything <= 4 * (quick + 1)

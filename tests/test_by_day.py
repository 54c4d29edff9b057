"""A quick run takes a part of a large matrix, and in a few days all of it."""

from __future__ import annotations

import datetime
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from by_day import is_due, mark_what_is_not_due


def test_every_case_has_its_day_and_every_day_its_cases():
    first = datetime.date(2026, 12, 30)
    for matrix, days in (("a", 1), ("a", 3), ("b", 3), ("c", 4)):
        due = [
            [i for i in range(10) if is_due(matrix, i, days, first + datetime.timedelta(d))] for d in range(2 * days)
        ]
        assert due[:days] == due[days:]
        assert Counter(i for part in due[:days] for i in part) == Counter(range(10))
        assert min(map(len, due)) >= 10 // days


def case(nodeid: str, *days: int) -> Any:
    marks: list[Any] = []
    by_day = pytest.mark.by_day(*days).mark if days else None
    return SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda _: by_day, add_marker=marks.append, marks=marks)


def test_what_is_not_due_is_slow():
    matrix = [case(f"a.py::test_a[{i}]", 4) for i in range(8)]
    others = [case("a.py::test_b[0]"), case("b.py::test_c", 1)]
    mark_what_is_not_due([matrix[0], *others, *matrix[1:]], datetime.date(2026, 12, 30))
    due = [i for i, item in enumerate(matrix) if not item.marks]
    assert len(due) == 2 and due[1] - due[0] == 4
    assert all(item.marks == [pytest.mark.slow] for i, item in enumerate(matrix) if i not in due)
    assert not any(item.marks for item in others)

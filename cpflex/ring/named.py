"""Schedules by the names that they give themselves: ``"ring"``, ``"even:4"``, ``"relay:1/4/4"``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cpflex.ring.schedule import ScheduleFn, Stages, direct, even, gather, ring, ring_both
from cpflex.ring.two_level import relay

PLAIN: dict[str, ScheduleFn] = {"ring": ring, "ring:both": ring_both, "direct": direct, "gather": gather}
STAGED: dict[str, Callable[[Stages], ScheduleFn]] = {
    "even": even,
    "relay": relay,
    "striped": partial(relay, stripe=True),
}


def named_schedule(name: str) -> ScheduleFn | None:
    """The function that makes schedules of this name; None if it is none of cpflex's.

    >>> named_schedule("even:1/4/4")
    """
    family, _, stages = name.partition(":")
    if name in PLAIN:
        return PLAIN[name]
    if family not in STAGED or not all(part.isdecimal() and int(part) for part in stages.split("/")):
        return None
    found = STAGED[family](int(stages) if stages.isdecimal() else tuple(map(int, stages.split("/"))))
    return found if found.__name__ == name else None

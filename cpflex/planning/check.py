"""Checks: a plan is what would be planned again from its masks and its layout. Planning is pure, so any part that was
damaged on its way differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpflex.planning.mask_kind import KindWork, MaskKind, plan_kind
from cpflex.planning.plan_bytes import WrongPlan
from cpflex.ring.named import named_schedule
from cpflex.ring.schedule import ScheduleFn
from cpflex.sharding.layout import Layout


def check_layout(layout: Layout, rank: int, ulysses_size: int) -> None:
    """A layout itself refuses a table that does not deal out every chunk once, or whose shards cannot be cut.

    Raises:
        WrongPlan: numbers that no layout has.
    """
    for name, value, least, most in (
        ("seq_len", layout.seq_len, 1, 2**31 - 1),
        ("chunk_len", layout.chunk_len, 1, 2**31 - 1),
        ("start", layout.start, 0, 2**31 - 1 - layout.seq_len),
        ("ulysses_size", ulysses_size, 1, layout.local_len),
        ("rank", rank, 0, layout.world_size * ulysses_size - 1),
    ):
        if type(value) is not int or not least <= value <= most:
            raise WrongPlan(f"the plan is wrong: {name} must be from {least} to {most}; got {value!r}")


def check_degrees(sizes: Sequence[int], most: int) -> None:
    """Ranks that exchange heads: for some mask kind as many as the plan says, for the others a part of them.

    Raises:
        WrongPlan: other numbers.
    """
    if any(type(size) is not int or size < 1 or most % size for size in sizes) or most not in sizes:
        raise WrongPlan(f"the plan is wrong: heads are exchanged among {most} ranks, by mask kind among {list(sizes)}")


def check_kind(name: str, kind: MaskKind, layout: Layout, rank: int, schedule: ScheduleFn | None) -> None:
    """Plan one mask again and compare. ``layout`` and ``rank``: of its shards.

    Raises:
        WrongPlan: something differs, or the schedule function is not known.
    """
    if kind.keys is not None and kind.keys.world_size not in (1, layout.world_size):
        raise WrongPlan(f"the plan is wrong: the keys of {name!r} are on other ranks than its queries")
    chosen = schedule or named_schedule(kind.schedule)
    if chosen is None:
        raise WrongPlan(f"to check the plan, pass its schedule function: plan.check(schedule={kind.schedule})")
    lengths = [layout.end] if kind.keys is None else [layout.end, kind.keys.end]
    if [x.tolist() for x in kind.mask.captured[-len(lengths) :]] != lengths:
        raise WrongPlan(f"the plan is wrong: the mask of {name!r} is of another sequence length")
    batch_size, num_heads = kind.sizes
    keys = {} if kind.keys is None else {name: (kind.keys, 1)}
    work = KindWork(
        *({name: kind.mask}, {name: 1.0}, batch_size or 1, num_heads or 1, kind.machine, keys), start=layout.start
    )
    again = plan_kind(name, kind.mask, layout, rank, work, chosen, batch_size, num_heads, kind.ulysses_size)
    if part := _difference(replace(again, reason=kind.reason), kind, f"kinds[{name!r}]"):
        raise WrongPlan(f"the plan is wrong: {part} is not what make_plan would make of its mask and layout")


def _difference(one: Any, other: Any, name: str) -> str:
    """The name of a part in which two parts of plans differ, "" if there is none."""
    if one is other:  # captured NaN, too
        return ""
    if type(one) is not type(other):
        return name
    if isinstance(one, Tensor):
        return "" if one.dtype == other.dtype and torch.equal(one, other) else name
    if isinstance(one, np.ndarray):
        return "" if one.dtype == other.dtype and np.array_equal(one, other) else name
    if isinstance(one, dict):
        if list(one) != list(other):
            return name
        parts = {f"{name}[{key!r}]": (one[key], other[key]) for key in one}
    elif isinstance(one, tuple):
        if len(one) != len(other):
            return name
        parts = {f"{name}[{place}]": both for place, both in enumerate(zip(one, other, strict=True))}
    elif is_dataclass(one):
        names = [field.name for field in fields(one)]
        parts = {f"{name}.{part}": (getattr(one, part), getattr(other, part)) for part in names}
    else:
        return "" if repr(one) == repr(other) else name  # 1 == True
    return next(filter(None, (_difference(*both, part) for part, both in parts.items())), "")

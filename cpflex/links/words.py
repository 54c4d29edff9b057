"""Words: what a number stands for, left in the store of the job, where every rank of any kind of group can look.

The number is a hash of the words: a rank that says them twice, or that says what another has said, changes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable

from torch.distributed.distributed_c10d import Store, _get_default_store

from cpflex.links.protocol import Words

WITHIN = 10.0
"""Seconds in which a rank that has something to say will have said it."""

POLL = 0.01


def job_store() -> Store:
    """The key-value store through which the processes of the job met."""
    return _get_default_store()


def say(number: int, words: Words) -> None:
    """Leave ``words`` under their number."""
    job_store().set(_key(number), json.dumps(words))


def find(numbers: Iterable[int], within: float = WITHIN) -> dict[int, Words]:
    """What was said about ``numbers``; without those about which nothing is said within so many seconds."""
    store, found, missing = job_store(), {}, set(numbers)
    deadline = time.monotonic() + within
    while missing:
        here = {number for number in missing if store.check([_key(number)])}
        found |= {number: json.loads(store.get(_key(number))) for number in here}
        missing -= here
        if time.monotonic() > deadline:
            break
        if missing:
            time.sleep(POLL)
    return found


def _key(number: int) -> str:
    return f"cpflex/words/{number}"

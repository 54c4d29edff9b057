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
    keys = {_key(number): number for number in numbers}
    return {keys[key]: json.loads(said) for key, said in _appearing(keys, within).items()}


def gather(name: str, rank: int, world_size: int, mine: list[int], within: float = WITHIN) -> list[list[int]]:
    """What every rank of a group calls this with, by rank; zeros of one that does not within so many seconds.

    Rank 0 collects, so that a store which many ranks ask is asked once by each.

    Args:
        name: of this meeting of this group; it is used once.
    """
    keys = [f"{name}/{peer}" for peer in range(world_size)]
    job_store().set(keys[rank], json.dumps(mine))
    if rank == 0:
        found = {key: json.loads(said) for key, said in _appearing(keys, within).items()}
        lists = [found.get(key, [0] * len(mine)) for key in keys]
        job_store().set(f"{name}/all", json.dumps(lists))
        return lists
    if said := _appearing([f"{name}/all"], within + 2.0):
        return json.loads(said[f"{name}/all"])
    return [mine if peer == rank else [0] * len(mine) for peer in range(world_size)]


def _appearing(keys: Iterable[str], within: float) -> dict[str, bytes]:
    """The values of keys, each as soon as it is there; without those that are not within so many seconds."""
    store, found, missing = job_store(), {}, set(keys)
    deadline = time.monotonic() + within
    while missing:
        here = {key for key in missing if store.check([key])}
        found |= {key: store.get(key) for key in here}
        missing -= here
        if time.monotonic() > deadline:
            break
        if missing:
            time.sleep(POLL)
    return found


def _key(number: int) -> str:
    return f"cpflex/words/{number}"

"""Whereabouts: ranks that wait for one another say where they wait, so that a rank in the wrong place is named.

A collective of torch that some rank never joins ends at the group's timeout, often after half an hour, without saying
who is missing. Here a rank that has waited for `PATIENCE` seconds writes where it is to the store of the job, and looks
where the others are: one that waits on the same plan in another group, or for this very rank there, will never come.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist

from cpflex.links.words import job_store

PATIENCE = 3.0
"""Seconds before a rank that waits begins to look around; and at most so many between two looks."""

POLL = 5e-5

log = logging.getLogger(__name__)


MEETING_POLL = 5e-3
"""Of a meeting each look is a question to the store of the whole job."""


class Astray(RuntimeError):
    """A rank waits in another group for what will never come."""


class Awaited(Protocol):
    """What a rank waits for: a collective of torch, or a meeting."""

    def is_completed(self) -> bool: ...

    def wait(self) -> object: ...


class Meeting:
    """All ranks of ``group`` come here once, by the store of the job; another meeting of the same group is over at
    once.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._key = f"cpflex/meeting/{group.group_name}/{dist.get_process_group_ranks(group)}"
        self._world_size = group.size()
        self._ends_at = time.monotonic() + job_store().timeout.total_seconds()  # type: ignore[attr-defined]
        self._num_here = job_store().add(self._key, 1)

    def is_completed(self) -> bool:
        """All are here, or it is too late."""
        if self._num_here < self._world_size:
            time.sleep(MEETING_POLL)
            self._num_here = job_store().add(self._key, 0)
        return self._num_here >= self._world_size or time.monotonic() > self._ends_at

    def wait(self) -> None:
        if self._num_here < self._world_size:
            raise RuntimeError(f"timed out: {self._num_here} of {self._world_size} ranks came")


@dataclass
class Watch:
    """One wait of this process: in ``group``, to compare notes on ``plan`` (a fingerprint)."""

    group: dist.ProcessGroup
    plan: str
    waits: bool = field(default=False, init=False)
    """It has said so to the others."""

    def until_done(self, work: Awaited) -> None:
        """Return when ``work`` is done.

        Raises:
            Astray: a rank of the group waits elsewhere; raised on that rank too.
            ConnectionError: the others did not come within the group's timeout, or are gone.
        """
        look_at = time.monotonic() + PATIENCE
        while not work.is_completed():
            if time.monotonic() > look_at:
                self._look_around()
                look_at = time.monotonic() + PATIENCE / 3
            time.sleep(POLL)
        try:
            work.wait()
        except RuntimeError as error:
            ranks = self._ranks
            missing = [ranks.index(peer) for peer in self._missing()]
            who = f"group ranks {missing} are gone or elsewhere" if missing else "a connection is lost"
            raise ConnectionError(f"group rank {self.group.rank()} waits for the others: {who}: {error}") from error
        if self.waits:
            job_store().delete_key(_place(dist.get_rank()))

    def _say_where(self) -> None:
        job_store().set(_place(dist.get_rank()), json.dumps({"ranks": self._ranks, "plan": self.plan}))
        self.waits = True

    def _look_around(self) -> None:
        store, me, ranks = job_store(), dist.get_rank(), self._ranks
        if not self.waits:
            log.warning("rank %d has waited %g s for the other ranks of %s to begin this call", me, PATIENCE, ranks)
            self._say_where()
        if store.check([_note(me, ranks)]):
            said = store.get(_note(me, ranks)).decode()
            store.delete_key(_note(me, ranks))
            raise Astray(said)
        for place, peer in enumerate(ranks):
            there = _found(peer)
            if there and there["ranks"] != ranks and (me in there["ranks"] or there["plan"] == self.plan):
                said = (
                    f"group rank {place} (rank {peer} of the job) waits in another group, of ranks {there['ranks']}, "
                    f"while ranks {ranks} wait for it; every rank must pass the plan of its own group"
                )
                told = [(other, where) for where in (ranks, there["ranks"]) for other in where if other != me]
                for other, where in told:
                    store.set(_note(other, where), said)
                raise Astray(said)

    def _missing(self) -> list[int]:
        """Ranks of the job that do not say within a second that they wait here, or that their wait failed as ours."""
        try:
            self._say_where()
            time.sleep(1.0)
            places = {peer: _found(peer) for peer in self._ranks}
        except RuntimeError:  # the store is gone too
            return []
        return [peer for peer, there in places.items() if there is None or there["ranks"] != self._ranks]

    @property
    def _ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.group)


def _found(rank: int) -> dict | None:
    """Where a rank of the job says that it waits."""
    store = job_store()
    return json.loads(store.get(_place(rank))) if store.check([_place(rank)]) else None


def _place(rank: int) -> str:
    return f"cpflex/waits/{rank}"


def _note(rank: int, ranks: list[int]) -> str:
    """To a rank that waits in a group."""
    return f"cpflex/note/{rank}/{ranks}"

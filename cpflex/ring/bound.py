"""Bound: one mask kind of a plan, tied to a group: everything that an attention call needs besides its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpflex.kernels import Call
from cpflex.kernels.tables import Tables, bring, foresee
from cpflex.links.protocol import Links, Words
from cpflex.mods.graph import Mod
from cpflex.ring.agreement import agree, checksum, in_words, number_of, refuse, settle, words_of
from cpflex.ring.heads import HeadExchange
from cpflex.ring.schedule import Step
from cpflex.tile_mask import Idle


class OnDevice(NamedTuple):
    """The steps of a plan, and what else it knows, on one device."""

    steps: tuple[Step, ...]
    tables: Tables


@dataclass(eq=False)
class Bound:
    """Read by the operator through a handle."""

    mask: Mod
    steps: tuple[Step, ...]
    idle: Idle
    links: Links | None
    facts: dict[str, Any]
    """What ranks must agree on to have plans that belong together."""
    fingerprint: str
    """Of the facts."""
    outer: Links | None = None
    """The ranks among which keys travel: all, or one of each row that exchanges heads."""
    heads: HeadExchange = field(default_factory=HeadExchange)
    calls: dict[Any, tuple[Words, int]] = field(default_factory=dict)
    """Kinds of calls that were made, in words and as the number by which ranks compare them."""
    devices: dict[torch.device, OnDevice] = field(default_factory=dict)
    decided: dict[Any, Call] = field(default_factory=dict)
    """Calls without captured tensors, by what else tells them apart: what was decided for them holds for the next."""

    def on(self, device: torch.device) -> tuple[Mod, tuple[Step, ...], Idle]:
        """(mask, steps, idle tokens) with their tensors on a device; brought there once."""
        found = self.tables_on(device)
        return found.tables.mask, found.steps, found.tables.idle

    def tables_on(self, device: torch.device, *, with_work: bool = False) -> OnDevice:
        """What a call needs besides its tensors, with what it needs it for on a device; brought there once.

        Args:
            with_work: all that kernels may look up, too, rather than what the first call asks for.
        """
        if device not in self.devices:
            device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        if device in self.devices:
            found = self.devices[device]
            if with_work:
                foresee(found.tables, device)
        else:
            tile_masks = [step.tile_mask for step in self.steps]
            tables = bring(self.mask, tile_masks, self.idle, device, with_work=with_work)
            steps = (Step(s.exchange, m) for s, m in zip(self.steps, tables.tile_masks, strict=True))
            found = self.devices[device] = OnDevice(tuple(steps), tables)
        for arena in found.tables.siblings.arenas:
            arena.wait()
        return found

    @property
    def has_peers(self) -> bool:
        return self.links is not None and self.links.world_size > 1

    def agree(self, facts: dict[str, Any], device: torch.device) -> None:
        """Compare this call with the other ranks', before every exchange of tensors on ``device``. Before anything that
        arrives is used, `settle`.
        """
        if not self.has_peers:
            return
        assert self.links is not None
        kind = tuple(facts.items())
        if kind not in self.calls:
            words = words_of({**self.facts, **facts})
            self.calls[kind] = words, number_of(words)
        with self._before(facts["direction"]):
            agree(self.links, self.fingerprint, *self.calls[kind], device)

    def settle(self, direction: str) -> None:
        """Return when the others are known to make the same call, which is in this direction."""
        if self.has_peers:
            assert self.links is not None
            with self._before(direction):
                settle(self.links)

    @contextmanager
    def _before(self, direction: str) -> Iterator[None]:
        try:
            yield
        except ConnectionError as error:
            raise ConnectionError(f"before {direction}, mask kind {self.facts['mask kind']!r}: {error}") from error

    def require_same(self, tensors: Mapping[str, Tensor]) -> None:
        """Compare tensors with the other ranks', by their checksums, once."""
        if self.links is None or self.links.world_size == 1:
            return
        words = {name: checksum(x) for name, x in tensors.items()}
        number = number_of(words)
        agree(self.links, self.fingerprint, words, number, None)
        self.links.agreed.pop(number)  # it does not come again

    @contextmanager
    def in_words(self) -> Iterator[None]:
        """What fails inside because ranks disagree is raised as what they disagree about."""
        if self.links is None or self.links.world_size == 1:
            yield
            return
        try:
            with in_words(self.links):
                yield
        except (ConnectionError, TimeoutError) as error:
            if self.heads.size == 1:
                raise
            raise type(error)(f"group rank {self.links.rank}, {self.heads.place}: {error}") from error

    def refuse(self, error: Exception) -> None:
        """Make the other ranks raise too."""
        if self.links is not None and self.links.world_size > 1:
            refuse(self.links, self.fingerprint, error)

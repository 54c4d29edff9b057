"""Bound: one mask kind of a plan, tied to a group: everything that an attention call needs besides its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cpflex.links.protocol import Links, Words
from cpflex.mods.graph import Mod
from cpflex.ring.agreement import agree, in_words, number_of, refuse, words_of
from cpflex.ring.schedule import Step
from cpflex.tile_mask import Idle


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
    calls: dict[Any, tuple[Words, int]] = field(default_factory=dict)
    """Kinds of calls that were made, in words and as the number by which ranks compare them."""
    devices: dict[torch.device, tuple[Mod, tuple[Step, ...], Idle]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Mod, Sequence[Step], Idle]:
        """(mask, steps, idle tokens) with their tensors on a device; copied once."""
        if device not in self.devices:
            steps = tuple(replace(s, tile_mask=replace(s.tile_mask, device=device)) for s in self.steps)
            idle = Idle(*(table.to(device) for table in self.idle))
            self.devices[device] = (self.mask.map_captured(lambda t: t.to(device)), steps, idle)
        return self.devices[device]

    def agree(self, facts: dict[str, Any], device: torch.device) -> None:
        """Compare this call with the other ranks', before every exchange of tensors on ``device``."""
        if self.links is None or self.links.world_size == 1:
            return
        kind = tuple(facts.items())
        if kind not in self.calls:
            words = words_of({**self.facts, **facts})
            self.calls[kind] = words, number_of(words)
        try:
            agree(self.links, self.fingerprint, *self.calls[kind], device)
        except ConnectionError as error:
            kind_name = self.facts["mask kind"]
            raise ConnectionError(f"before {facts['direction']}, mask kind {kind_name!r}: {error}") from error

    @contextmanager
    def in_words(self) -> Iterator[None]:
        """What fails inside because ranks disagree is raised as what they disagree about."""
        if self.links is None or self.links.world_size == 1:
            yield
            return
        with in_words(self.links):
            yield

    def refuse(self, error: Exception) -> None:
        """Make the other ranks raise too."""
        if self.links is not None and self.links.world_size > 1:
            refuse(self.links, self.fingerprint, error)

"""Bound: one mask kind of a plan, tied to a group: everything that an attention call needs besides its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cpflex.links.protocol import Links
from cpflex.mods.graph import Mod
from cpflex.ring.agreement import agree, number_of, refuse
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
    agreed: dict[Any, int] = field(default_factory=dict)
    """Numbers of the kinds of calls on which the ranks have agreed."""
    devices: dict[torch.device, tuple[Mod, tuple[Step, ...], Idle]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Mod, Sequence[Step], Idle]:
        """(mask, steps, idle tokens) with their tensors on a device; copied once."""
        if device not in self.devices:
            steps = tuple(replace(s, tile_mask=replace(s.tile_mask, device=device)) for s in self.steps)
            idle = Idle(*(table.to(device) for table in self.idle))
            self.devices[device] = (self.mask.map_captured(lambda t: t.to(device)), steps, idle)
        return self.devices[device]

    def agree(self, facts: dict[str, Any]) -> None:
        """Compare this call with the other ranks', before every exchange."""
        if self.links is None or self.links.world_size == 1:
            return
        kind = tuple(facts.items())
        known = kind in self.agreed
        facts = {**self.facts, **facts}
        number = self.agreed[kind] if known else number_of(facts)
        try:
            agree(self.links, self.fingerprint, facts, number, known)
        except ConnectionError as error:
            raise ConnectionError(f"before {facts['direction']}, mask kind {facts['mask kind']!r}: {error}") from error
        self.agreed[kind] = number

    def refuse(self, error: Exception) -> None:
        """Make the other ranks raise too."""
        if self.links is not None and self.links.world_size > 1:
            refuse(self.links, self.fingerprint, error)

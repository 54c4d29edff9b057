"""Bound: one mask kind of a plan, tied to a group: everything that an attention call needs besides its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cpflex.links import Links
from cpflex.mods.graph import Mod
from cpflex.ring.agreement import agree, refuse
from cpflex.ring.schedule import Step


@dataclass(eq=False)
class Bound:
    """Read by the operator through a handle."""

    mask: Mod
    steps: tuple[Step, ...]
    links: Links | None
    fingerprint: str
    seq_len: int
    positions: Tensor  # int64 [S_local], CPU
    agreed: set[Any] = field(default_factory=set)
    """Signatures of calls on which the ranks have agreed."""
    devices: dict[torch.device, tuple[Mod, tuple[Step, ...], Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Mod, Sequence[Step], Tensor]:
        """(mask, steps, indices of the rank's pads) with their tensors on a device; copied once."""
        if device not in self.devices:
            steps = tuple(replace(s, tile_mask=replace(s.tile_mask, device=device)) for s in self.steps)
            pads = torch.nonzero(self.positions >= self.seq_len).view(-1).to(device)
            self.devices[device] = (self.mask.map_captured(lambda t: t.to(device)), steps, pads)
        return self.devices[device]

    def agree(self, facts: dict[str, Any]) -> None:
        """Compare this call with the other ranks', once per kind of call."""
        signature = tuple(sorted((name, repr(value)) for name, value in facts.items()))
        if self.links is not None and self.links.world_size > 1 and signature not in self.agreed:
            agree(self.links, {"plan": self.fingerprint, **facts})
        self.agreed.add(signature)

    def refuse(self, error: Exception) -> None:
        """Make the other ranks raise too, if they are still to agree on this plan."""
        if self.links is not None and self.links.world_size > 1 and not self.agreed:
            refuse(self.links, error)

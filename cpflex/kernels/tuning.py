"""KernelConfig per architecture, pass, head dim and dtype: a plain table, nothing is tuned at run time.

Block sizes change speed, not results beyond rounding. `python launch/tune.py` searches on a GPU and prints rows for
this table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelConfig:
    """How a kernel cuts its work; blocks divide a tile (128)."""

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """As the kernel's launch takes them."""
        blocks = {"BLOCK_Q": self.block_q, "BLOCK_KV": self.block_kv}
        return blocks | {"num_warps": self.num_warps, "num_stages": self.num_stages}


PASSES = ("forward", "dq", "dkdv", "captured")
WIDTHS = (64, 128, 256)
"""Head dims that have rows of their own; others take the next one up."""
_Rows = dict[tuple[str, int], KernelConfig]

_INTERPRETED = KernelConfig(64, 64, 4, 1)
"""Two blocks to a tile, on both axes, so that tests see them."""

_SM90: _Rows = {
    ("forward", 64): KernelConfig(128, 64, 8, 3),
    ("forward", 128): KernelConfig(128, 64, 8, 3),
    ("forward", 256): KernelConfig(128, 32, 8, 2),
    ("dq", 64): KernelConfig(128, 64, 8, 3),
    ("dq", 128): KernelConfig(128, 64, 8, 2),
    ("dq", 256): KernelConfig(64, 32, 8, 2),
    ("dkdv", 64): KernelConfig(64, 128, 8, 3),
    ("dkdv", 128): KernelConfig(64, 128, 8, 2),
    ("dkdv", 256): KernelConfig(32, 64, 8, 2),
    ("captured", 64): KernelConfig(64, 64, 4, 2),
    ("captured", 128): KernelConfig(64, 64, 4, 2),
    ("captured", 256): KernelConfig(64, 32, 8, 2),
}


def capability_of(device: torch.device) -> int:
    """80 for sm_80; 0 where there is no GPU: the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def lookup(which: str, q: Tensor, v: Tensor) -> KernelConfig:
    width = next(w for w in WIDTHS if max(q.shape[3], v.shape[3]) <= w)
    if capability_of(q.device) == 0:
        return _INTERPRETED
    return _SM90[which, width]


def l2_bytes(device: torch.device) -> int:
    return 40 << 20

"""KernelConfig per architecture, pass, head dim and dtype: a plain table; nothing is tuned at run time.

Block sizes change speed, and results only by rounding. Rows were chosen by what ptxas makes of them with a document
mask and ALiBi, the heaviest common mods (registers, spills, shared memory), not yet by
time on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cpflex.kernels.call import OR_PORTABLE, OTHERWISE


@dataclass(frozen=True)
class KernelConfig:
    """How a kernel cuts its work. Blocks divide a tile (128)."""

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int
    tma: bool = False
    """Whole blocks are copied by tensor descriptors, from sm_90 on. Off in every row until it is faster on a GPU; with
    Triton 3.6, kernels of 128 dims would be serialised.
    """

    apart: bool = False
    """dK and dV by launches of their own, which compute the scores twice: where one program cannot hold both."""
    pieces: bool = False
    """Rows of 96 dims as 64 and 32, of 192 as 128 and 64, where one block would have more columns: of powers of two.
    Fewer products and less shared memory; where it takes more instructions or spills, rows are padded.
    """

    narrow: bool = False
    """Offsets within a block are int32 and stay in registers, where they fit (`launch.rows_are_near`). Fewer
    instructions; where the registers are missed more, addresses are made anew, in int64. Forward and dq.
    """

    @property
    def options(self) -> dict[str, int]:
        """As a launch takes them."""
        blocks = {"BLOCK_Q": self.block_q, "BLOCK_KV": self.block_kv}
        return blocks | {"num_warps": self.num_warps, "num_stages": self.num_stages}


PASSES = ("forward", "dq", "dkdv", "captured", "captured_by_pair")
PAGE_PASSES = ("decode",)
"""Their work is no tile mask's. A block has ``block_q`` rows at most; one of 16 rows has 4 warps."""
WIDTHS = (64, 128, 256)
"""Head dims with rows of their own; others use the next one up, the larger of those of q and v deciding."""

Rows = dict[tuple[str, int], KernelConfig]

SM80: Rows = {  # A100: 163 KiB of shared memory, mma from registers
    ("forward", 64): KernelConfig(128, 64, 8, 3),
    ("forward", 128): KernelConfig(64, 64, 4, 2, pieces=True, narrow=True),  # two programs fit; 128 queries would spill
    ("forward", 256): KernelConfig(64, 64, 8, 2),
    ("dq", 64): KernelConfig(64, 64, 4, 2),
    ("dq", 128): KernelConfig(64, 64, 4, 2, narrow=True),  # two programs fit, as for dk and dv
    ("dq", 256): KernelConfig(64, 32, 8, 2),
    ("dkdv", 64): KernelConfig(64, 64, 4, 3),
    ("dkdv", 128): KernelConfig(64, 64, 4, 2),  # with 8 warps nothing spills, but only one program fits
    ("dkdv", 256): KernelConfig(32, 64, 8, 2),
    ("captured", 64): KernelConfig(64, 64, 4, 2),
    ("captured", 128): KernelConfig(64, 64, 4, 2),
    ("captured", 256): KernelConfig(64, 32, 8, 2),
    ("captured_by_pair", 64): KernelConfig(64, 32, 4, 2),  # 64 keys spill: each pair has a place
    ("captured_by_pair", 128): KernelConfig(64, 32, 4, 2),
    ("captured_by_pair", 256): KernelConfig(64, 32, 8, 2),
    ("decode", 64): KernelConfig(64, 64, 8, 4),
    ("decode", 128): KernelConfig(32, 64, 8, 3),  # 64 rows would spill, here and on sm_90
    ("decode", 256): KernelConfig(32, 32, 8, 3),
}
SM86: Rows = SM80 | {  # RTX 30, 40 and 50, L4, L40: 99 KiB of shared memory
    ("forward", 256): KernelConfig(64, 32, 8, 2),
    ("dq", 128): KernelConfig(64, 64, 8, 2),  # one program fits, whatever its warps
    ("dkdv", 128): KernelConfig(64, 64, 8, 2),
    ("dq", 256): KernelConfig(32, 32, 4, 2),
    ("dkdv", 256): KernelConfig(32, 32, 4, 2),
    ("captured", 256): KernelConfig(32, 32, 4, 2),
    ("captured_by_pair", 256): KernelConfig(32, 32, 4, 2),
}
SM90: Rows = {  # H100, H200: 227 KiB, wgmma; warpgroups of 64 rows each
    ("forward", 64): KernelConfig(64, 64, 4, 3),  # one warpgroup: two or three programs fit
    ("forward", 128): KernelConfig(128, 64, 8, 3, narrow=True),
    ("forward", 256): KernelConfig(128, 32, 8, 2),  # 64 queries are no wgmma of two warpgroups
    ("dq", 64): KernelConfig(128, 64, 8, 3),
    ("dq", 128): KernelConfig(128, 64, 8, 3, narrow=True),
    ("dq", 256): KernelConfig(128, 32, 8, 2),
    ("dkdv", 64): KernelConfig(64, 128, 8, 3),
    ("dkdv", 128): KernelConfig(64, 128, 8, 3),  # every register is taken
    ("dkdv", 256): KernelConfig(32, 128, 8, 2, apart=True),  # either takes 128 registers a thread
    ("captured", 64): KernelConfig(64, 64, 4, 2),
    ("captured", 128): KernelConfig(64, 64, 4, 2),
    ("captured", 256): KernelConfig(64, 32, 8, 2),
    ("captured_by_pair", 64): KernelConfig(64, 32, 8, 2),
    ("captured_by_pair", 128): KernelConfig(64, 32, 8, 2),
    ("captured_by_pair", 256): KernelConfig(64, 32, 8, 2),
    ("decode", 64): KernelConfig(64, 64, 8, 4),
    ("decode", 128): KernelConfig(32, 64, 8, 3),
    ("decode", 256): KernelConfig(32, 32, 8, 3),
}
SM90 = {row: replace(config, pieces=True) for row, config in SM90.items()}
SM90_OF_OTHER_RELEASES: Rows = SM90 | {  # than Triton 3.7: with 64 queries those of 3.6 and 3.9 spill
    ("dkdv", 128): KernelConfig(32, 128, 8, 3, pieces=True),
}
SM100: Rows = {  # B200: 227 KiB, accumulators in tensor memory
    ("forward", 64): KernelConfig(128, 64, 8, 3),
    ("forward", 128): KernelConfig(128, 64, 8, 3),
    ("forward", 256): KernelConfig(64, 64, 8, 2),
    ("dq", 64): KernelConfig(128, 64, 8, 3),
    ("dq", 128): KernelConfig(128, 64, 8, 2),
    ("dq", 256): KernelConfig(64, 64, 8, 2),
    ("dkdv", 64): KernelConfig(64, 128, 8, 2),
    ("dkdv", 128): KernelConfig(64, 128, 8, 2),
    ("dkdv", 256): KernelConfig(32, 64, 8, 2),
    ("captured", 64): KernelConfig(64, 64, 4, 2),
    ("captured", 128): KernelConfig(64, 64, 4, 2),
    ("captured", 256): KernelConfig(64, 32, 8, 2),
    ("captured_by_pair", 64): KernelConfig(64, 64, 8, 2),
    ("captured_by_pair", 128): KernelConfig(64, 32, 8, 2),
    ("captured_by_pair", 256): KernelConfig(64, 32, 8, 2),
    ("decode", 64): KernelConfig(32, 64, 8, 4),  # 64 rows leave one buffer to V, here and with 128 dims
    ("decode", 128): KernelConfig(32, 64, 8, 3),
    ("decode", 256): KernelConfig(32, 32, 8, 3),
}
FP32: Rows = {  # any GPU: no tensor cores (tf32 is not fp32), so each thread holds its operands
    ("forward", 64): KernelConfig(32, 32, 4, 1),
    ("forward", 128): KernelConfig(32, 16, 8, 1),
    ("forward", 256): KernelConfig(32, 16, 8, 1),
    ("dq", 64): KernelConfig(32, 32, 8, 1),
    ("dq", 128): KernelConfig(16, 16, 8, 1),
    ("dq", 256): KernelConfig(16, 16, 8, 1),
    ("dkdv", 64): KernelConfig(32, 32, 8, 1),
    ("dkdv", 128): KernelConfig(16, 16, 8, 1),
    ("dkdv", 256): KernelConfig(16, 16, 8, 1),
    ("captured", 64): KernelConfig(32, 32, 4, 1),
    ("captured", 128): KernelConfig(32, 32, 8, 1),
    ("captured", 256): KernelConfig(16, 16, 8, 1),
    ("captured_by_pair", 64): KernelConfig(32, 32, 4, 1),
    ("captured_by_pair", 128): KernelConfig(32, 32, 8, 1),
    ("captured_by_pair", 256): KernelConfig(16, 16, 8, 1),
    ("decode", 64): KernelConfig(32, 32, 8, 1),
    ("decode", 128): KernelConfig(32, 16, 8, 1),
    ("decode", 256): KernelConfig(16, 16, 8, 1),
}


@dataclass(frozen=True)
class HopperConfig:
    """How a Gluon kernel of sm_90 cuts its work, for two consumers of 64 queries each, and what it has buffers for."""

    block_kv: int
    k_stages: int
    v_stages: int
    registers: int = 240
    """A thread of a consumer."""

    @property
    def options(self) -> dict[str, int]:
        """As a launch takes them."""
        stages = {"BLOCK_KV": self.block_kv, "K_STAGES": self.k_stages, "V_STAGES": self.v_stages}
        return stages | {"REGISTERS": self.registers, "num_warps": 4}

    @property
    def blocks(self) -> tuple[str, int, int]:
        """What the rows of its work are, rows and columns of a block: runs of consecutive tokens."""
        return "query", 128, self.block_kv


@dataclass(frozen=True)
class HopperBackwardConfig:
    """The same of a kernel of backward, for two consumers of 64 rows each."""

    rows_are: str
    """"query": dq; "key": dk and dv."""
    walked: int
    """Keys, or queries, of a block of what is walked over."""
    stages: int
    """Blocks that there are buffers for."""
    registers: int = 240
    """A thread of a consumer."""

    @property
    def options(self) -> dict[str, int]:
        """As a launch takes them."""
        block = {"BLOCK_KV" if self.rows_are == "query" else "BLOCK_Q": self.walked}
        return block | {"STAGES": self.stages, "REGISTERS": self.registers, "num_warps": 4}

    @property
    def blocks(self) -> tuple[str, int, int]:
        """What the rows of its work are, rows and columns of a block: runs of consecutive tokens."""
        return self.rows_are, 128, self.walked


GATED = ((3, 6), (3, 7), (3, 8), (3, 9))
"""Releases of Triton whose Gluon has what the kernels need, and with which tests have compiled them. Another may have
other names for the same things, or none: Gluon is experimental.
"""


@dataclass(frozen=True)
class GluonRow:
    """A row of GLUON."""

    config: Any
    """A HopperConfig or a HopperBackwardConfig."""
    releases: tuple[tuple[int, ...], ...] = GATED
    """Of Triton, with which this row serves; with others, the portable kernel does."""
    is_default: bool = False
    """Calls that name no backend get it, too: once a GPU has proven it, and timed it as the faster one."""


GLUON: dict[tuple[int, str, int, int], GluonRow] = {  # architecture, pass, head dims of q and of v
    (90, "forward", 64, 64): GluonRow(HopperConfig(128, 2, 3)),
    (90, "forward", 96, 96): GluonRow(HopperConfig(128, 2, 3)),
    (90, "forward", 128, 128): GluonRow(HopperConfig(128, 2, 3)),
    (90, "forward", 192, 128): GluonRow(HopperConfig(64, 2, 3)),
    (90, "forward", 256, 256): GluonRow(HopperConfig(64, 2, 2)),
    (90, "dkdv", 64, 64): GluonRow(HopperBackwardConfig("key", 64, 2)),
    (90, "dkdv", 96, 96): GluonRow(HopperBackwardConfig("key", 64, 2)),
    (90, "dkdv", 128, 128): GluonRow(HopperBackwardConfig("key", 64, 2)),
    (90, "onepass", 64, 64): GluonRow(HopperBackwardConfig("key", 64, 2)),
    (90, "onepass", 96, 96): GluonRow(HopperBackwardConfig("key", 64, 2)),
    (90, "onepass", 128, 128): GluonRow(HopperBackwardConfig("key", 64, 2)),
    (90, "dq", 64, 64): GluonRow(HopperBackwardConfig("query", 128, 2)),
    (90, "dq", 96, 96): GluonRow(HopperBackwardConfig("query", 128, 2)),
    (90, "dq", 128, 128): GluonRow(HopperBackwardConfig("query", 128, 2)),
    (90, "dq", 192, 128): GluonRow(HopperBackwardConfig("query", 64, 2)),
}
"""Which kernels of one architecture serve what, in bf16 and fp16. Those of a row that is no default are asked for by
``kernel_options={"BACKEND": "GLUON"}``. What has no row, and what asks for "TRITON", is served by the portable kernels.
``launch/gpu_day.py`` proves and times the rows on a GPU, and prints those to change.
"""

INTERPRETED = KernelConfig(64, 64, 4, 1, pieces=True, narrow=True)
"""On the CPU: two blocks to a tile, on both axes, so that tests see them."""


def rows_for(capability: int, dtype: torch.dtype) -> Rows:
    """The rows of an architecture (90: sm_90); one without rows of its own gets those of the last before it."""
    if dtype == torch.float32:
        return FP32
    if capability in (86, 87, 89) or capability >= 120:
        return SM86
    if capability < 90:
        return SM80
    if capability >= 100:
        return SM100
    return SM90 if triton_release() == (3, 7) else SM90_OF_OTHER_RELEASES


def lookup(which: str, q: Tensor, v: Tensor) -> KernelConfig:
    """The row of one of PASSES or PAGE_PASSES for queries [B, Hq, S, D] and values [B, H, K, Dv]."""
    head_dim = max(q.shape[3], v.shape[3])
    require_support(q.device, head_dim)
    if (capability := capability_of(q.device)) == 0:
        return INTERPRETED
    return rows_for(capability, q.dtype)[which, next(width for width in WIDTHS if head_dim <= width)]


def gluon_row(which: str, device: torch.device, head_dim: int, v_dim: int, dtype: torch.dtype) -> GluonRow | None:
    """The row of GLUON that can serve a pass on a device; None: the portable kernel does."""
    row = GLUON.get((capability_of(device), which, head_dim, v_dim))
    if row is None or dtype not in (torch.bfloat16, torch.float16) or triton_release() not in row.releases:
        return None
    return row


def is_served_by_gluon(which: str, q: Tensor, v: Tensor, backend: str | None) -> bool:
    """Whether a pass of a call with queries [B, Hq, S, D] and values [B, H, K, Dv] gets the kernel of GLUON.

    Raises:
        NotImplementedError: as `require_gluon`, if the call asks for "gluon".
    """
    if backend == "gluon":
        require_gluon(q.device)
    elif backend is not None:
        return False
    row = gluon_row(which, q.device, q.shape[3], v.shape[3], q.dtype)
    return row is not None and (backend == "gluon" or row.is_default)


def require_gluon(device: torch.device) -> None:
    """
    Raises:
        NotImplementedError: another GPU than sm_90, or a Triton with which the kernels were not compiled.
    """
    if (capability := capability_of(device)) not in {architecture for architecture, *_ in GLUON}:
        name = "not an sm_90 GPU" if capability < 80 else f"sm_{capability}"
        raise NotImplementedError(f"backend 'gluon' needs sm_90 (H100, H200); {device} is {name}{OR_PORTABLE}")
    if (release := triton_release()) not in GATED:
        first, last, this = (".".join(map(str, x)) for x in (GATED[0], GATED[-1], release))
        raise NotImplementedError(f"backend 'gluon' needs Triton {first} to {last}; this is {this}{OR_PORTABLE}")


def require_support(device: torch.device, head_dim: int) -> None:
    """
    Raises:
        NotImplementedError: there are no kernels for this head dim, or for this GPU.
    """
    if head_dim > WIDTHS[-1]:
        raise NotImplementedError(f"backend 'triton' has head dims up to {WIDTHS[-1]}; got {head_dim}{OTHERWISE}")
    if 0 < (capability := capability_of(device)) < 80:
        name = f"sm_{capability}" if torch.version.cuda else "not one of NVIDIA's"
        raise NotImplementedError(f"backend 'triton' needs sm_80 (A100) or later; {device} is {name}{OTHERWISE}")


@lru_cache
def triton_release() -> tuple[int, ...]:
    """(3, 7) for 3.7.1."""
    import triton  # by its own word: the package has other names, too

    return tuple(int(number) for number in triton.__version__.split(".")[:2])


@lru_cache
def capability_of(device: torch.device) -> int:
    """90 for sm_90; 0 on the CPU, where kernels are interpreted; 1 for a GPU that has no such number."""
    if device.type != "cuda":
        return 0
    if torch.version.cuda is None:
        return 1
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 25

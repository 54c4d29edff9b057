"""KernelConfig per architecture, pass, head dim and dtype: a plain table; nothing is tuned at run time.

Block sizes change speed, and results only by rounding. Rows were chosen by what ptxas makes of them with a document
mask and ALiBi, the heaviest common mods (registers, spills, shared memory), not yet by
time on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

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
    ("forward", 128): KernelConfig(64, 64, 4, 2, pieces=True),  # two programs fit; 128 queries would spill
    ("forward", 256): KernelConfig(64, 64, 8, 2),
    ("dq", 64): KernelConfig(64, 64, 4, 2),
    ("dq", 128): KernelConfig(64, 64, 8, 2),
    ("dq", 256): KernelConfig(64, 32, 8, 2),
    ("dkdv", 64): KernelConfig(64, 64, 4, 3),
    ("dkdv", 128): KernelConfig(64, 64, 8, 2),  # 128 keys would spill: dk and dv take 128 registers a thread
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
    ("dq", 256): KernelConfig(32, 32, 4, 2),
    ("dkdv", 256): KernelConfig(32, 32, 4, 2),
    ("captured", 256): KernelConfig(32, 32, 4, 2),
    ("captured_by_pair", 256): KernelConfig(32, 32, 4, 2),
}
SM90: Rows = {  # H100, H200: 227 KiB, wgmma; two warpgroups of 64 rows each
    ("forward", 64): KernelConfig(128, 64, 8, 3),  # 128 keys at once spill with Triton 3.6
    ("forward", 128): KernelConfig(128, 64, 8, 3),
    ("forward", 256): KernelConfig(128, 32, 8, 2),  # 64 queries are no wgmma of two warpgroups
    ("dq", 64): KernelConfig(128, 64, 8, 3),
    ("dq", 128): KernelConfig(128, 64, 8, 3),
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


HOPPER: dict[tuple[str, int, int], HopperConfig] = {  # head dims of q and of v; what is not here has portable kernels
    ("forward", 64, 64): HopperConfig(128, 2, 3),
    ("forward", 96, 96): HopperConfig(128, 2, 3),
    ("forward", 128, 128): HopperConfig(128, 2, 3),
    ("forward", 192, 128): HopperConfig(64, 2, 3),
    ("forward", 256, 256): HopperConfig(64, 2, 2),
}
"""Asked for by ``kernel_options={"BACKEND": "GLUON"}`` until a GPU has proven them."""

INTERPRETED = KernelConfig(64, 64, 4, 1, pieces=True)
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


def hopper_row(which: str, head_dim: int, v_dim: int, dtype: torch.dtype) -> HopperConfig | None:
    """The row of HOPPER, or None: the portable kernel then serves what asked for Gluon."""
    return HOPPER.get((which, head_dim, v_dim)) if dtype in (torch.bfloat16, torch.float16) else None


def require_gluon(device: torch.device) -> None:
    """
    Raises:
        NotImplementedError: another GPU than sm_90, or a Triton whose Gluon has no warp specialisation.
    """
    if (capability := capability_of(device)) != 90:
        name = "not an sm_90 GPU" if capability < 80 else f"sm_{capability}"
        raise NotImplementedError(f"backend 'gluon' needs sm_90 (H100, H200); {device} is {name}{OR_PORTABLE}")
    if triton_release() < (3, 6):
        release = ".".join(map(str, triton_release()))
        raise NotImplementedError(f"backend 'gluon' needs Triton 3.6 or later; this is {release}{OR_PORTABLE}")


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

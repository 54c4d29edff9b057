"""A model, no measurement: what a loop of machine code costs on one quarter of a multiprocessor.

`bounds` says how long each unit is busy in a turn of the loop, and so which of them bounds it at best. `replay` says
how long a turn takes when the warps of a quarter run it side by side: each in its order, one instruction a cycle for
all, with the stalls and scoreboards that ptxas encoded, pipes with rates and latencies, tensor-core products of sm_90
that run by themselves and share the port of shared memory with copies, and barriers.

Not in it: L2 and HBM, clocks, power, misses of the instruction cache, conflicts of banks, waits for other warpgroups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from sass import Instruction, count_by_unit, trace


@dataclass(frozen=True)
class Gpu:
    """Of a quarter of a multiprocessor: cycles that a pipe is taken by an instruction of a warp."""

    products: int  # multiply-adds of 16-bit numbers a cycle
    fp32: int
    integer: int = 2
    mufu: int = 8
    shared_bytes: int = 233472
    """Of a multiprocessor, with 1 KiB that each block loses."""
    clock_ghz: float | None = None
    """At which the measured points are reproduced."""


GPUS = {
    80: Gpu(products=256, fp32=2, shared_bytes=167936),  # A100
    90: Gpu(products=512, fp32=1, clock_ghz=1.74),  # H100, H200
    100: Gpu(products=1024, fp32=1),  # B200
}
SHARED_PORT = 128
"""Bytes a cycle, of a whole multiprocessor."""


def tensor_cycles(instruction: Instruction, gpu: Gpu) -> float:
    """0 for those of sm_100: their shape is in a descriptor."""
    if wgmma := re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.op):
        m, n, k = map(int, wgmma.groups())
        return m * n * k / 4 / gpu.products
    if mma := re.match(r"HMMA\.(16)(8)(16|8)\b", instruction.op):
        m, n, k = map(int, mma.groups())
        return m * n * k / gpu.products
    return 0.0


# -- bounds


def bounds(loop: list[Instruction], gpu: Gpu, warps: int, tensor: float | None = None) -> dict[str, float]:
    """Cycles a turn that each unit of a quarter is busy with ``warps`` warps.

    Args:
        tensor: of one warp, where it cannot be read from the instructions.
    """
    path = trace(loop)
    counts = count_by_unit(path)
    by_instruction = sum(tensor_cycles(x, gpu) for x in path)
    return {
        "tensor": warps * (by_instruction if tensor is None else tensor),
        "mufu": float(warps * gpu.mufu * counts["mufu"]),
        "fp32": float(warps * gpu.fp32 * (counts["fp32"] + sum(x.base == "IMAD" for x in path))),
        "integer": float(warps * gpu.integer * sum(x.takes_alu for x in path)),
        "issue": float(warps * len(path)),
    }


# -- replay

FILL = 30
"""Cycles from the end of a wgmma's time on the tensor cores to its result."""
QUEUE = 64
"""wgmmas of a warp that may wait for the tensor cores before it waits itself."""
LATENCY = {
    **dict.fromkeys(("LDC", "ULDC", "LDCU"), 30),
    **dict.fromkeys(("R2UR", "S2UR", "S2R", "VOTEU", "REDUX"), 14),
    **dict.fromkeys(("FENCE", "MEMBAR"), 40),
    "SYNCS": 24,
    "MUFU": 26,
    "HMMA": 24,
    "BAR": 20,
}
LOADS = ("LD", "LDG", "LDL")
SHARED = ("LDS", "STS", "LDSM", "STSM", "SHFL", "LDGSTS")


@dataclass(eq=False)
class Warp:
    """One of those that share a quarter; it stands for those of its warpgroup in the other quarters."""

    block: int
    group: int
    path: list[Instruction]
    ready: float  # no earlier than this
    at: int = 0
    turn: int = 0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 8)
    products: list[float] = field(default_factory=list)  # when those that wait for the tensor cores begin
    groups: list[float] = field(default_factory=list)  # when each group of wgmmas has its results
    barrier: object = None  # it waits for
    ends: list[float] = field(default_factory=list)  # of turns

    @property
    def next(self) -> Instruction:
        return self.path[self.at]


@dataclass
class Quarter:
    """When each pipe is free."""

    gpu: Gpu
    tensor: float = 0.0
    port: float = 0.0  # of shared memory
    mufu: float = 0.0
    integer: float = 0.0
    fp32: float = 0.0
    heavy: float = 0.0  # multiplications of integers
    memory: float = 0.0


def replay(
    loop: list[Instruction], gpu: Gpu, warps: int, blocks: int = 1, turns: int = 14, in_turns: bool = False
) -> float:
    """Cycles a turn with ``warps`` warps in each of ``blocks`` blocks on a quarter, once it is steady.

    Args:
        in_turns: barriers between two warpgroups hand the turn on, as FlashAttention-3's do.
    """
    path = trace(loop)
    crew = [Warp(i // warps, i % warps, path, 137.0 * i) for i in range(warps * blocks)]
    quarter, barriers = Quarter(gpu), Barriers(crew, in_turns)
    now, last = 0.0, 0
    while any(warp.turn < turns for warp in crew):
        order = [*crew[last:], *crew[:last]]
        times = [(_earliest(warp, quarter, now), i) for i, warp in enumerate(order) if _goes_on(warp, turns)]
        assert times, "all warps wait at barriers"
        at, chosen = min(times)
        if at > now:
            now = at
            continue
        warp = order[chosen]
        last = crew.index(warp)
        instruction = warp.next
        _issue(warp, instruction, quarter, now)
        if instruction.base == "BAR":
            barriers.meet(warp, instruction, now)
        warp.at += 1
        if warp.at == len(path):
            warp.at, warp.turn = 0, warp.turn + 1
            warp.ends.append(now)
        now += 1
    ends = sorted(end for warp in crew for end in warp.ends)
    warm = len(crew) * (turns // 2) - 1
    return (ends[-1] - ends[warm]) / (len(ends) - 1 - warm) * len(crew)


def _goes_on(warp: Warp, turns: int) -> bool:
    return warp.turn < turns and warp.barrier is None


def _earliest(warp: Warp, quarter: Quarter, now: float) -> float:
    """Cycle at which a warp may issue its next instruction."""
    x, ready = warp.next, max(now, warp.ready)
    for i in range(6):
        if x.waits >> i & 1:
            ready = max(ready, warp.scoreboards[i])
    if x.base == "HMMA":
        ready = max(ready, quarter.tensor)
    elif x.unit == "tensor":
        warp.products = [begin for begin in warp.products if begin > now]
        if len(warp.products) >= QUEUE:
            ready = max(ready, sorted(warp.products)[-QUEUE])
    elif x.base == "WARPGROUP" and "DEPBAR" in x.op:
        allowed = int(re.search(r"gsb0, 0x([0-9a-f]+)", x.operands)[1], 16)
        if len(warp.groups) > allowed:
            ready = max(ready, warp.groups[-1 - allowed])
    elif x.unit == "mufu":
        ready = max(ready, quarter.mufu - quarter.gpu.mufu)  # one may wait
    elif x.base == "IMAD":
        ready = max(ready, quarter.heavy)
    elif x.takes_alu:
        ready = max(ready, quarter.integer)
    elif x.unit == "fp32":
        ready = max(ready, quarter.fp32)
    elif x.unit == "memory":
        ready = max(ready, quarter.memory - 64)  # a queue
    whole = int(ready)
    return float(whole if whole == ready else whole + 1)


def _issue(warp: Warp, x: Instruction, quarter: Quarter, now: float) -> None:
    """Take the pipes; note when operands are read and when the result is there."""
    gpu = quarter.gpu
    written = now + LATENCY.get(x.base, 4)
    read = now + 4
    if x.base == "HMMA":
        quarter.tensor = now + tensor_cycles(x, gpu)
    elif x.unit == "tensor":
        _begin_product(warp, x, quarter, now)
    elif x.unit == "mufu":
        begin = max(now, quarter.mufu)
        quarter.mufu = begin + gpu.mufu
        written, read = begin + LATENCY["MUFU"], begin + 6
    elif x.base == "IMAD":
        quarter.heavy = now + 2
    elif x.takes_alu:
        quarter.integer = now + gpu.integer
    elif x.unit == "fp32":
        quarter.fp32 = now + gpu.fp32
    elif x.base in SHARED and x.predicate != "@!PT":
        begin = max(now, quarter.memory)
        cycles = _port_cycles(x)
        quarter.memory = begin + cycles
        if x.base != "SHFL":
            quarter.port = max(quarter.port, now) + cycles
        written, read = begin + (20 if x.base == "LDGSTS" else 26), begin + (12 if x.base == "LDGSTS" else 8)
    elif x.base in LOADS:
        begin = max(now, quarter.memory)
        quarter.memory, written, read = begin + 4, begin + 40, begin + 10  # of tables, in L1
    elif x.unit == "memory" and x.base not in LATENCY:
        begin = max(now, quarter.memory)
        quarter.memory, written, read = begin + 8, begin + 30, begin + 20
    warp.scoreboards[x.sets_written] = max(warp.scoreboards[x.sets_written], written)
    warp.scoreboards[x.sets_read] = max(warp.scoreboards[x.sets_read], read)
    warp.ready = now + max(1, x.stall)


def _begin_product(warp: Warp, x: Instruction, quarter: Quarter, now: float) -> None:
    """A wgmma takes the tensor cores, and the port for operands that lie in shared memory."""
    m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", x.op).groups())
    left_is_shared = x.operands.split(",")[1].strip().startswith("gdesc")
    begin = max(now + 6, quarter.tensor)
    quarter.port = max(begin, quarter.port) + (n * k + m * k * left_is_shared) * 2 / SHARED_PORT
    quarter.tensor = max(begin + tensor_cycles(x, quarter.gpu), quarter.port)
    warp.products.append(begin)
    if "gsb0" in x.operands:
        warp.groups = [*warp.groups[-8:], quarter.tensor + FILL]


def _port_cycles(x: Instruction) -> float:
    """Of a warp that has a quarter of the port: 32 lanes of 4, 8 or 16 bytes; matrices of 128 bytes."""
    if x.base == "SHFL":
        return 4.0
    if x.base in ("LDSM", "STSM"):
        return 4.0 * (4 if re.search(r"\.4\b", x.op) else 2 if re.search(r"\.2\b", x.op) else 1)
    lane = 16 if ".128" in x.op or x.base == "LDGSTS" else 8 if ".64" in x.op else 4
    return 4.0 * 32 * lane / SHARED_PORT


class Barriers:
    """Of the blocks on a quarter."""

    def __init__(self, crew: Sequence[Warp], in_turns: bool) -> None:
        self.crew = crew
        self.in_turns = in_turns
        self.came: dict[object, int] = {}
        if in_turns:
            self.came |= {("turn", warp.block, warp.group): 1 for warp in crew if warp.group == 0}

    def meet(self, warp: Warp, x: Instruction, now: float) -> None:
        if self.in_turns:
            self._hand_on(warp, x, now)
            return
        warp.ready = max(warp.ready, now + LATENCY["BAR"])
        members = [other for other in self.crew if other.block == warp.block]
        if re.search(r", 0x80$", x.operands) or "SYNC" not in x.op:  # of one warpgroup, or an arrival
            return
        name = ("block", warp.block)
        self.came[name] = self.came.get(name, 0) + 1
        warp.barrier = name
        if self.came[name] == len(members):
            self.came[name] = 0
            for other in members:
                other.barrier, other.ready = None, max(other.ready, now + LATENCY["BAR"])

    def _hand_on(self, warp: Warp, x: Instruction, now: float) -> None:
        """SYNC waits for the own turn, ARV gives it to the other warpgroup."""
        num_groups = sum(other.block == warp.block for other in self.crew)
        mine = ("turn", warp.block, warp.group)
        others = ("turn", warp.block, (warp.group + 1) % num_groups)
        if "ARV" in x.op:
            self.came[others] = self.came.get(others, 0) + 1
            for other in self.crew:
                if other.barrier == others and self.came[others]:
                    self.came[others] -= 1
                    other.barrier, other.ready = None, max(other.ready, now + LATENCY["BAR"])
        elif self.came.get(mine, 0):
            self.came[mine] -= 1
            warp.ready = max(warp.ready, now + LATENCY["BAR"] / 2)
        else:
            warp.barrier = mine

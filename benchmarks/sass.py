"""Machine code of NVIDIA's GPUs, as cuobjdump lists it: instructions with what ptxas encoded for the scheduler, the
loops that hold the work, and how many instructions each unit gets.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Instruction:
    """One instruction. Scoreboards are six; 7 is none."""

    address: int
    predicate: str  # "@P0", "@!UP1" or ""
    op: str  # "HGMMA.64x64x16.F32.BF16"
    operands: str
    stall: int  # cycles before the next one of this warp
    sets_written: int  # scoreboard that is free when the result is there
    sets_read: int  # when the operands are read
    waits: int  # bits of scoreboards

    @cached_property
    def base(self) -> str:
        return self.op.split(".")[0]

    @cached_property
    def unit(self) -> str:
        return unit_of(self.base)

    @cached_property
    def takes_alu(self) -> bool:
        """Multiplications of integers have half of the pipe of fp32; uniform registers have a unit of their own."""
        return self.unit == "integer" and self.base not in ELSEWHERE and not self.base.startswith("U")

    @cached_property
    def target(self) -> int | None:
        """Address that a branch goes to."""
        found = re.search(r"\b0x([0-9a-f]+)", self.operands) if self.base in ("BRA", "BRX") else None
        return None if found is None else int(found[1], 16)


# -- listings

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/$")
SECOND_HALF = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")


def parsed(listing: str) -> list[Instruction]:
    """Of a listing of one function. The scheduler's part of the 128 bits is in the second half of them."""
    found, lines = [], listing.split("\n")
    for line, after in zip(lines, lines[1:] + [""], strict=True):
        if (text := LINE.match(line)) and (half := SECOND_HALF.match(after)):
            bits = int(half[1], 16) >> 41
            address, predicate, op, operands = text.groups()
            waits = bits >> 11 & 63
            found.append(
                Instruction(
                    *(int(address, 16), predicate or "", op, operands),
                    *(bits & 15, bits >> 5 & 7, bits >> 8 & 7, waits),
                )
            )
    return found


@dataclass(frozen=True)
class Code:
    """What a kernel became."""

    instructions: list[Instruction]
    registers: int  # a thread
    stack_bytes: int  # a thread


def code_of(cubin: bytes | Path, function: str = "") -> Code:
    """Of a cubin, or of one function of a library that holds several."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        if isinstance(cubin, bytes):
            file.write(cubin)
            file.flush()
        path = file.name if isinstance(cubin, bytes) else str(cubin)
        usage = cuobjdump("-res-usage", path)
        listing = cuobjdump("-sass", *(("-fun", function) if function else ()), path)
    usage = usage[usage.index(function) :] if function else usage
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Code(parsed(listing), registers, stack)


def cuobjdump(*arguments: str) -> str:
    command = [str(TOOLS / "cuobjdump"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# -- units

UNITS = ("tensor", "mufu", "fp32", "integer", "memory", "control")
"""``integer`` is the pipe of integers, logic, comparisons, selections and conversions; maxima of floats, too."""
KINDS = (
    ("tensor", r"HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA"),
    ("mufu", r"MUFU|F2F|F2I|I2F|FRND"),
    ("fp32", r"FFMA2?|FMUL2?|FADD2?|FFMA32I|FMUL32I|FADD32I"),
    ("memory", r"LD|LDG|LDS|LDL|LDC|ULDC|LDCU|LDSM|LDGSTS|ST|STG|STS|STL|STSM|SHFL|RED|REDG|ATOM|ATOMG|ATOMS|LDTM|STTM"
     r"|UTMA\w+|UBLKCP|UTCCP"),
    ("control", r"BRA|BRX|EXIT|CALL|RET|NOP|BSSY|BSYNC|BREAK|WARPSYNC|WARPGROUP|WARPGROUPSET|BAR|DEPBAR|LDGDEPBAR|SYNCS"
     r"|FENCE|MEMBAR|ERRBAR|CCTL|NANOSLEEP|YIELD|USETMAXREG|UTCBAR|UTCATOMSWS|ACQBULK|ELECT|ARRIVES|KILL|JMP|B2R|R2B"),
)  # fmt: skip
PATTERNS = [(unit, re.compile(pattern)) for unit, pattern in KINDS]


ELSEWHERE = ("IMAD", "R2UR", "S2R", "S2UR", "CS2R", "VOTEU")
"""Of ``integer``, but not on the pipe of integers."""


@lru_cache
def unit_of(base: str) -> str:
    return next((unit for unit, pattern in PATTERNS if pattern.fullmatch(base)), "integer")


def count_by_unit(instructions: list[Instruction]) -> dict[str, int]:
    counts = Counter(x.unit for x in instructions)
    return {unit: counts[unit] for unit in UNITS}


# -- loops


def loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Those with tensor-core instructions, in their order, each from the target of a backward branch to the branch.

    Of overlapping ones the shortest counts: others enclose it, or come back to it from a wait at the program's end.
    """
    index = {x.address: i for i, x in enumerate(instructions)}
    spans = []
    for end, branch in enumerate(instructions, start=1):
        if branch.target is not None and branch.target < branch.address and branch.target in index:
            spans.append((index[branch.target], end))
    found: list[tuple[int, int]] = []
    for first, end in sorted(spans, key=lambda span: span[1] - span[0]):
        is_apart = all(end <= a or b <= first for a, b in found)
        if is_apart and any(x.unit == "tensor" for x in instructions[first:end]):
            found.append((first, end))
    return [instructions[first:end] for first, end in sorted(found)]


def trace(loop: list[Instruction]) -> list[Instruction]:
    """What one turn executes: predicated branches forward are not taken, others are."""
    index, path, i = {x.address: i for i, x in enumerate(loop)}, [], 0
    while i < len(loop):
        path.append(loop[i])
        target = loop[i].target
        jumps = target is not None and not loop[i].predicate and index.get(target, 0) > i
        i = index[target] if jumps and target is not None else i + 1
    return path

"""benchmarks/machine_code.py reads machine code as it is, and its model counts as one does by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "tests" / "kernels")
    import machine_code

    return machine_code


@pytest.fixture
def sass(bench: Any) -> Any:
    return sys.modules["sass"]


@pytest.fixture
def slots(bench: Any) -> Any:
    return sys.modules["issue_slots"]


def listing(*lines: str, stall: int = 1, sets: int = 7, waits: int = 0) -> str:
    """As cuobjdump prints it; the scheduler's bits stand from bit 41 of the second half."""
    bits = (stall | sets << 5 | 7 << 8 | waits << 11) << 41
    text = '\t.headerflags\t@"EF_CUDA_SM90"\n'
    for i, line in enumerate(lines):
        text += f"        /*{16 * i:04x}*/                   {line} ;   /* 0x0000000000007918 */\n"
        text += f"                                                     /* 0x{bits:016x} */\n"
    return text


PROGRAM = listing(
    "S2R R0, SR_TID.X",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, !UPT, gsb0",  # 0x10: an inner loop
    "@P0 BRA 0x40",
    "FFMA R1, R2, R3, R1",
    "MUFU.EX2 R1, R1",
    "IMAD.WIDE R4, R5, 0x4, R6",
    "@!P1 BRA 0x10",
    "FMUL R1, R1, R1",  # 0x70: one without products
    "@P1 BRA 0x70",
    "HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0",  # 0x90
    "LDS.128 R4, [R2]",
    "UISETP.NE.AND UP0, UPT, UR4, URZ, UPT",
    "@P2 BRA 0x90",
    "@P3 BRA 0x10",  # around all
    "EXIT",
    stall=3,
    sets=2,
    waits=5,
)


def test_a_listing_is_read_with_what_the_scheduler_knows(sass: Any):
    instructions = sass.parsed(PROGRAM)
    assert len(instructions) == 15
    branch = instructions[2]
    assert (branch.address, branch.predicate, branch.op, branch.target) == (0x20, "@P0", "BRA", 0x40)
    assert {(x.stall, x.sets_written, x.sets_read, x.waits) for x in instructions} == {(3, 2, 7, 5)}


def test_loops_are_the_innermost_ones_with_products(sass: Any):
    first, second = sass.loops(sass.parsed(PROGRAM))
    assert [x.address for x in first] == [0x10, 0x20, 0x30, 0x40, 0x50, 0x60]
    assert [x.base for x in second] == ["HGMMA", "LDS", "UISETP", "BRA"]
    assert sass.count_by_unit(first) == {"tensor": 1, "mufu": 1, "fp32": 1, "integer": 1, "memory": 0, "control": 2}
    assert sass.count_by_unit(second) == {"tensor": 1, "mufu": 0, "fp32": 0, "integer": 1, "memory": 1, "control": 1}


def test_a_turn_takes_no_predicated_branch_and_every_other_one(sass: Any):
    loop = sass.parsed(listing("HMMA.16816.F32.BF16 R0, R4, R8, R0", "@P0 BRA 0x40", "BRA 0x40", "FADD R1, R1, R1",
                               "MUFU.EX2 R1, R1", "@P1 BRA 0x0"))  # fmt: skip
    assert [x.base for x in sass.trace(loop)] == ["HMMA", "BRA", "BRA", "MUFU", "BRA"]


UNITS = [("HFMA2.MMA", "integer"), ("FSETP.GT.AND", "integer"), ("F2FP.BF16.F32.PACK_AB", "integer"),
         ("F2F.BF16.F32", "mufu"), ("FFMA2", "fp32"), ("LDGSTS.E.BYPASS.128", "memory"), ("UTMALDG.4D", "memory"),
         ("UTCHMMA", "tensor"), ("SYNCS.PHASECHK", "control"), ("WARPGROUP.DEPBAR.LE", "control")]  # fmt: skip


@pytest.mark.parametrize(("op", "unit"), UNITS)
def test_units_of_instructions(sass: Any, op: str, unit: str):
    (instruction,) = sass.parsed(listing(f"{op} R0, R1, R2"))
    assert instruction.unit == unit


# -- the model, on loops that one can count by hand


def loop_of(sass: Any, products: int, mufu: int, fp32: int = 0, integer: int = 0, stall: int = 1) -> list[Any]:
    """Products with shared operands, 64 cycles each with 128 columns; nothing waits for them, or for anything."""
    return sass.parsed(
        listing(
            *["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT"] * products,
            *["MUFU.EX2 R1, R1"] * mufu,
            *["FFMA R1, R2, R3, R1"] * fp32,
            *["LOP3.LUT R1, R2, R3, R1, 0xc0, !PT"] * integer,
            "@P0 BRA 0x0",
            stall=stall,
        )
    )


@pytest.mark.parametrize(
    ("loop", "warps", "bound", "cycles"),
    [
        ((8, 16), 1, "tensor", 8 * 64),
        ((16, 127), 2, "tensor", 2 * 16 * 64),  # 127 exponentials take nearly as long
        ((1, 32), 1, "mufu", 32 * 8),
        ((1, 0, 200), 2, "issue", 2 * 202),
        ((1, 0, 8, 100), 1, "integer", 200),
    ],
)
def test_bounds(sass: Any, slots: Any, loop: tuple[int, ...], warps: int, bound: str, cycles: int):
    busy = slots.bounds(loop_of(sass, *loop), slots.GPUS[90], warps)
    assert busy[bound] == max(busy.values()) == cycles


@pytest.mark.parametrize(
    ("loop", "warps", "cycles"),
    [
        ((16, 8), 1, 16 * 64),
        ((16, 8), 2, 2 * 16 * 64),
        ((1, 32), 2, 2 * 32 * 8),
        ((1, 0, 300), 2, 2 * 302),
        ((1, 0, 8, 300), 1, 2 * 300),
    ],
)
def test_a_loop_without_waits_takes_as_long_as_its_bound(
    sass: Any, slots: Any, loop: tuple[int, ...], warps: int, cycles: int
):
    assert slots.replay(loop_of(sass, *loop), slots.GPUS[90], warps, turns=60) == pytest.approx(cycles, rel=0.05)


def test_stalls_of_one_warp_leave_slots_to_another(sass: Any, slots: Any):
    loop = loop_of(sass, 1, 0, 100, stall=4)
    assert slots.replay(loop, slots.GPUS[90], 1) == pytest.approx(4 * 102, rel=0.05)
    assert slots.replay(loop, slots.GPUS[90], 4) == pytest.approx(4 * 102, rel=0.05)
    assert slots.replay(loop, slots.GPUS[90], 8) == pytest.approx(8 * 102, rel=0.05)


def test_products_that_are_waited_for_leave_the_tensor_cores_idle(sass: Any, slots: Any):
    """Two blocks fill the gaps of one another."""
    product = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT, gsb0"
    exponentials = ["MUFU.EX2 R1, R1"] * 8
    waits = ["WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    loop = sass.parsed(listing(*[product] * 4, *waits, *exponentials, "@P0 BRA 0x0"))
    alone, side_by_side = (slots.replay(loop, slots.GPUS[90], 1, blocks) for blocks in (1, 2))
    assert alone == pytest.approx(6 + 4 * 64 + slots.FILL + 8 * 8, rel=0.05)
    assert side_by_side == pytest.approx(2 * 4 * 64, rel=0.1)
    behind = sass.parsed(listing(*[product] * 4, *exponentials, *waits, "@P0 BRA 0x0"))
    assert slots.replay(behind, slots.GPUS[90], 1) == pytest.approx(6 + 4 * 64 + slots.FILL, rel=0.05)


def test_a_block_waits_for_its_last_warp_at_a_barrier(sass: Any, slots: Any):
    text = ["HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], R24, !UPT", *["FFMA R1, R2, R3, R1"] * 50]
    loops = {
        name: sass.parsed(listing(*text, f"BAR.SYNC.DEFER_BLOCKING {operands}", "@P0 BRA 0x0"))
        for name, operands in (("block", "0x0"), ("warpgroup", "0x1, 0x80"))
    }
    block, warpgroup = (slots.replay(loops[name], slots.GPUS[90], 2) for name in ("block", "warpgroup"))
    assert block == pytest.approx(2 * 53 + slots.LATENCY["BAR"], abs=10)  # nobody works while all wait
    assert warpgroup == pytest.approx(2 * 53, abs=3)


def test_results_are_waited_for_by_scoreboards(sass: Any, slots: Any):
    head = "HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], R24, !UPT"
    lines = [listing(head), listing("LDG.E R1, [R2]", sets=0), listing("FADD R1, R1, R1", waits=1)]
    joined = listing(head, "LDG.E R1, [R2]", "FADD R1, R1, R1", "@P0 BRA 0x0")
    for i, part in enumerate(lines):  # the scheduler's bits of each
        joined = _with_bits(joined, i, part)
    assert slots.replay(sass.parsed(joined), slots.GPUS[90], 1) == pytest.approx(43, abs=2)


def _with_bits(text: str, which: int, part: str) -> str:
    lines = text.split("\n")
    lines[2 + 2 * which] = part.split("\n")[2]
    return "\n".join(lines)

"""benchmarks/machine_code.py reads machine code as it is, and its model counts as one does by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "machine_code.json"


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
    assert slots.replay(loop_of(sass, *loop), slots.GPUS[90], warps, turns=40) == pytest.approx(cycles, rel=0.05)


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
    of_block, of_warpgroup = sass.parsed(listing("BAR.SYNC.DEFER_BLOCKING 0x0", "BAR.SYNC.DEFER_BLOCKING 0x1, 0x80"))
    crew = [slots.Warp(block, group, [of_block], ready=0.0) for block in (0, 1) for group in (0, 1)]
    barriers = slots.Barriers(crew, in_turns=False)
    barriers.meet(crew[0], of_block, now=5.0)
    barriers.meet(crew[2], of_warpgroup, now=6.0)
    assert [warp.barrier is None for warp in crew] == [False, True, True, True]
    barriers.meet(crew[1], of_block, now=50.0)
    assert [warp.barrier for warp in crew] == [None] * 4
    assert [warp.ready for warp in crew] == [50.0 + slots.LATENCY["BAR"]] * 2 + [6.0 + slots.LATENCY["BAR"], 0.0]


def test_warpgroups_that_take_turns_hand_them_on(sass: Any, slots: Any):
    waits, hands_on = sass.parsed(listing("BAR.SYNC.DEFER_BLOCKING R9, 0x100", "BAR.ARV R10, 0x100"))
    first, second = crew = [slots.Warp(0, group, [waits], ready=0.0) for group in (0, 1)]
    barriers = slots.Barriers(crew, in_turns=True)
    barriers.meet(second, waits, now=1.0)
    barriers.meet(first, waits, now=2.0)
    assert (first.barrier, second.barrier is None) == (None, False)  # the first turn is the first's
    barriers.meet(first, hands_on, now=30.0)
    assert (second.barrier, second.ready) == (None, 30.0 + slots.LATENCY["BAR"])
    barriers.meet(first, waits, now=31.0)
    assert first.barrier is not None


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


# -- rows


def test_a_multiprocessor_holds_what_registers_and_shared_memory_allow(bench: Any, sass: Any):
    def blocks(registers: int, threads: int, shared_kib: int | None) -> int:
        shared = shared_kib and shared_kib << 10
        kernel = bench.Kernel(sass.Code([], registers, 0), shared, threads, warps=1)
        return bench.blocks_at_once(kernel, 228 << 10)

    assert blocks(128, 128, 48) == 4  # 512 threads of 128 registers; 49 KiB would go four times, too
    assert blocks(121, 128, 64) == 3
    assert blocks(81, 128, 16) == 5  # 88 a thread are given
    assert blocks(168, 384, None) == 1
    assert blocks(32, 256, 8) == 8  # 2,048 threads


def test_figures_are_those_of_a_tile(bench: Any, sass: Any, slots: Any):
    """Two warps on a quarter, 128 queries and 64 keys a turn: q k and p v of 64 dims are 4 products of 64 columns each."""
    turn = ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, !UPT"] * 8 + ["MUFU.EX2 R1, R1"] * 32
    outer = ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, !UPT", "@P1 BRA 0x290"]
    code = sass.Code(sass.parsed(listing(*turn, "@P0 BRA 0x0", *outer)), 100, 16)
    assert len(sass.loops(code.instructions)) == 2
    row = bench.figures(bench.Row(90, "forward", 64, "causal", "fa3"), bench.Kernel(code, 64 << 10, 256, 2))
    (loop,) = row["loops"]  # what has products and no softmax is around blocks
    assert loop["instructions"] == 41
    assert loop["units"]["mufu"] == 32
    assert loop["cycles"]["tensor"] == 2 * (2 * 8 * 32)
    assert loop["cycles"]["mufu"] == 2 * (2 * 32 * 8) == loop["cycles"]["tensor"]
    assert loop["cycles"]["issue"] == 2 * (2 * 41)
    assert (row["registers"], row["stack_bytes"], row["shared_kib"], row["blocks"]) == (100, 16, 64, 2)
    with pytest.raises(AssertionError, match=r"8192.0 pairs a turn; blocks have 16384"):
        kernel = bench.Kernel(code, 64 << 10, 256, 2, pairs=128 * 128)
        bench.figures(bench.Row(90, "forward", 64, "causal", "portable"), kernel)


def test_products_of_another_pass_in_the_same_kernel_are_passed_over(bench: Any, sass: Any):
    product, exponential = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, !UPT", "MUFU.EX2 R1, R1"
    dq = [*[product] * 12, *[exponential] * 32, "@P0 BRA 0x0"]
    dkdv = [*[product] * 16, *[exponential] * 32, f"@P0 BRA 0x{16 * len(dq):x}"]
    code = sass.Code(sass.parsed(listing(*dq, *dkdv)), 255, 0)
    kernel = bench.Kernel(code, 64 << 10, 256, 2, pairs=128 * 64, is_mixed=True)
    for which, length in (("dq", len(dq)), ("dkdv", len(dkdv))):
        row = bench.figures(bench.Row(90, which, 64, "causal", "flex"), kernel)
        assert [loop["instructions"] for loop in row["loops"]] == [length]


NAME = "_ZN7cutlass13device_kernelIN5flash20enable_sm90_or_laterINS1_16FlashAttnFwdSm90INS1_25CollectiveMainloopFwdSm90ILi2EN4cute5tuple{}EELi{}ENS_10bfloat16_tEfNS_4arch4Sm90E{}ENS1_21CollectiveEpilogueFwd"
ALONE = "IJNS5_1CILi1EEES8_S8_EEENS6_"


def test_the_plain_kernel_is_found_among_mangled_names(bench: Any, monkeypatch: pytest.MonkeyPatch):
    binary = bench.fa3_binary
    causal, varlen = ("".join(f"Lb{x}E" for x in flags) for flags in ("100000011100", "100100011100"))
    plain = NAME.format(ALONE + "IJNS7_ILi128EEESA_SA_E", 128, causal)
    others = [
        NAME.format(ALONE + "IJNS7_ILi128EEESA_SA_E", 128, varlen),
        NAME.format(ALONE + "IJNS7_ILi128EEESA_NS7_ILi192EEEE", 128, causal),
        NAME.format("IJNS5_1CILi2EEENS7_ILi1EEES9_EEENS6_IJNS7_ILi128EEESB_SB_E", 128, causal),
        NAME.format(ALONE + "IJNS7_ILi192EEENS7_ILi128EEENS7_ILi64EEEE", 64, causal),
    ]
    asked = []
    monkeypatch.setattr(binary, "functions", lambda library: [*others, plain])
    monkeypatch.setattr(binary.sass, "code_of", lambda library, function: asked.append(function))
    binary.code(Path("a.so"), 128, "causal")
    binary.code(Path("a.so"), 64, "causal")
    assert asked == [plain, others[-1]]
    assert binary.code(Path("a.so"), 128, "documents+window") is None
    with pytest.raises(AssertionError, match="has 0 kernels of D 128, full"):
        binary.code(Path("a.so"), 128, "full")


def test_changes_are_told(bench: Any, sass: Any):
    loop = loop_of(sass, 16, 64)
    kernel = bench.Kernel(sass.Code(loop, 100, 0), 64 << 10, 256, 2)
    row = bench.figures(bench.Row(90, "forward", 128, "causal", "hopper"), kernel)
    assert bench.changes([row], [row]) == "nothing has changed"
    assert bench.changes([row], [{**row, "registers": 90}]) == "sm_90 forward D128 causal hopper: registers 100 -> 90"
    assert bench.table([row]).splitlines()[2].startswith("| 90 | forward | 128 | causal | hopper | 100 | 0 | 64 | 2 |")


def test_a_row_is_compiled_read_and_looked_up(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    row = bench.Row(90, "forward", 64, "causal", "portable")
    found = bench.looked_up(row, bench.portable, tmp_path, "")
    masked, full = found["loops"]
    assert masked["instructions"] > full["instructions"] > 200
    assert full["units"]["tensor"] > 0
    assert full["units"]["mufu"] >= 32  # an exponential for each pair of a thread
    assert full["cycles"]["tensor"] == 1024  # 2 * 64 * 128 * 128 products, 4 * 512 a cycle
    assert 0.1 < masked["model_fraction"] < full["model_fraction"] < 1
    assert bench.looked_up(row, None, tmp_path, "") == found
    assert bench.looked_up(bench.Row(80, "forward", 64, "causal", "hopper"), bench.hopper, tmp_path, "") is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_flex_attention_is_compiled_as_torch_does(bench: Any):
    for which in ("forward", "dq", "dkdv"):
        row = bench.Row(90, which, 128, "causal", "flex")
        loops = bench.figures(row, bench.flex(row))["loops"]
        assert len(loops) == 2
        assert loops[0]["instructions"] > loops[1]["instructions"]
    bench._process_of(90).shutdown()


# -- what is committed


def test_the_model_reproduces_what_was_measured():
    record = json.loads(RESULTS.read_text())
    points = {(x["direction"], x["mods"]): x for x in record["calibration"]}
    assert len(points) == 4
    for point in points.values():
        assert point["model_tflops"] == pytest.approx(point["measured_tflops"], rel=0.1)
        assert 0.75 * 989 < point["tflops_at_bound"] < 989  # of an H200's data sheet


def test_calibration_counts_half_of_the_diagonal(bench: Any):
    module = sys.modules["calibration"]
    loops = [{"model_cycles": 3000}, {"model_cycles": 2000}]
    rows = [
        {"capability": 90, "head_dim": 128, "who": "flex", "which": "forward", "mods": mods, "loops": loops[-n:]}
        for mods, n in (("full", 1), ("causal", 2))
    ]
    needed = 128 * 128 / 2  # tiles; 128 masked ones are computed whole
    cycles = (128 * 3000 + 128 * 127 / 2 * 2000) / needed
    full, causal = module.calibration(rows, at_bound_of_tile=500.0)
    assert (full["model_fraction"], causal["model_fraction"]) == (0.5, round(1000 / cycles, 3))
    at_bound = ((476 / 0.5) * (403 / (1000 / cycles))) ** 0.5
    assert full["tflops_at_bound"] == causal["tflops_at_bound"] == round(at_bound)
    assert (full["model_tflops"], causal["model_tflops"]) == (round(at_bound / 2), round(at_bound * 1000 / cycles))
    (alone,) = module.calibration(rows[:1], 500.0)
    assert alone["model_tflops"] == alone["measured_tflops"] == 476


def test_the_table_of_the_documents_is_what_was_found(bench: Any):
    import machine_code_table

    text = (ROOT / "docs" / "kernels.md").read_text()
    assert machine_code_table.short_table(json.loads(RESULTS.read_text())["rows"]) in text

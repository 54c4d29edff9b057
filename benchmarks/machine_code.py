"""Machine code of the fused kernels beside their peers, no GPU needed: registers, stack, shared memory, instructions of
each loop by unit, which unit bounds it, and the share of the tensor cores' peak by a model (`issue_slots`).

    python benchmarks/machine_code.py                          # all, half an hour; writes results/machine_code.json
    python benchmarks/machine_code.py --only "sm_90 forward D128"      # rows whose name has all these words
    python benchmarks/machine_code.py --quick                  # sm_90, causal, D 128

``portable`` are the Triton kernels, ``hopper`` those of sm_90 in Gluon, ``flex`` is torch's FlexAttention template as
Inductor renders and configures it, ``fa3`` FlashAttention-3's published binary (``--fa3``: a wheel of fa3-fwd, or its
library). bf16, two query heads to a key head, a step that continues a state. Loops stand in their order: those with a
mask first, the full one last; those of the two consumers of ``hopper`` are the same, and stand once. Cycles are those
of a quarter of a multiprocessor for 128 x 128 pairs of a head, so that blocks of different sizes compare; no GPU was
asked for them. A second run takes what has not changed from ``--cache``.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

import cpflex
from cpflex.kernels import Call, backward, empty, forward, tuning
from cpflex.mods.trace import trace_score_mod
from cpflex.ring.handles import resolve

sys.path.append(str(Path(__file__).parents[1] / "tests" / "kernels"))

from ahead_of_time import Variant, launches_compile

import sass
from issue_slots import GPUS, bounds, replay

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "machine_code.json"
SEQ_LEN = 2048
PAIRS = 128 * 128
"""Of a query and a key: the tile that figures are given for."""
PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4, "onepass": 5}
"""Of a head dim each, for every pair."""
CAPABILITIES = (80, 90, 100)
HEAD_DIMS = (64, 128)
WHO = ("portable", "hopper", "flex", "fa3")


# -- rows


class Mods(NamedTuple):
    mask: Callable[[], Any] | None
    score: Callable[..., Any] | None = None


SLOPES = torch.rand(4)
DOCUMENTS = torch.arange(SEQ_LEN) // 500
MODS = {
    "full": Mods(cpflex.full),
    "causal": Mods(cpflex.causal),
    "causal+alibi": Mods(cpflex.causal, lambda score, b, h, q, k: score - SLOPES[h] * (q - k)),
    "causal+softcap": Mods(cpflex.causal, lambda score, b, h, q, k: 30.0 * torch.tanh(score / 30.0)),
    "documents+window": Mods(lambda: cpflex.document(DOCUMENTS) & cpflex.sliding_window(256) & cpflex.causal()),
}


class Row(NamedTuple):
    """One kernel."""

    capability: int
    which: str
    head_dim: int
    mods: str
    who: str

    @property
    def name(self) -> str:
        return f"sm_{self.capability} {self.which} D{self.head_dim} {self.mods} {self.who}"


ROWS = [Row(*row) for row in itertools.product(CAPABILITIES, PRODUCTS, HEAD_DIMS, MODS, WHO)]


@dataclass(frozen=True)
class Kernel:
    """What a compiler made, and how a launch uses it."""

    code: sass.Code
    shared_bytes: int | None  # None: not known from the binary
    threads: int  # a block
    warps: int  # a quarter, of those that compute
    pairs: int | None = None
    """Of a query and a key in a turn of a loop; None: as many as its products say."""
    repeats: int = 1
    """Each loop stands so often in the code: once for each consumer."""
    in_turns: bool = False
    """Two warpgroups take turns, by barriers."""


# -- of cpflex


def portable(row: Row) -> Kernel | None:
    if row.which == "onepass":
        return None
    variants = _compiled(row, forward.attend_and_finish, backward.attend_backward, "triton")
    name = {"forward": "attend_kernel", "dq": "dq_kernel", "dkdv": "dkdv_kernel"}[row.which]
    (variant,) = (x for x in variants if x.name == name)
    config = tuning.rows_for(row.capability, torch.bfloat16)[row.which, row.head_dim]
    return _kernel(variant, variant.kernel.metadata.num_warps // 4, config.block_q * config.block_kv)


CONSUMERS = 2


def hopper(row: Row) -> Kernel | None:
    """None: no kernel of this pass."""
    if row.capability != 90 or (row.which != "forward" and find_spec("cpflex.kernels.hopper_backward") is None):
        return None
    from cpflex.kernels import hopper_forward

    if row.which == "forward":
        variants = _compiled(row, hopper_forward.attend_and_finish, None, "gluon")
        (variant,) = variants
        return _kernel(variant, CONSUMERS, None, CONSUMERS)
    return None


def _compiled(row: Row, attend: Callable, attend_backward: Callable | None, backend: str) -> list[Variant]:
    """The kernels of a step that continues a state, and of its backward."""
    mods, dim = MODS[row.mods], row.head_dim
    plan = cpflex.make_plan(mods.mask(), SEQ_LEN)
    mask, (step,), _ = resolve(plan.handle).on(torch.device("cpu"))
    score = None if mods.score is None else trace_score_mod(mods.score)
    call = Call(mask, 1 / math.sqrt(dim), score and score.graph, score.captured if score else (), backend=backend)
    q, k, v, grad_out = (torch.zeros(1, heads, SEQ_LEN, dim, dtype=torch.bfloat16) for heads in (4, 2, 2, 4))
    lse = torch.zeros(q.shape[:3])
    only = {"forward": "attend", "dq": "dq", "dkdv": "dkdv"}[row.which]
    with launches_compile(row.capability, only) as variants:
        if row.which == "forward":
            attend(q, k, v, step.tile_mask, call, empty(q, dim))
        else:
            attend_backward(q, k, v, grad_out, lse, lse, step.tile_mask, call, torch.zeros(q.shape), [])
    return variants


def _kernel(variant: Variant, warps: int, pairs: int | None, repeats: int = 1) -> Kernel:
    made = variant.kernel
    threads = 32 * made.metadata.num_warps
    return Kernel(sass.code_of(made.asm["cubin"]), made.metadata.shared, threads, warps, pairs, repeats)


# -- figures


def figures(row: Row, kernel: Kernel) -> dict[str, Any]:
    gpu, code = GPUS[row.capability], kernel.code
    blocks = blocks_at_once(kernel, gpu.shared_bytes)
    loops = [loop for loop in sass.loops(code.instructions) if any(x.base == "MUFU" for x in loop)]
    loops = loops[: max(1, len(loops) // kernel.repeats)]
    per_pair = PRODUCTS[row.which] * row.head_dim
    found = []
    for loop in loops:
        tensor = None
        if row.capability == 100:  # shapes stand in descriptors: by what a block is
            tensor = kernel.pairs * per_pair / 4 / gpu.products / kernel.warps
        busy = bounds(loop, gpu, kernel.warps, tensor)
        pairs = busy["tensor"] * 4 * gpu.products / per_pair
        assert kernel.pairs in (None, round(pairs)), f"{row.name}: {pairs} pairs a turn; blocks have {kernel.pairs}"
        scale = PAIRS / pairs
        cycles = None
        if tensor is None:
            cycles = replay(loop, gpu, kernel.warps, blocks, in_turns=kernel.in_turns) / blocks
        found.append(
            {
                "instructions": len(loop),
                "units": sass.count_by_unit(loop),
                "cycles": {unit: round(scale * n) for unit, n in busy.items()},
                "bound": max(busy, key=busy.__getitem__),
                "model_cycles": cycles and round(scale * cycles),
                "model_fraction": cycles and round(busy["tensor"] / cycles, 3),
            }
        )
    return {
        **row._asdict(),
        "registers": code.registers,
        "stack_bytes": code.stack_bytes,
        "shared_kib": kernel.shared_bytes and round(kernel.shared_bytes / 1024),
        "blocks": blocks,
        "loops": found,
    }


def blocks_at_once(kernel: Kernel, shared_bytes: int) -> int:
    """That a multiprocessor holds: of 65,536 registers, given to warps in units of 8 a thread, and shared memory."""
    by_registers = 65536 // (-(-kernel.code.registers // 8) * 8 * kernel.threads)
    by_shared = shared_bytes // (kernel.shared_bytes + 1024) if kernel.shared_bytes else by_registers
    return max(1, min(by_registers, by_shared, 2048 // kernel.threads))


# -- what has been seen before


def fingerprint() -> str:
    """Of all that figures depend on but a row."""
    sources = [*HERE.parent.glob("cpflex/**/*.py"), *HERE.glob("*.py"), HERE.parent / "tests/kernels/ahead_of_time.py"]
    of_benchmark = {"machine_code.py", "sass.py", "issue_slots.py", "flex_template.py"}
    text = hashlib.sha256(f"{torch.__version__} {triton.__version__}".encode())
    for path in sorted(sources):
        if path.parent != HERE or path.name in of_benchmark:
            text.update(path.read_bytes())
    return text.hexdigest()[:16]


def looked_up(row: Row, make: Callable[[Row], Kernel | None], cache: Path, extra: str) -> dict[str, Any] | None:
    """Figures of a row, or None where there is no such kernel."""
    path = cache / fingerprint() / f"{row.name} {extra}.json".replace(" ", "_").replace("/", "-")
    if path.exists():
        return json.loads(path.read_text())
    kernel = make(row)
    found = None if kernel is None else figures(row, kernel)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


# -- what is shown

HEADER = ("sm", "kernel", "D", "mods", "who", "registers", "stack, bytes", "shared, KiB", "blocks", "instructions",
          "tensor / MUFU / fp32 / integer / memory", "bound, cycles", "model: cycles", "model: of peak")  # fmt: skip


def line(row: dict[str, Any]) -> list[str]:
    loops, units = row["loops"], ("tensor", "mufu", "fp32", "integer", "memory")
    full = loops[-1]
    return [
        *map(str, (row["capability"], row["which"], row["head_dim"], row["mods"], row["who"], row["registers"])),
        *(str(row["stack_bytes"]), "?" if row["shared_kib"] is None else str(row["shared_kib"]), str(row["blocks"])),
        " / ".join(str(loop["instructions"]) for loop in loops),
        " / ".join(str(full["units"][unit]) for unit in units),
        " / ".join(f"{loop['bound']} {loop['cycles'][loop['bound']]}" for loop in loops),
        " / ".join("-" if loop["model_cycles"] is None else str(loop["model_cycles"]) for loop in loops),
        " / ".join("-" if loop["model_fraction"] is None else f"{loop['model_fraction']:.2f}" for loop in loops),
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown; counts by unit are those of the full loop."""
    lines = [HEADER, ["---"] * len(HEADER), *map(line, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def peers(fa3: Path | None) -> dict[str, Callable[[Row], Kernel | None]]:
    return {"portable": portable, "hopper": hopper}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name has all these words")
    parser.add_argument("--quick", action="store_true", help="sm_90, causal, D 128")
    parser.add_argument("--fa3", type=Path, help="a wheel of fa3-fwd, or the library in it")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "cpflex" / "machine_code")
    parser.add_argument("--json", type=Path, default=None, help="(results/machine_code.json, of all rows)")
    options = parser.parse_args()
    words = (options.only + (" sm_90 D128 causal" if options.quick else "")).split()
    chosen = [row for row in ROWS if set(words) <= set(row.name.split())]
    makers, rows, start = peers(options.fa3), [], time.perf_counter()
    for i, row in enumerate(chosen):
        found = looked_up(row, makers[row.who], options.cache, str(options.fa3)) if row.who in makers else None
        if found is not None:
            rows.append(found)
            shown = " / ".join(str(loop["instructions"]) for loop in found["loops"])
            print(f"{time.perf_counter() - start:6.0f} s {i + 1:4}/{len(chosen)} {row.name}: {shown}", flush=True)
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()

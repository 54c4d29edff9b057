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
asked for them. For loops of sm_100 there is no model, and of those with softcap the full one is left out: a wait cuts
it in pieces. A second run takes what has not changed from ``--cache``.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
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

import fa3_binary
import sass
from calibration import calibration
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
    """Warpgroups take turns, by barriers."""
    is_mixed: bool = False
    """Other passes are in the same kernel: their loops have other products."""


# -- of cpflex


def portable(row: Row) -> Kernel | None:
    if row.which == "onepass":
        return None
    variant = _compiled(row, forward.attend_and_finish, backward.attend_backward, "triton")
    config = tuning.rows_for(row.capability, torch.bfloat16)[row.which, row.head_dim]
    return _kernel(variant, variant.kernel.metadata.num_warps // 4, config.block_q * config.block_kv)


CONSUMERS = 2


def hopper(row: Row) -> Kernel | None:
    """None: there is none of this pass, and what would be launched is a portable one."""
    names = [f"cpflex.kernels.hopper_{part}" for part in ("forward", "backward")]
    if row.capability != 90 or find_spec(names[row.which != "forward"]) is None:
        return None
    attend = getattr(importlib.import_module(names[0]), "attend_and_finish", None)
    attend_backward = None if row.which == "forward" else importlib.import_module(names[1]).attend_backward
    variant = _compiled(row, attend, attend_backward, "gluon")
    if variant is None or variant.kernel.metadata.num_warps != 4 * (CONSUMERS + 1):
        return None
    return _kernel(variant, CONSUMERS, None, CONSUMERS)


def _compiled(row: Row, attend: Callable, attend_backward: Callable, backend: str) -> Variant | None:
    """The kernel of a step that continues a state, or of its backward."""
    mods, dim = MODS[row.mods], row.head_dim
    plan = cpflex.make_plan(mods.mask(), SEQ_LEN)
    mask, (step,), _ = resolve(plan.handle).on(torch.device("cpu"))
    score = None if mods.score is None else trace_score_mod(mods.score)
    call = Call(mask, 1 / math.sqrt(dim), score and score.graph, score.captured if score else (), backend=backend)
    if row.which == "onepass":
        if "deterministic" not in {x.name for x in fields(Call)}:
            return None
        call = replace(call, deterministic=False)
    q, k, v, grad_out = (torch.zeros(1, heads, SEQ_LEN, dim, dtype=torch.bfloat16) for heads in (4, 2, 2, 4))
    lse = torch.zeros(q.shape[:3])
    with launches_compile(row.capability, {"forward": "attend", "onepass": ""}.get(row.which, row.which)) as variants:
        if row.which == "forward":
            attend(q, k, v, step.tile_mask, call, empty(q, dim))
        else:
            attend_backward(q, k, v, grad_out, lse, lse, step.tile_mask, call, torch.zeros(q.shape), [])
    if row.which == "onepass":
        variants = [x for x in variants if x.name not in ("dq_kernel", "dkdv_kernel")]
    return variants[0] if variants else None


def _kernel(variant: Variant, warps: int, pairs: int | None, repeats: int = 1) -> Kernel:
    made = variant.kernel
    threads = 32 * made.metadata.num_warps
    return Kernel(sass.code_of(made.asm["cubin"]), made.metadata.shared, threads, warps, pairs, repeats)


# -- of others


def flex(row: Row) -> Kernel | None:
    """None: not compiled. Of sm_100 only forward: elsewhere the loops of a pass cannot be told from others."""
    if row.which == "onepass" or (row.capability == 100 and row.which != "forward"):
        return None
    made = _of_torch(row.capability, row.head_dim, row.mods)["forward" if row.which == "forward" else "backward"]
    suffix = {"forward": "", "dq": "2", "dkdv": "1"}[row.which]
    pairs = made.options[f"BLOCK_M{suffix}"] * made.options[f"BLOCK_N{suffix}"]
    code, warps = sass.code_of(made.cubin), made.num_warps
    return Kernel(code, made.shared_bytes, 32 * warps, warps // 4, pairs, is_mixed=row.which != "forward")


@functools.cache
def _of_torch(capability: int, head_dim: int, mods: str) -> dict[str, Any]:
    import flex_template

    return _process_of(capability).submit(flex_template.kernels, capability, head_dim, mods, SEQ_LEN).result()


@functools.cache
def _process_of(capability: int) -> ProcessPoolExecutor:
    """Inductor remembers the GPU that it has seen."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def fa3(row: Row, library: Path) -> Kernel | None:
    if (row.capability, row.which) != (90, "forward"):
        return None
    code, warps = fa3_binary.code(library, row.head_dim, row.mods), fa3_binary.CONSUMERS[row.head_dim]
    return None if code is None else Kernel(code, None, 128 * (warps + 1), warps, in_turns=True)


# -- figures


def figures(row: Row, kernel: Kernel) -> dict[str, Any]:
    gpu, code = GPUS[row.capability], kernel.code
    blocks = blocks_at_once(kernel, gpu.shared_bytes)
    per_pair = PRODUCTS[row.which] * row.head_dim
    found = []
    for loop in sass.loops(code.instructions):
        tensor = None
        if row.capability == 100:  # shapes stand in descriptors: by what a block is
            tensor = kernel.pairs * per_pair / 4 / gpu.products / kernel.warps
        busy = bounds(loop, gpu, kernel.warps, tensor)
        pairs = busy["tensor"] * 4 * gpu.products / per_pair
        if kernel.pairs is None or kernel.is_mixed or row.capability == 100:
            is_of_pass = kernel.pairs in (None, round(pairs)) and has_softmax(loop, pairs / kernel.warps)
            if not is_of_pass:
                continue
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
        "loops": found[: len(found) // kernel.repeats],
    }


def has_softmax(loop: list[sass.Instruction], pairs: float) -> bool:
    """An exponential for each pair of the warps of a block that share no quarter."""
    return sum(x.base == "MUFU" for x in loop) >= pairs / 128


def blocks_at_once(kernel: Kernel, shared_bytes: int) -> int:
    """That a multiprocessor holds: of 65,536 registers, given to warps in units of 8 a thread, and shared memory."""
    by_registers = 65536 // (-(-kernel.code.registers // 8) * 8 * kernel.threads)
    by_shared = shared_bytes // (kernel.shared_bytes + 1024) if kernel.shared_bytes else by_registers
    return max(1, min(by_registers, by_shared, 2048 // kernel.threads))


# -- what has been seen before


@functools.cache
def fingerprint(who: str) -> str:
    """Of all that figures depend on but a row."""
    package = Path(cpflex.__file__).parent
    own = [*package.glob("kernels/*.py"), *package.glob("mods/*.py"), package / "tile_mask.py"]
    sources = {"flex": [HERE / "flex_template.py"], "fa3": [HERE / "fa3_binary.py"]}.get(who, sorted(own))
    text = hashlib.sha256(f"{torch.__version__} {triton.__version__}".encode())
    for path in [*sources, *(HERE / f"{name}.py" for name in ("machine_code", "sass", "issue_slots"))]:
        text.update(path.read_bytes())
    return text.hexdigest()[:16]


def looked_up(row: Row, make: Callable[[Row], Kernel | None], cache: Path, extra: str) -> dict[str, Any] | None:
    """Figures of a row, or None where there is no such kernel."""
    path = cache / fingerprint(row.who) / f"{row.name} {extra}.json".replace(" ", "_").replace("/", "-")
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


def changes(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> str:
    """A line for each row that is not as it was: what the table shows, before and after."""
    known = {Row(*(row[name] for name in Row._fields)): line(row) for row in before}
    lines = []
    for row in after:
        key = Row(*(row[name] for name in Row._fields))
        pairs = zip(HEADER, known.get(key, line(row)), line(row), strict=True)
        changed = [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]
        if changed:
            lines.append(f"{key.name}: {'; '.join(changed)}")
    return "\n".join(lines) or "nothing has changed"


def peers(library: Path | None) -> dict[str, Callable[[Row], Kernel | None]]:
    own = {"portable": portable, "hopper": hopper, "flex": flex}
    return own if library is None else {**own, "fa3": functools.partial(fa3, library=library)}


def found_rows(chosen: Sequence[Row], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    library = fa3_binary.library_of(options.fa3, options.cache)
    if library is None:
        print("without FlashAttention-3: pip download fa3-fwd --no-deps, and pass the wheel as --fa3")
    makers, start = peers(library), time.perf_counter()
    for i, row in enumerate(chosen):
        extra = f"{library.stat().st_size}" if row.who == "fa3" and library else ""
        found = looked_up(row, makers[row.who], options.cache, extra) if row.who in makers else None
        if found is not None:
            shown = " / ".join(str(loop["instructions"]) for loop in found["loops"])
            print(f"{time.perf_counter() - start:6.0f} s {i + 1:4}/{len(chosen)} {row.name}: {shown}", flush=True)
            yield found


def record(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    asked = [f'--only "{words}"' for words in options.only] + [f"--fa3 {options.fa3.name}"] * bool(options.fa3)
    commit = ["git", "-C", str(Path(cpflex.__file__).parent), "describe", "--always", "--dirty"]
    return {
        "command": " ".join(["python benchmarks/machine_code.py", *asked]),
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cpflex": cpflex.__version__},
        "model": "cycles and fractions of the peak are those of benchmarks/issue_slots.py, not measured",
        "calibration": calibration(rows, at_bound_of_tile=PAIRS * 128 / 4 / GPUS[90].products),
        "rows": rows,
    }


def as_text(found: dict[str, Any]) -> str:
    """JSON, with a line for each row."""
    rows = ",\n  ".join(json.dumps(row) for row in found["rows"])
    return json.dumps({**found, "rows": []}, indent=1).replace('"rows": []', f'"rows": [\n  {rows}\n ]') + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="rows whose name has all these words; or again")
    parser.add_argument("--quick", action="store_true", help="sm_90, causal, D 128")
    parser.add_argument("--fa3", type=Path, help="a wheel of fa3-fwd, or the library in it (what is installed)")
    parser.add_argument("--before", type=Path, help="results of another commit: what has changed since")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "cpflex" / "machine_code")
    parser.add_argument("--json", type=Path, help="(results/machine_code.json, where all rows are asked for)")
    options = parser.parse_args()
    wanted = [set(words.split()) for words in options.only + ["sm_90 D128 causal"] * options.quick] or [set()]
    chosen = [row for row in ROWS if any(words <= set(row.name.split()) for words in wanted)]
    rows = list(found_rows(chosen, options))
    if options.before:
        print(f"\n{changes(json.loads(options.before.read_text())['rows'], rows)}")
    for capability in CAPABILITIES:
        _process_of(capability).shutdown()
    print(f"\n{table(rows)}")
    if path := options.json or (None if any(wanted) else RESULTS):
        path.write_text(as_text(record(rows, options)))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

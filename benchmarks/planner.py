"""What planning costs: time, memory and pickle size of one rank's plan, beside torch's block masks and load balancers.

    python benchmarks/planner.py                 # all sizes, 16k ... 16M tokens; writes benchmarks/results/planner.json
    python benchmarks/planner.py --max-len 64k   # the small ones
    python benchmarks/planner.py --only rectangles formats   # some parts; rows of the others stay as they are written

Parts: how classification of a whole mask scales, plans, plans of rectangles (keys of another sequence, with a layout of
their own or on every rank), and masks read from other libraries' formats (benchmarks/mask_formats.py). At 1M tokens the
classification of one rank's queries, of one kind, has a budget of 50 ms: a row says if it is over.
Every row runs in a process of its own on one thread, after a warm-up on a short sequence, and reports the median of
three plans of rank 0. Peers run where they can: eager block masks to 16k, compiled ones to 64k tokens; PTRR on the
compiled one.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cpflex
import mask_formats
from cpflex.mods.trace import trace_mask_mod
from cpflex.planning.needs import classifier, tiles_of
from cpflex.planning.squares import classify_squares
from cpflex.tile_mask import Tiles
from documents import draw_documents
from own_process import in_own_process

SCALING = ("causal", "documents", "doc+window", "block diffusion")
SIZES = [(1 << 14, 8), (1 << 16, 8), (1 << 18, 32), (1 << 20, 64), (1 << 22, 256), (1 << 24, 1024)]
WINDOW = 1024
PARTS = ("scaling", "plans", "rectangles", "formats")
CLASSIFY_BUDGET_MS = 50


def block_diffusion(seq_len: int, block: int) -> Callable:
    """Noisy half, then clean half (arXiv:2503.09573, figure 3): a noisy block sees itself and the clean blocks before
    it.
    """
    half = seq_len // 2

    def mask_mod(b, h, q_idx, kv_idx):
        q_noisy, kv_noisy = q_idx < half, kv_idx < half
        q_block, kv_block = (q_idx % half) // block, (kv_idx % half) // block
        diagonal = q_noisy & kv_noisy & (q_block == kv_block)
        offset = q_noisy & ~kv_noisy & (q_block > kv_block)
        clean = ~q_noisy & ~kv_noisy & (q_block >= kv_block)
        return diagonal | offset | clean

    return mask_mod


def opaque(b, h, q_idx, kv_idx):
    """A user's own lambda: attention sinks, a ragged band and a dilated tail."""
    distance = q_idx - kv_idx
    return (distance >= 0) & (
        (kv_idx < 64) | (distance < 2048 + q_idx % 512) | ((distance % 4096 == 0) & (distance < 65536))
    )


def masks(seq_len: int) -> dict[str, Any]:
    document = cpflex.document(cu_seqlens=draw_documents(seq_len, seed=0))
    doc_causal = cpflex.causal() & document
    return {
        "causal": cpflex.causal(),
        "window 4096": cpflex.causal() & cpflex.sliding_window(4096),
        "documents": doc_causal,
        "doc+window": doc_causal & cpflex.sliding_window(WINDOW),
        "documents, doc+window": {"full": doc_causal, "sliding": doc_causal & cpflex.sliding_window(WINDOW)},
        "block diffusion": block_diffusion(seq_len, 32),
        "opaque lambda": opaque,
    }


def measure_plan(name: str, seq_len: int, world_size: int) -> dict[str, Any]:
    """One row, in a fresh process."""
    torch.set_num_threads(1)
    mask = masks(seq_len)[name]
    cpflex.make_plan(masks(1 << 12)[name], 1 << 12, rank=0, world_size=2)
    before = _reset_peak_bytes()
    cpflex.make_plan(mask, seq_len, rank=0, world_size=world_size)
    peak = _peak_bytes() - before
    plan_ms = _median_ms(lambda: cpflex.make_plan(mask, seq_len, rank=0, world_size=world_size))
    plan = cpflex.make_plan(mask, seq_len, rank=0, world_size=world_size)
    every_stats = plan.stats if len(plan.kinds) > 1 else {"": plan.stats}
    return {
        "mask": name,
        "seq_len": seq_len,
        "ranks": world_size,
        "plan_ms": plan_ms,
        "peak_mb": peak / 1e6,
        "pickle_mb": len(pickle.dumps(plan)) / 1e6,
        "layout": plan.layout.name,
        "schedule": [stats["schedule"] for stats in every_stats.values()],
        "imbalance": [stats["imbalance"] for stats in every_stats.values()],
        "worst_receive": [max(stats["needed_tokens"]) / stats["all_gather_tokens"] for stats in every_stats.values()],
    }


def measure_scaling(name: str, seq_len: int) -> dict[str, Any]:
    """The whole mask in tiles of 128, one rank holding all tokens: squares looked at, beside all tiles there are."""
    torch.set_num_threads(1)
    mask, classified = masks(seq_len)[name], 0
    classify, tiles = classifier(trace_mask_mod(mask), 1, 1), Tiles(seq_len, 1)

    def counted(q_lo: np.ndarray, *others: np.ndarray) -> np.ndarray:
        nonlocal classified
        classified += len(q_lo)
        return classify(q_lo, *others)

    classify_squares(counted, tiles)
    classified = 0
    start = time.process_time()
    squares = classify_squares(counted, tiles)
    return {
        "mask": name,
        "seq_len": seq_len,
        "classify_ms": 1e3 * (time.process_time() - start),
        "classified": classified,
        "boundary_tiles": len(squares.partial[0]),
        "all_tiles": tiles.num_tiles**2,
    }


def cut(cu_seqlens: np.ndarray, seq_len: int, kv_len: int) -> torch.Tensor:
    """Documents of the keys: as long in proportion, each but the last ended 64 keys later."""
    ends = np.minimum(cu_seqlens[1:-1] * kv_len // seq_len + 64, kv_len)
    return torch.as_tensor([0, *ends, kv_len])


def documents_of_two(seq_len: int, kv_len: int) -> Callable:
    cu_seqlens = draw_documents(seq_len, seed=0)
    of_q, of_kv = torch.as_tensor(np.array(cu_seqlens)), cut(np.array(cu_seqlens), seq_len, kv_len)
    q_ids, kv_ids = (torch.repeat_interleave(torch.arange(len(of_q) - 1), cu.diff()) for cu in (of_q, of_kv))
    return cpflex.document(q_ids, kv_ids=kv_ids)


def images_so_far(seq_len: int, kv_len: int) -> Callable:
    """A text sees 64 keys of every image that stands before."""
    places = torch.randint(seq_len, (kv_len // 64,), generator=torch.Generator().manual_seed(0))
    images_before = torch.bincount(places, minlength=seq_len).cumsum(0)
    return lambda b, h, q_idx, kv_idx: kv_idx // 64 < images_before[q_idx]


def in_proportion(seq_len: int, kv_len: int) -> Callable:
    return lambda b, h, q_idx, kv_idx: kv_idx * seq_len <= q_idx * kv_len


RECTANGLES: list[tuple[str, Callable[[int, int], Callable], int, int, bool]] = [
    ("documents", documents_of_two, 1 << 20, 1 << 20, False),
    ("documents", documents_of_two, 1 << 18, 1 << 20, False),
    ("monotonic", in_proportion, 1 << 18, 1 << 20, False),
    ("documents", documents_of_two, 1 << 20, 1 << 18, False),
    ("images so far", images_so_far, 1 << 20, 1 << 12, True),
]
"""Mask, queries, keys, whether each rank holds all keys."""
RECTANGLE_RANKS = (8, 64)


def measure_rectangle(index: int, world_size: int) -> dict[str, Any]:
    """One row, in a fresh process; the keys' plan is made before."""
    torch.set_num_threads(1)
    name, make, seq_len, kv_len, everywhere = RECTANGLES[index]
    mask, where = make(seq_len, kv_len), {"rank": 0, "world_size": world_size}
    keys = kv_len if everywhere else cpflex.make_plan(cpflex.full(), kv_len, **where, layout=cpflex.contiguous)

    def planned() -> cpflex.Plan:
        return cpflex.make_plan(cpflex.cross(mask, keys), seq_len, **where)

    cpflex.make_plan(cpflex.cross(make(1 << 12, 1 << 10), 1 << 10), 1 << 12, rank=0, world_size=2)
    before = _reset_peak_bytes()
    plan = planned()
    peak = _peak_bytes() - before
    tiles, key_tiles = tiles_of(plan.outer), tiles_of(plan.keys)
    rows, mod = plan.layout.owner[tiles.chunk] == 0, trace_mask_mod(mask)
    return {
        "mask": name,
        "seq_len": seq_len,
        "kv_len": kv_len,
        "keys": "on every rank" if everywhere else "contiguous",
        "ranks": world_size,
        "plan_ms": _median_ms(planned),
        "classify_ms": _median_ms(lambda: classify_squares(classifier(mod, 1, 1), tiles, rows, keys=key_tiles)),
        "peak_mb": peak / 1e6,
        "pickle_mb": len(pickle.dumps(plan)) / 1e6,
        "schedule": plan.stats["schedule"],
        "imbalance": plan.stats["imbalance"],
        "worst_receive": max(plan.stats["needed_tokens"]) / max(1, plan.stats["all_gather_tokens"]),
        "unproven_tiles": plan.stats["unproven_tiles"],
    }


def _median_ms(function: Callable[[], Any]) -> float:
    """In CPU time of this process: other load on the machine does not count."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return 1e3 * statistics.median(seconds)


def measure_torch(name: str, seq_len: int, world_size: int, compiled: bool) -> dict[str, Any]:
    """torch's block mask of the whole sequence, and its PTRR balancer on it, in a fresh process."""
    from torch.nn.attention.flex_attention import create_block_mask

    torch.set_num_threads(1)
    mask = masks(seq_len)[name]
    before = _reset_peak_bytes()
    start = time.perf_counter()
    block_mask = create_block_mask(mask, None, None, seq_len, seq_len, device="cpu", _compile=compiled)
    first = time.perf_counter() - start
    start = time.perf_counter()
    block_mask = create_block_mask(mask, None, None, seq_len, seq_len, device="cpu", _compile=compiled)
    steady = time.perf_counter() - start
    row = {
        "mask": name,
        "seq_len": seq_len,
        "ranks": world_size,
        "peer": f"create_block_mask {'compiled' if compiled else 'eager'}",
        "first_ms": 1e3 * first,
        "steady_ms": 1e3 * steady,
        "peak_mb": (_peak_bytes() - before) / 1e6,
    }
    return row | _measure_ptrr(block_mask, world_size)


def _measure_ptrr(block_mask: Any, world_size: int) -> dict[str, Any]:
    """Time of PTRR, its imbalance, and the largest share of an all-gather that a rank would need under it."""
    try:
        from torch.distributed.tensor.experimental._context_parallel._load_balancer import _PTRRLoadBalancer
    except ImportError:
        return {"ptrr_ms": None}
    start = time.perf_counter()
    order = _PTRRLoadBalancer(block_mask, world_size)._generate_indices().reshape(-1)
    elapsed = time.perf_counter() - start
    dense = block_mask.to_dense()[0, 0].bool().numpy()
    blocks = order[::128].numpy().reshape(world_size, -1) // 128
    work = np.array([dense[held].sum() for held in blocks])
    needs = [np.setdiff1d(np.flatnonzero(dense[held].any(axis=0)), held).size for held in blocks]
    foreign = dense.shape[1] * (world_size - 1) // world_size
    return {
        "ptrr_ms": 1e3 * elapsed,
        "ptrr_imbalance": work.max() / work.mean(),
        "ptrr_worst_receive": max(needs) / foreign,
    }


def _reset_peak_bytes() -> int:
    """Forget the highest resident size so far; the resident size now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _length(text: str) -> int:
    return int(text[:-1]) << {"k": 10, "m": 20}[text[-1].lower()] if text[-1].isalpha() else int(text)


def part_of(row: dict[str, Any]) -> str:
    marks = {"classified": "scaling", "kv_len": "rectangles", "format": "formats"}
    return next((part for mark, part in marks.items() if mark in row), "plans")


def verdict(row: dict[str, Any]) -> str:
    """Of a row of 1M tokens or fewer."""
    is_over = row["classify_ms"] > CLASSIFY_BUDGET_MS
    return f"  OVER the budget of {CLASSIFY_BUDGET_MS} ms" if is_over and row["seq_len"] <= 1 << 20 else ""


def _show(row: dict[str, Any]) -> str:
    if "format" in row:
        return mask_formats.show(row) + verdict(row)
    if "kv_len" in row:
        size = f"{row['seq_len'] >> 10:>6}k over {row['kv_len'] >> 10}k x {row['ranks']:<5}{row['mask']:<16}"
        text = f"{row['plan_ms']:8.1f} ms, classified in {row['classify_ms']:.1f}, {row['peak_mb']:.1f} MB, "
        text += f"{row['pickle_mb']:.2f} MB pickled, {row['schedule']}: work {row['imbalance']:.2f}, receive "
        return f"{size}{text}{row['worst_receive']:.3f}, {row['unproven_tiles']} unproven{verdict(row)}"
    if "classified" in row:
        share = row["classified"] / row["all_tiles"]
        text = f"{row['classify_ms']:8.1f} ms, {row['classified']:>9,} squares looked at, {share:.1e} of all tiles"
        return f"{row['seq_len'] >> 10:>6}k, whole {row['mask']:<20}{text}, {row['boundary_tiles']:>9,} PARTIAL"
    size = f"{row['seq_len'] >> 10:>6}k x {row['ranks']:<5}{row['mask']:<22}"
    if "peer" in row:
        text = f"{row['peer']:<28}first {row['first_ms']:9.1f} ms, then {row['steady_ms']:9.1f} ms"
        text += f", {row['peak_mb']:8.1f} MB"
        if row["ptrr_ms"] is not None:
            text += f", PTRR {row['ptrr_ms']:.0f} ms: work {row['ptrr_imbalance']:.2f}"
            text += f", receive {row['ptrr_worst_receive']:.2f}"
        return size + text
    per_kind = ", ".join(
        f"{schedule}: work {work:.2f}, receive {receive:.3f}"
        for schedule, work, receive in zip(row["schedule"], row["imbalance"], row["worst_receive"], strict=True)
    )
    return f"{size}{row['plan_ms']:8.1f} ms {row['peak_mb']:8.1f} MB {row['pickle_mb']:7.2f} MB pickled   {per_kind}"


def _jobs(options: argparse.Namespace) -> Iterator[tuple]:
    """What makes each row, and of which arguments."""
    sizes = [(seq_len, world_size) for seq_len, world_size in SIZES if seq_len <= options.max_len]
    if "scaling" in options.only:
        yield from ((measure_scaling, name, seq_len) for seq_len, _ in sizes for name in SCALING)
    for seq_len, world_size in sizes if "plans" in options.only else ():
        for name in masks(1 << 12):
            yield measure_plan, name, seq_len, world_size
            if not options.no_peers and seq_len <= 1 << 16 and name in ("causal", "documents", "doc+window"):
                compiled = (False, True) if seq_len <= 1 << 14 else (True,)
                yield from ((measure_torch, name, seq_len, world_size, c) for c in compiled)
    if "rectangles" in options.only:
        lengths = [max(q_len, kv_len) for _, _, q_len, kv_len, _ in RECTANGLES]
        for index in [i for i, length in enumerate(lengths) if length <= options.max_len]:
            yield from ((measure_rectangle, index, world_size) for world_size in RECTANGLE_RANKS)
    if "formats" in options.only:
        for seq_len, world_size in mask_formats.SIZES:
            if seq_len <= options.max_len:
                yield from ((mask_formats.measure, name, seq_len, world_size) for name in mask_formats.FORMATS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--max-len", type=_length, default=1 << 24, help="longest sequence, for instance 64k or 1m (default 16m)"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave torch's block masks and balancers out")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "planner.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for job in _jobs(options):
        rows.append(in_own_process(*job))
        print(_show(rows[-1]), flush=True)
    if options.out.exists():
        before = json.loads(options.out.read_text())
        kept = [row for row in before["rows"] if part_of(row) not in options.only]
        rows += [{"versions": before["versions"]} | row for row in kept]
        rows.sort(key=lambda row: PARTS.index(part_of(row)))
    record = {
        "command": "python benchmarks/planner.py",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

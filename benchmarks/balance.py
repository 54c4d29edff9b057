"""How even and how local the balanced layout is: packed documents, full and sliding layers on one layout.

    python benchmarks/balance.py        # 8 packs on 8 ranks x 64k tokens, 4 on 32 x 256k; writes results/balance.json
    python benchmarks/balance.py --zoo  # many masks, 256k to 16M tokens; writes results/balance_zoo.json and the table
                                        # in docs/planning.md

Work is most / mean over ranks, in tiles of 128; receive is the worst rank's K/V rows of others, of what an all-gather
would bring.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cpflex
from documents import draw_documents
from planner import block_diffusion

SETTINGS = [(1 << 16, 8, 8), (1 << 18, 32, 4)]
"""(tokens, ranks, packs)."""

WINDOW = 1024
LAYOUTS = (cpflex.balanced, cpflex.zigzag, cpflex.contiguous)


ZOO_SIZES = [(1 << 18, 8), (1 << 18, 64), (1 << 20, 64), (1 << 22, 256), (1 << 24, 256)]
EVEN = 1.05
DOCS = Path(__file__).parents[1] / "docs" / "planning.md"


CAUSAL, WINDOW_4K = cpflex.causal(), cpflex.sliding_window(4096)
ZOO: dict[str, Callable[[int], Any]] = {
    "full": lambda s: cpflex.full(),
    "causal": lambda s: CAUSAL,
    "window 1k": lambda s: CAUSAL & cpflex.sliding_window(1024),
    "window 4k": lambda s: CAUSAL & WINDOW_4K,
    "window 4k both ways": lambda s: cpflex.sliding_window(4096, 4096),
    "documents": lambda s: CAUSAL & cpflex.document(cu_seqlens=draw_documents(s, 0)),
    "documents, both ways": lambda s: cpflex.document(cu_seqlens=draw_documents(s, 0)),
    "documents, window 1k": lambda s: (
        CAUSAL & cpflex.document(cu_seqlens=draw_documents(s, 0)) & cpflex.sliding_window(1024)
    ),
    "16 equal documents": lambda s: documents(s, *np.linspace(0, 1, 17)[1:]),
    "two documents, 1 : 1": lambda s: documents(s, 1 / 2, 1),
    "two documents, 1 : 3": lambda s: documents(s, 1 / 4, 1),
    "two documents, 1 : 15": lambda s: documents(s, 1 / 16, 1),
    "one long, many of 1k": lambda s: documents(s, *np.linspace(1 / 2, 1, s // 2048 + 1)),
    "prefix 4k": lambda s: cpflex.prefix_lm(4096),
    "prefix 1/8": lambda s: cpflex.prefix_lm(s // 8),
    "prefix 1/2": lambda s: cpflex.prefix_lm(s // 2),
    "prefix 7/8": lambda s: cpflex.prefix_lm(s * 7 // 8),
    "prefix of each document": lambda s: prefix_of_documents(draw_documents(s, 0)),
    "shared question": lambda s: shared_question(s),
    "block causal, 16k": lambda s: lambda b, h, q, k: q // 16384 >= k // 16384,
    "global 1k keys, window 4k": lambda s: CAUSAL & (lambda b, h, q, k: (k < 1024) | (q - k < 4096)),
    "global 1k tokens, window 4k": lambda s: lambda b, h, q, k: (k < 1024) | (q < 1024) | ((q - k).abs() < 4096),
    "dilated": lambda s: dilated,
    "block diffusion": lambda s: block_diffusion(s, 32),
    "neighbourhood 2-D": lambda s: neighbourhood(1 << (s.bit_length() // 2)),
}
"""Masks of a sequence of so many tokens."""


def documents(seq_len: int, *ends: float) -> cpflex.MaskMod:
    """Causal, packed; they end at these shares of the sequence."""
    return CAUSAL & cpflex.document(cu_seqlens=[0, *(int(end * seq_len) for end in ends)])


def dilated(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The nearest 2048 keys, then every 16th tile up to 64k."""
    return (q >= k) & ((q - k < 2048) | (((q // 128 - k // 128) % 16 == 0) & (q - k < 65536)))


def prefix_of_documents(cu_seqlens: list[int]) -> Any:
    """A quarter of each document is seen by all of it, the rest is causal."""
    starts = torch.tensor(cu_seqlens)
    ids = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    ends = starts[:-1] + starts.diff() // 4
    return lambda b, h, q, k: (ids[q] == ids[k]) & ((k <= q) | (k < ends[ids[q]]))


def shared_question(seq_len: int) -> Any:
    """A quarter of the sequence, then 24 answers that see it and themselves."""
    token = torch.arange(seq_len)
    answer = torch.where(token < seq_len // 4, 0, 1 + (token - seq_len // 4) // (seq_len // 32))
    return cpflex.causal() & (lambda b, h, q, k: (answer[k] == 0) | (answer[q] == answer[k]))


def neighbourhood(width: int) -> Any:
    """An image of so many columns; a pixel sees 13 x 13 around it."""
    return lambda b, h, q, k: ((q // width - k // width).abs() <= 6) & ((q % width - k % width).abs() <= 6)


def measure_zoo(name: str, seq_len: int, world_size: int) -> dict[str, Any]:
    """One row: imbalance of `balanced`, and why, where it is not even."""
    chunk_work = []

    def noted(seq_len: int, world_size: int, work: Any) -> cpflex.Layout:
        table = cpflex.balanced(seq_len, world_size, work)
        chunk_work.append(work(table.chunk_len, table.num_chunks)["mask"].work)
        return table

    plan = cpflex.make_plan(ZOO[name](seq_len), seq_len, rank=0, world_size=world_size, layout=noted)
    ordered, count = np.sort(chunk_work[0]), len(plan.layout.chunks[0])
    mean = ordered.sum() / world_size
    least = (ordered[-1] + ordered[: count - 1].sum()) / mean
    reason = ""
    if plan.stats["imbalance"] > EVEN:
        heavy = f"a chunk of {plan.layout.chunk_len} tokens holds {ordered[-1] / mean:.2f} x a rank's mean work"
        reason = f"{heavy}; with the lightest others, as each rank holds equally many: {least:.2f}"
    row = {"mask": name, "seq_len": seq_len, "ranks": world_size, "chunks_per_rank": count}
    return row | {"imbalance": plan.stats["imbalance"], "least": least, "reason": reason}


def run_zoo(out: Path) -> None:
    rows = []
    for name in ZOO:
        for seq_len, world_size in ZOO_SIZES:
            rows.append(measure_zoo(name, seq_len, world_size))
        shown = "".join(f"{row['imbalance']:8.3f}" for row in rows[-len(ZOO_SIZES) :])
        print(f"{name:30}{shown}   {rows[-1]['reason']}", flush=True)
    out.write_text(json.dumps({"command": "python benchmarks/balance.py --zoo", "rows": rows}, indent=1) + "\n")
    begin, end = "<!-- zoo -->\n", "<!-- end of zoo -->\n"
    head, rest = DOCS.read_text().split(begin)
    DOCS.write_text(f"{head}{begin}{zoo_table(rows)}{end}{rest.split(end)[1]}")


def zoo_table(rows: list[dict[str, Any]]) -> str:
    sizes = [f"{s >> 10}k x {p}" if s < 1 << 20 else f"{s >> 20}M x {p}" for s, p in ZOO_SIZES]
    lines = [f"| | {' | '.join(sizes)} |", f"|{' --- |' * (len(sizes) + 1)}"]
    for name in dict.fromkeys(row["mask"] for row in rows):
        figures = [f"{row['imbalance']:.3f}" for row in rows if row["mask"] == name]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    lines += ["", f"Above {EVEN}:", ""]
    for row in rows:
        if row["reason"]:
            lines.append(f"- {row['mask']}, {row['seq_len'] >> 10}k x {row['ranks']}: {row['reason']}.")
    return "\n".join(lines) + "\n"


def measure(layout, seq_len: int, world_size: int, seed: int) -> list[float]:
    """[work, receive] of the full kind, then of the sliding one."""
    full = cpflex.causal() & cpflex.document(cu_seqlens=draw_documents(seq_len, seed))
    masks = {"full": full, "sliding": full & cpflex.sliding_window(WINDOW)}
    stats = cpflex.make_plan(masks, seq_len, rank=0, world_size=world_size, layout=layout).stats
    return [
        figure
        for kind in masks
        for figure in (stats[kind]["imbalance"], max(stats[kind]["needed_tokens"]) / stats[kind]["all_gather_tokens"])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "balance.json")
    parser.add_argument("--zoo", action="store_true", help="many masks at many lengths instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.zoo:
        run_zoo(options.out.with_name("balance_zoo.json"))
        return
    rows = []
    print(f"{'':34}{'full: work':>18}{'receive':>18}{'sliding: work':>18}{'receive':>18}   mean of packs (worst)")
    for seq_len, world_size, packs in SETTINGS:
        for layout in LAYOUTS:
            figures = np.array([measure(layout, seq_len, world_size, seed) for seed in range(packs)])
            mean, worst = figures.mean(axis=0), figures.max(axis=0)
            rows.append(
                {
                    "seq_len": seq_len,
                    "ranks": world_size,
                    "packs": packs,
                    "layout": layout.__name__,
                    "mean": mean.tolist(),
                    "worst": worst.tolist(),
                }
            )
            shown = "".join(f"{m:9.3f} ({w:.3f})".rjust(18) for m, w in zip(mean, worst, strict=True))
            print(f"{world_size:>3} ranks x {seq_len >> 10}k, {layout.__name__:<16}{shown}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": "python benchmarks/balance.py",
        "columns": ["full work", "full receive", "sliding work", "sliding receive"],
    }
    options.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

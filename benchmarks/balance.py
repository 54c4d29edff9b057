"""How even and how local the balanced layout is: packed documents, full and sliding layers on one layout.

    python benchmarks/balance.py        # 8 packs on 8 ranks x 64k tokens, 4 on 32 x 256k; writes results/balance.json

Work is most / mean over ranks; receive is the worst rank's K/V rows of others, of what an all-gather would bring.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import cpflex
from documents import draw_documents

SETTINGS = [(1 << 16, 8, 8), (1 << 18, 32, 4)]
"""(tokens, ranks, packs)."""

WINDOW = 1024
LAYOUTS = (cpflex.balanced, cpflex.zigzag, cpflex.contiguous)


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
    options = parser.parse_args()
    torch.set_num_threads(1)
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

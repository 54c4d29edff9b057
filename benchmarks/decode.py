"""What decoding over ranks costs besides its arithmetic.

    python benchmarks/decode.py --planning
    python benchmarks/decode.py --planning --out benchmarks/results/decode_planning.json

Planning: the host's time for one `make_decode_plan` of a long context, by a mask that was traced once, and for each
step of its horizon (`fits`, `advance` and `evict`), per new token. One thread's CPU time, the least of many plans, each
of which begins where the one before it ended. `create_block_mask` and torch's PagedAttention are not measured here.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import cpflex

PAGE_SIZE = 64
HORIZON = 64
BUDGET_US = 10.0
"""Of planning, for a token, at 1M tokens in all."""

MASKS: dict[str, Callable[[], Any]] = {
    "causal": cpflex.causal,
    "window 4096": lambda: cpflex.causal() & cpflex.sliding_window(4096),
    "sinks and window": lambda: cpflex.causal() & (cpflex.sliding_window(4096) | (lambda b, h, q, k: k < 4)),
    "prefix": lambda: cpflex.prefix_lm(8192),
}
SHAPES = {"1 x 1M": (1, 1 << 20), "8 x 128k": (8, 1 << 17), "32 x 32k": (32, 1 << 15)}
"""Sequences, and tokens of each."""


def planning(name: str, shape: str, world_size: int, repeats: int = 15) -> dict[str, Any]:
    """Microseconds of a new token of one sequence, on rank 0."""
    num_sequences, length = SHAPES[shape]
    total = num_sequences * (length + (repeats + 2) * HORIZON + PAGE_SIZE)
    pages = cpflex.Pages(2 * total // PAGE_SIZE // world_size + num_sequences, PAGE_SIZE, rank=0, world_size=world_size)
    for seq in range(num_sequences):
        pages.reserve(seq, length + (repeats + 2) * HORIZON)
        pages.fill(seq, length)
    mask, new = cpflex.mask_mod(MASKS[name]()), dict.fromkeys(range(num_sequences), 1)
    plan, plans, steps = None, [], []
    for _ in range(repeats):
        began = time.thread_time()
        plan = cpflex.make_decode_plan(mask, pages, new, HORIZON, into=plan)
        planned = time.thread_time()
        while plan.fits(new):
            plan.advance()
            pages.evict(mask)
        plans.append(planned - began)
        steps.append(time.thread_time() - planned)
    assert plan is not None
    tokens = HORIZON * num_sequences
    return {
        "mask": name,
        "shape": shape,
        "ranks": world_size,
        "runs": len(plan.tables.runs),
        "plan_ms": round(1e3 * min(plans), 3),
        "plan_us_a_token": round(1e6 * min(plans) / tokens, 2),
        "steps_us_a_token": round(1e6 * min(steps) / tokens, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planning", action="store_true", required=True)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'mask':18} {'shape':9} ranks   runs  plan, ms  plan, us/token  steps, us/token")
    for shape in SHAPES:
        for name in MASKS:
            for world_size in (1, 4):
                row = planning(name, shape, world_size, arguments.repeats)
                rows.append(row)
                print(
                    f"{name:18} {shape:9} {world_size:5} {row['runs']:6} {row['plan_ms']:9.3f}"
                    f" {row['plan_us_a_token']:14.2f} {row['steps_us_a_token']:16.2f}",
                    flush=True,
                )
    if arguments.out:
        found = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        arguments.out.write_text(
            json.dumps(found | {"horizon": HORIZON, "page_size": PAGE_SIZE, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

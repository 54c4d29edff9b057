"""Completions stored as one tree: a step on it beside one on separate completions; or what planning its mask costs, and
how little of a global batch a rank then needs.

    python benchmarks/trees.py                           steps, see tree_steps.py; writes results/trees.json
    python benchmarks/trees.py --planning                # 131k to 1M tokens; writes results/trees_planning.json
    python benchmarks/trees.py --planning --max-len 128k # the small ones

Trees fork evenly, as rollouts of agents do that are continued from their turns: a prompt, then levels of segments of
log-normal length, the last of which end the completions; all tokens together are the sequence. "star" is a prompt and
its completions, no more. Windows are along the paths: those of `tree`,
and beside them those by positions. Every row runs in a process of its own on one thread and reports the least of three
times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cpflex
import tree_steps
from cpflex.masks import MaskMod
from cpflex.mods.trace import trace_mask_mod
from cpflex.planning.needs import classifier
from cpflex.planning.squares import classify_squares
from cpflex.tile_mask import Tiles
from cpflex.trees import Tree
from own_process import in_own_process, least_ms

SIZES = [(1 << 17, 8, 3, 1 << 13), (1 << 18, 16, 3, 1 << 14), (1 << 20, 32, 4, 1 << 15)]
"""(tokens, ranks, levels, tokens of the prompt); four continuations of each segment but the last."""

WINDOW = 4096


def drawn_tree(num_tokens: int, forks: Sequence[int], prompt: int, seed: int = 0) -> Tree:
    """Depth first: a prompt, that ``forks[0]`` segments continue, each of them ``forks[1]`` and so on."""
    parents = [-1]

    def grow(parent: int, level: int) -> None:
        for _ in range(forks[level] if level < len(forks) else 0):
            parents.append(parent)
            grow(len(parents) - 1, level + 1)

    grow(0, 0)
    sizes = np.random.default_rng(seed).lognormal(0.0, 0.5, len(parents) - 1)
    ends = prompt + np.rint((num_tokens - prompt) * np.cumsum(sizes) / sizes.sum()).astype(np.int64)
    return Tree(parents, np.diff(ends, prepend=[0, prompt]), seq_len=num_tokens)


def mask_of(tree: Tree, kind: str) -> MaskMod:
    if kind == "window by positions":
        return cpflex.tree(tree) & cpflex.sliding_window(WINDOW, positions=tree.depths)
    return cpflex.tree(tree, window=WINDOW if kind == "window by depth" else None)


def measure_planning(kind: str, num_tokens: int, world_size: int, forks: Sequence[int], prompt: int) -> dict[str, Any]:
    """One row, in a fresh process."""
    torch.set_num_threads(1)
    tree = drawn_tree(num_tokens, forks, prompt)
    parents, lengths = tree.parents, tree.lengths
    mask = mask_of(tree, kind)

    def planned() -> cpflex.Plan:
        return cpflex.make_plan(mask, num_tokens, rank=0, world_size=world_size)

    plan = planned()
    stats = plan.stats
    tiles = Tiles(plan.layout.chunk_len, plan.layout.num_chunks)
    rows = plan.layout.owner[tiles.chunk] == 0
    mod = trace_mask_mod(mask)
    squares = classify_squares(classifier(mod, 1, 1), tiles)
    return {
        "mask": kind,
        "seq_len": num_tokens,
        "ranks": world_size,
        "prompt": prompt,
        "completions": len(tree.leaves),
        "tokens_of_completions": int(sum(len(path) for path in tree.paths())),
        "mask_ms": least_ms(lambda: mask_of(Tree(parents, lengths), kind)),
        "plan_ms": least_ms(planned),
        "classify_ms": least_ms(lambda: classify_squares(classifier(mod, 1, 1), tiles, rows=rows)),
        "boundary_tiles": len(squares.partial[0]),
        "all_tiles": tiles.num_tiles**2,
        "schedule": stats["schedule"],
        "imbalance": stats["imbalance"],
        "worst_receive": max(stats["needed_tokens"]) / stats["all_gather_tokens"],
    }


def show(row: dict[str, Any]) -> str:
    return (
        f"{row['seq_len'] >> 10:>5}k x {row['ranks']:<3} {row['completions']:>4} completions, {row['mask']:<16} "
        f"mask {row['mask_ms']:5.1f} ms, classified in {row['classify_ms']:5.1f} ms, plan {row['plan_ms']:6.1f} ms; "
        f"work {row['imbalance']:.3f} x the mean, the worst rank needs {row['worst_receive']:.1%} of an all-gather; "
        f"{row['boundary_tiles']:,} of {row['all_tiles']:,} tiles PARTIAL"
    )


def measure_all_planning(max_len: int, out: Path) -> None:
    rows = []
    for num_tokens, world_size, levels, prompt in SIZES:
        shapes = {
            "tree": [4] * levels,
            "window by depth": [4] * levels,
            "window by positions": [4] * levels,
            "star": [4**levels],
        }
        for kind, forks in shapes.items() if num_tokens <= max_len else ():
            rows.append(in_own_process(measure_planning, kind, num_tokens, world_size, forks, prompt))
            print(show(rows[-1]), flush=True)
    record = {
        "command": "python benchmarks/trees.py --planning",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planning", action="store_true", help="what planning costs, instead of steps")
    parser.add_argument("--max-len", choices=["128k", "256k", "1m"], default="1m", help="planning: longest sequence")
    parser.add_argument(
        "--only", nargs="*", type=int, default=(), help="steps: completions of the rows to measure (all)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="steps: turns of each (%(default)s)")
    parser.add_argument("--out", type=Path, help="a file other than the one in results/")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    name = "trees_planning" if options.planning else "trees"
    options.out = options.out or Path(__file__).parent / "results" / f"{name}.json"
    if not options.planning:
        tree_steps.measure_all(options.only, options.repeats, options.out)
        return
    measure_all_planning({"128k": 1 << 17, "256k": 1 << 18, "1m": 1 << 20}[options.max_len], options.out)


if __name__ == "__main__":
    main()

"""What masks of other libraries cost to read and to plan: one rank's plan from each format, at 64k and 1M tokens.

    python benchmarks/mask_formats.py                 # writes benchmarks/results/mask_formats.json
    python benchmarks/mask_formats.py --max-len 64k   # the small ones

Every row runs in a process of its own on one thread. Reading, planning (rank 0) and classification (the squares of rank
0's queries, as in its plan, once with the tables of ranges to be built and once without) are the least of three runs,
in CPU time of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import cpflex
from cpflex import masks_from
from cpflex.mods.trace import trace_mask_mod
from cpflex.planning.needs import classifier
from cpflex.planning.squares import classify_squares
from cpflex.tile_mask import Tiles
from documents import draw_documents
from own_process import in_own_process, least_ms

SIZES = [(1 << 16, 8), (1 << 20, 64)]
WINDOW, SINKS = 4096, 128
BLOCK = 128


def documents(seq_len: int) -> Tensor:
    return torch.as_tensor(draw_documents(seq_len, seed=0))


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def window_of_blocks(seq_len: int) -> tuple[Tensor, Tensor]:
    """num_blocks, indices: the first block, those of a window, and the diagonal."""
    row = torch.arange(seq_len // BLOCK)
    wanted = row[:, None] - torch.arange(WINDOW // BLOCK + 1)
    indices = torch.cat([torch.zeros(len(row), 1, dtype=torch.int64), wanted], dim=1)
    valid = torch.cat([(row > WINDOW // BLOCK)[:, None], wanted >= 0], dim=1)
    order = valid.int().argsort(dim=1, descending=True, stable=True)
    return valid.sum(1).int(), indices.gather(1, order).int()


def a_block_mask(seq_len: int, table: tuple[Tensor, Tensor], size: int, mask_mod: Any) -> BlockMask:
    count, indices = (x[None, None] for x in table)
    lengths = (seq_len, seq_len)
    return BlockMask.from_kv_blocks(
        count, indices, BLOCK_SIZE=size, mask_mod=mask_mod, seq_lengths=lengths, compute_q_blocks=False
    )


def lower_triangle(num_blocks: int) -> tuple[Tensor, Tensor]:
    place = torch.arange(num_blocks)
    return (place + 1).int(), place.int().expand(num_blocks, num_blocks)


def chosen_blocks(seq_len: int, size: int, most: int) -> Tensor:
    """[Q, n]: the own block and some before it, at random."""
    num_blocks = seq_len // size
    random = torch.Generator().manual_seed(0)
    row = torch.arange(num_blocks)[:, None]
    before = (torch.rand(num_blocks, most - 1, generator=random) * row).long()
    return torch.cat([row, before], dim=1)


def sinks_and_window(seq_len: int) -> Tensor:
    """cuDNN's endpoints."""
    place = torch.arange(seq_len)
    ends = [(place + 1).clamp(max=SINKS), (place - WINDOW + 1).clamp(min=SINKS), (place + 1).clamp(min=SINKS)]
    return torch.stack(ends)[None].int()


def slices_of_documents(seq_len: int) -> list[tuple[int, int]]:
    return list(pairwise(documents(seq_len).tolist()))


def eviction(seq_len: int) -> Tensor:
    """FlashMask's columns: every key forgotten within 8,192 tokens."""
    random = torch.Generator().manual_seed(0)
    forgotten = torch.arange(seq_len) + torch.randint(1, 8192, (seq_len,), generator=random)
    return forgotten.clamp(max=seq_len).view(1, 1, -1, 1).int()


Made = Callable[[], Any]
"""Reads one mask; what it reads was made before."""


def block_mask_of_window(s: int) -> Made:
    made = a_block_mask(s, window_of_blocks(s), BLOCK, causal)
    return lambda: masks_from.block_mask(made)


def block_mask_of_causal(s: int) -> Made:
    made = a_block_mask(s, lower_triangle(s // 1024), 1024, causal)
    return lambda: masks_from.block_mask(made)


def ranges_of_documents(s: int) -> Made:
    slices = slices_of_documents(s)
    return lambda: masks_from.ranges(slices, slices, "causal", q_len=s)


def varlen_of_documents(s: int) -> Made:
    cu = documents(s)
    return lambda: masks_from.varlen(cu, cu, causal=True, window_size=(WINDOW - 1, 0))


def varlen_of_two(s: int) -> Made:
    """The first document has 64 keys more than queries, the last 64 less."""
    cu = documents(s)
    cu_k = torch.cat([cu[:1], (cu[1:-1] + 64).clamp(max=s), cu[-1:]])
    return lambda: masks_from.varlen(cu, cu_k, causal=True)


def varlen_with_room(s: int) -> Made:
    cu = documents(s)
    used = cu.diff() * 3 // 4
    return lambda: masks_from.varlen(cu, causal=True, window_size=(WINDOW - 1, 0), seqused_k=used)


def flashmask_of_documents(s: int) -> Made:
    cu = documents(s)
    ends = torch.repeat_interleave(cu[1:], cu.diff()).view(1, 1, -1, 1).int()
    return lambda: masks_from.flashmask(ends, True)


def flashmask_of_eviction(s: int) -> Made:
    columns = eviction(s)
    return lambda: masks_from.flashmask(columns, True)


def intervals_of_window(s: int) -> Made:
    mask_func = sinks_and_window(s)
    return lambda: masks_from.intervals(mask_func)


def selection(s: int) -> Made:
    indices = chosen_blocks(s, 1024, 16)
    return lambda: masks_from.selected(indices, 1024, q_len=s) & cpflex.causal()


def bsr_of_window(s: int) -> Made:
    count, indices = window_of_blocks(s)
    flat = indices[torch.arange(indices.shape[1]) < count[:, None]]
    indptr = torch.cat([torch.zeros(1), count.cumsum(0)]).int()
    return lambda: masks_from.bsr(indptr, flat, BLOCK, kv_len=s)


def bsr_of_parts(s: int) -> Made:
    """The own block as a triangle, the one before it, and the first."""
    num_blocks = s // BLOCK
    rows = [sorted({0, max(0, i - 1), i}) for i in range(num_blocks)]
    indices = torch.tensor([block for row in rows for block in row])
    indptr = torch.tensor([0, *np.cumsum([len(row) for row in rows])])
    mask = torch.ones(len(indices), BLOCK, BLOCK, dtype=torch.bool)
    mask[indptr[1:] - 1] = torch.ones(BLOCK, BLOCK).tril().bool()
    return lambda: masks_from.bsr(indptr, indices, BLOCK, kv_len=s, mask=mask)


FORMATS: dict[str, Callable[[int], Made]] = {
    "BlockMask, window and sink, blocks of 128": block_mask_of_window,
    "BlockMask, causal, blocks of 1,024": block_mask_of_causal,
    "Magi ranges, causal documents": ranges_of_documents,
    "varlen, documents and window": varlen_of_documents,
    "varlen, documents of two lengths": varlen_of_two,
    "varlen, documents with keys not used": varlen_with_room,
    "FlashMask, causal documents": flashmask_of_documents,
    "FlashMask, random eviction": flashmask_of_eviction,
    "cuDNN intervals, window and sinks": intervals_of_window,
    "selected blocks of 1,024, 16 a row": selection,
    "BSR, window and sink, blocks of 128": bsr_of_window,
    "BSR, triangles inside of blocks of 128": bsr_of_parts,
}


def measure(name: str, seq_len: int, world_size: int) -> dict[str, Any]:
    """One row, in a fresh process."""
    torch.set_num_threads(1)
    cpflex.make_plan(FORMATS[name](1 << 13)(), 1 << 13, rank=0, world_size=2)
    read = FORMATS[name](seq_len)
    mask = read()

    def planned() -> cpflex.Plan:
        return cpflex.make_plan(mask, seq_len, rank=0, world_size=world_size)

    plan = planned()
    tiles = Tiles(plan.layout.chunk_len, plan.layout.num_chunks)
    rows = plan.layout.owner[tiles.chunk] == 0
    mod = trace_mask_mod(mask)
    warm = classifier(mod, 1, 1)
    classify_squares(warm, tiles, rows=rows)
    return {
        "format": name,
        "mask": repr(mask),
        "seq_len": seq_len,
        "ranks": world_size,
        "read_ms": least_ms(read),
        "plan_ms": least_ms(planned),
        "classify_ms": least_ms(lambda: classify_squares(classifier(mod, 1, 1), tiles, rows=rows)),
        "classify_again_ms": least_ms(lambda: classify_squares(warm, tiles, rows=rows)),
        "captured_mb": sum(x.nbytes for x in mod.captured) / 1e6,
        "full_tiles": plan.stats["full_tiles"],
        "partial_tiles": plan.stats["partial_tiles"],
        "unproven_tiles": plan.stats["unproven_tiles"],
    }


def show(row: dict[str, Any]) -> str:
    return (
        f"{row['seq_len'] >> 10:>5}k x {row['ranks']:<3} {row['format']:<44} read {row['read_ms']:7.1f} ms, classified "
        f"in {row['classify_ms']:6.1f} ms, again in {row['classify_again_ms']:6.1f}, plan {row['plan_ms']:7.1f} ms; "
        f"{row['full_tiles']} FULL, {row['partial_tiles']} PARTIAL, {row['unproven_tiles']} unproven"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-len", choices=["64k", "1m"], default="1m", help="longest sequence")
    parser.add_argument("--only", default="", help="formats whose name contains this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mask_formats.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for seq_len, world_size in SIZES[: 1 if options.max_len == "64k" else 2]:
        for name in FORMATS:
            if options.only in name:
                rows.append(in_own_process(measure, name, seq_len, world_size))
                print(show(rows[-1]), flush=True)
    record = {
        "command": "python benchmarks/mask_formats.py",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

"""A global batch packed for one large group, beside the same batch as it comes, and beside many small groups.

    python benchmarks/pack.py                # all settings; writes results/pack.json
    python benchmarks/pack.py --brief        # the small ones

As it comes: `balanced` on all ranks, documents in random order. Small groups: replicas of 8 ranks, each with a batch
of its own of a part of the documents, `balanced`; all wait for the slowest before the optimizer's step. Work is the
most of a rank over the mean of all ranks, by blocks of tokens; rows are K/V rows that a rank receives in one forward,
in its own tokens. The bound is what the slowest rank computes, or receives if that takes longer, forward and backward
of one layer, as if all else were hidden: a model, not a measurement. Documents: the histogram of `documents.py`, or as
in supervised fine-tuning, log-normal around 600 tokens, at most 8,192.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cpflex
from documents import draw_documents

SETTINGS = [
    *[("pre-training", 1 << 18, 32), ("pre-training", 1 << 20, 64), ("pre-training", 1 << 22, 64)],
    *[("pre-training", 1 << 22, 256), ("fine-tuning", 1 << 18, 32), ("fine-tuning", 1 << 20, 64)],
    *[("fine-tuning", 1 << 22, 256)],
]
PER_GROUP = 8
SEED = 0


def drawn(kind: str, seq_len: int) -> list[int]:
    """Lengths of documents that are ``seq_len`` tokens together."""
    if kind == "pre-training":
        return np.diff(draw_documents(seq_len, SEED)).tolist()
    rng = np.random.default_rng(SEED)
    lengths: list[int] = []
    while (left := seq_len - sum(lengths)) > 0:
        lengths.append(min(left, int(np.clip(rng.lognormal(6.4, 1.0), 16, 8192))))
    return lengths


def planned(
    lengths: Sequence[int], world_size: int, packed: cpflex.Packed | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that each rank computes, and K/V rows that it receives."""
    cu = [0, *np.cumsum(lengths).tolist()] if packed is None else packed.cu_seqlens
    layout = cpflex.balanced if packed is None else packed.layout
    mask = cpflex.causal() & cpflex.document(cu_seqlens=cu)
    stats = cpflex.make_plan(mask, int(cu[-1]), rank=0, world_size=world_size, layout=layout).stats
    return np.array(stats["work"]), np.array(stats["needed_tokens"])


def in_small_groups(lengths: Sequence[int], world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Each document goes to the group with the fewest tokens, in the order in which documents come."""
    groups: list[list[int]] = [[] for _ in range(world_size // PER_GROUP)]
    for length in lengths:
        min(groups, key=sum).append(length)
    work, rows = zip(*(planned(group, PER_GROUP) for group in groups), strict=True)
    return np.concatenate(work), np.concatenate(rows)


def measure(kind: str, seq_len: int, world_size: int) -> list[dict[str, Any]]:
    lengths = drawn(kind, seq_len)
    begin = time.perf_counter()
    packed = cpflex.pack(lengths, world_size)
    seconds = time.perf_counter() - begin
    machine = cpflex.topology.Machine(cpflex.Topology.named("h100-ib"), cpflex.Device(), cpflex.Heads())
    flops_s, bytes_s = machine.device.tflops * 1e12, machine.topology.inter_gb_per_s * 1e9
    mean = sum(n * (n + 1) // 2 for n in lengths) / world_size
    rows = []
    for name, (work, received) in {
        "as it comes": planned(lengths, world_size),
        f"groups of {PER_GROUP}": in_small_groups(lengths, world_size),
        "packed": planned(lengths, world_size, packed),
    }.items():
        compute_us = 1e6 * 3.5 * machine.heads.flops_per_pair * work / flops_s
        is_inside = PER_GROUP if name.startswith("groups") else 0
        rate = machine.topology.intra_gb_per_s * 1e9 if is_inside else bytes_s
        receive_us = 1e6 * received * (2 * machine.heads.row_bytes + machine.heads.grad_row_bytes) / rate
        rows.append(
            {
                "documents": kind,
                "seq_len": seq_len,
                "ranks": world_size,
                "how": name,
                "work": float(work.max() / mean),
                "rows_max": float(received.max() * world_size / seq_len),
                "rows_mean": float(received.mean() * world_size / seq_len),
                "ranks_alone": int((received == 0).sum()),
                "bound_us": float(np.maximum(compute_us, receive_us).max()),
                "pack_s": seconds if name == "packed" else None,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brief", action="store_true", help="only 256k tokens")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pack.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'':47}work, most/mean   rows, most   mean   ranks without   bound, us")
    for kind, seq_len, world_size in SETTINGS:
        if options.brief and seq_len > 1 << 18:
            continue
        for row in measure(kind, seq_len, world_size):
            rows.append(row)
            said = f"{kind}, {seq_len >> 10}k x {world_size}, {row['how']}"
            figures = f"{row['work']:16.3f}{row['rows_max']:13.2f}{row['rows_mean']:7.2f}{row['ranks_alone']:16}"
            print(f"{said:47}{figures}{row['bound_us']:12.0f}", flush=True)
    record = {"command": "python benchmarks/pack.py", "setting": "H100, 400 Gb/s a GPU, GQA 32/8, D 128, bf16; a model"}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A global batch packed for one large group, beside the same batch as it comes, and beside many small groups.

    python benchmarks/pack.py                # all settings; writes results/pack.json
    python benchmarks/pack.py --brief        # the small ones

As it comes: `balanced` on all ranks, documents in random order. Small groups: replicas of 8 ranks, each with a batch
of its own of a part of the documents, `balanced`; all wait for the slowest before the optimizer's step. Times are those
that `cpflex.pack` makes least, in ms for forward and backward of one layer: the slowest rank's work beside the busiest
links, the longer and a fifth of the shorter. A model, not a measurement, and by the same estimate that chose the last
way. Predicted is what the schedule that suits best would take (`python -m cpflex simulate`), which counts latencies and
hosts, too, and chose nothing here. On nodes of 8 with the links of `h100-ib`, and on a flat network, where a row
crosses for each rank that needs it.

Documents: the histogram of `documents.py`, or as in supervised fine-tuning, log-normal around 600 tokens, at most
8,192. Figures are means of three draws, and the worst of them.
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
from cpflex.planning.choose import ranked
from cpflex.planning.make import traced
from cpflex.planning.needs import classifier
from cpflex.planning.packing import Batch, Packed, candidates
from cpflex.planning.traffic import traffic_of
from cpflex.tile_mask import Tiles
from cpflex.topology import Machine
from documents import draw_documents

SETTINGS = [
    *[("pre-training", 1 << 18, 32), ("pre-training", 1 << 20, 64), ("pre-training", 1 << 22, 64)],
    *[("pre-training", 1 << 22, 256), ("fine-tuning", 1 << 18, 32), ("fine-tuning", 1 << 20, 64)],
    *[("fine-tuning", 1 << 22, 256)],
]
NETWORKS = {"nodes of 8": cpflex.Topology.named("h100-ib"), "flat": None}
PER_GROUP = 8
SEEDS = (101, 102, 103)


def drawn(kind: str, seq_len: int, seed: int) -> list[int]:
    """Lengths of documents that are ``seq_len`` tokens together."""
    if kind == "pre-training":
        return np.diff(draw_documents(seq_len, seed)).tolist()
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := seq_len - sum(lengths)) > 0:
        lengths.append(min(left, int(np.clip(rng.lognormal(6.4, 1.0), 16, 8192))))
    return lengths


def in_small_groups(lengths: Sequence[int], num_groups: int) -> list[list[int]]:
    """Each document goes to the group with the fewest tokens, in the order in which documents come."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    for length in lengths:
        min(groups, key=sum).append(length)
    return groups


def predicted_ms(part: Packed, machine: Machine) -> float:
    """Forward and backward of a layer, by the schedule that is predicted to take least; heads are not exchanged."""
    mask = cpflex.causal() & cpflex.document(cu_seqlens=part.cu_seqlens)
    classify = classifier(traced(mask, part.seq_len, None, None, {}), 1, 1)
    tables = traffic_of(classify, part.table, Tiles(part.table.chunk_len, part.table.num_chunks))
    return ranked(tables, machine)[0].total_us / 1e3


def measure(kind: str, seq_len: int, world_size: int, network: str, seed: int) -> dict[str, dict[str, float]]:
    """By the way of laying documents out."""
    topology, lengths = NETWORKS[network], drawn(kind, seq_len, seed)
    machine = cpflex.topology.Machine.of(topology)
    batch = Batch(np.array(lengths), world_size, machine=machine)
    groups = in_small_groups(lengths, world_size // PER_GROUP)
    small = [Batch(np.array(group), PER_GROUP, machine=machine) for group in groups]
    begin = time.perf_counter()
    packed = cpflex.pack(lengths, world_size, topology=topology)
    seconds = time.perf_counter() - begin
    ways = {
        "as it comes": [(batch, next(candidates(batch)))],
        f"groups of {PER_GROUP}": [(one, next(candidates(one))) for one in small],
        "packed": [(batch, packed)],
    }
    mean_work = sum(n * (n + 1) // 2 for n in lengths) / world_size
    found = {}
    for way, parts in ways.items():
        rows = np.concatenate([part.received for _, part in parts]) * world_size / seq_len
        found[way] = {
            "ms": max(one.estimated_ns(part) for one, part in parts) / 1e6,
            "predicted_ms": max(predicted_ms(part, machine) for _, part in parts) if machine else 0.0,
            "work": max(max(part.work) for _, part in parts) / mean_work,
            "rows_max": float(rows.max()),
            "rows_mean": float(rows.mean()),
            "whole": sum(len(on) == 1 for _, part in parts for on in part.holders) / len(lengths),
        }
    found["packed"]["pack_s"] = seconds
    return found


def summary(kind: str, seq_len: int, world_size: int, network: str) -> list[dict[str, Any]]:
    draws = [measure(kind, seq_len, world_size, network, seed) for seed in SEEDS]
    rows = []
    for way in draws[0]:
        figures = [draw[way] for draw in draws]
        mean = {name: round(float(np.mean([one[name] for one in figures])), 3) for name in figures[0]}
        worst = max(draw[way]["ms"] / draw["as it comes"]["ms"] for draw in draws)
        setting = {"documents": kind, "seq_len": seq_len, "ranks": world_size, "network": network, "how": way}
        rows.append(setting | mean | {"worst_of_as_it_comes": round(worst, 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brief", action="store_true", help="only 256k tokens")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pack.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'':52}ms a layer   predicted   worst of as it comes   work   rows, most   mean   whole")
    for kind, seq_len, world_size in SETTINGS:
        if options.brief and seq_len > 1 << 18:
            continue
        for network in NETWORKS:
            for row in summary(kind, seq_len, world_size, network):
                rows.append(row)
                said = f"{kind}, {seq_len >> 10}k x {world_size}, {network}, {row['how']}"
                figures = (
                    f"{row['ms']:10.1f}{row['predicted_ms']:12.1f}{row['worst_of_as_it_comes']:23.2f}{row['work']:7.2f}"
                )
                figures += f"{row['rows_max']:13.2f}{row['rows_mean']:7.2f}{row['whole']:8.2f}"
                print(f"{said:52}{figures}", flush=True)
    record = {"command": "python benchmarks/pack.py", "setting": "H100, 400 Gb/s a GPU, GQA 32/8, D 128, bf16; a model"}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record | {"seeds": SEEDS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a layer would take across nodes, by a model: cpflex's own plans beside other libraries.

    python benchmarks/scale.py                     # all rows; writes results/scale.json and the tables of docs/scale.md
    python benchmarks/scale.py --only "64 ranks"   # those whose name holds the words; the others are kept
    python benchmarks/scale.py --tables            # docs/scale.md again from results/scale.json
    python benchmarks/scale.py --planning          # what choosing costs; writes results/scale_planning.json

A figure is the time that the products alone would take, equally on all ranks, over the predicted time of forward and
backward: 32 query and 8 key heads of 128 in bf16, packed documents drawn with seed 0. Nothing here is a measurement.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cpflex
from cpflex.masks import MaskFn
from cpflex.ring.named import named_schedule
from cpflex.seeing.documents import draw_documents
from cpflex.seeing.simulate import Workload, simulate
from cpflex.topology import Device, Heads, Machine, Topology

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "scale.json", ROOT / "docs" / "scale.md"
K, M = 1 << 10, 1 << 20
MACHINES = {"h100-ib": "h100", "h100-ethernet": "h100", "gb200-nvl72": "b200"}
"""Topology, and what computes."""

WINDOW = 1024
PEERS = (
    *("all-gather (torch)", "zigzag ring (TE, RFA)", "double ring (LoongTrain)", "a2a + ring (TE, USP)", "Ulysses"),
    *("MagiAttention a2av", "MagiAttention hierarchical"),
)


@dataclass(frozen=True)
class Row:
    """One cell of the table."""

    mask: str
    seq_len: int
    ranks: int
    topology: str = "h100-ib"

    @property
    def name(self) -> str:
        length = f"{self.seq_len // M}M" if self.seq_len >= M else f"{self.seq_len // K}k"
        return f"{self.mask}, {length} x {self.ranks} ranks, {self.topology}"

    def workload(self) -> Workload:
        cu_seqlens = draw_documents(self.seq_len, 0)
        documents = np.diff(cu_seqlens).tolist()
        packed: MaskFn = cpflex.causal() & cpflex.document(cu_seqlens=cu_seqlens)
        windowed = packed & cpflex.sliding_window(WINDOW)
        match self.mask:
            case "dense causal":
                return Workload({"mask": cpflex.causal()}, self.seq_len, documents={"mask": []})
            case "packed documents":
                return Workload({"mask": packed}, self.seq_len, documents={"mask": documents})
            case "documents + window 1024":
                return Workload({"mask": windowed}, self.seq_len)
        masks, weights = {"full": packed, "sliding": windowed}, {"full": 1.0, "sliding": 5.0}
        return Workload(masks, self.seq_len, weights, {"full": documents})

    def machine(self) -> Machine:
        topology = Topology.named(self.topology)
        gpus = min(topology.gpus_per_node, self.ranks)
        return Machine(
            Topology(**(asdict(topology) | {"gpus_per_node": gpus})), Device.named(MACHINES[self.topology]), Heads()
        )


HYBRID = "hybrid, 1 full : 5 window"
DOCS, WINDOWED, DENSE = "packed documents", "documents + window 1024", "dense causal"
ISSUE = [
    Row(DOCS, M, 64), Row(DOCS, 4 * M, 256), Row(HYBRID, M, 64), Row(DENSE, 256 * K, 64), Row(DENSE, 64 * K, 32),
    Row(WINDOWED, M, 256), Row(DOCS, 64 * K, 8),
]  # fmt: skip
MORE = [
    Row(DOCS, 256 * K, 32), Row(DOCS, 256 * K, 64), Row(DOCS, 4 * M, 64), Row(DOCS, M, 256), Row(DOCS, 16 * M, 256),
    Row(DOCS, 16 * M, 1024), Row(DENSE, M, 64), Row(DENSE, M, 256), Row(DENSE, 16 * M, 1024), Row(WINDOWED, M, 64),
    Row(WINDOWED, 4 * M, 256), Row(WINDOWED, 16 * M, 1024), Row(HYBRID, 256 * K, 32), Row(HYBRID, 4 * M, 256),
    Row(HYBRID, 16 * M, 1024),
]  # fmt: skip
ELSEWHERE = [
    Row(mask, length, ranks, topology)
    for topology in ("h100-ethernet", "gb200-nvl72")
    for mask, length, ranks in ((DOCS, M, 64), (HYBRID, M, 64), (DENSE, 256 * K, 64), (DOCS, M, 256))
]
TABLES = {"the table": ISSUE, "more sizes": MORE, "other machines": ELSEWHERE}


def measure(row: Row) -> dict[str, Any]:
    """Efficiencies of all strategies, and what is behind the best."""
    began = time.perf_counter()
    outcome = simulate(row.workload(), row.ranks, row.machine())
    ours, theirs = outcome.best(ours=True), outcome.best(ours=False)
    today = next(s for s in outcome.strategies if "topology not given" in s.name)
    peers = {s.name: round(outcome.efficiency(s), 3) for s in outcome.strategies if s.ours is None}
    return {
        "name": row.name,
        "ideal_ms": round(outcome.ideal_us / 1e3, 3),
        "ours": round(outcome.efficiency(ours), 3),
        "by": ours.name.removeprefix("cpflex: ").removeprefix("cpflex, "),
        "waiting_ms": round(ours.exposed_us / 1e3, 3),
        "nic_use": round(ours.nic_use, 3),
        "buffers_gb": round((ours.buffer_bytes or 0) / 1e9, 2),
        "without_topology": round(outcome.efficiency(today), 3),
        "best_peer": theirs.name,
        "peers": peers,
        "imbalance": {kind: round(value, 3) for kind, value in outcome.imbalance.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }


def measure_planning() -> Iterator[dict[str, Any]]:
    """What choosing costs: planning with `auto`, with the schedule that it chose given, with the heads known, and
    without a topology; the least of five, in turns.
    """
    for seq_len, ranks in ((64 * K, 8), (256 * K, 32), (M, 64), (4 * M, 256)):
        packed = cpflex.causal() & cpflex.document(cu_seqlens=draw_documents(seq_len, 0))
        for name, mask in ((DENSE, cpflex.causal()), (DOCS, packed)):

            def seconds(mask: MaskFn = mask, where: tuple[int, int] = (seq_len, ranks), **options: Any) -> float:
                began = time.process_time()
                cpflex.make_plan(mask, where[0], rank=0, world_size=where[1], **options)
                return time.process_time() - began

            topology = {"topology": Topology.named("h100-ib")}
            plan = cpflex.make_plan(mask, seq_len, rank=0, world_size=ranks, **topology)
            given = named_schedule(plan.stats["schedule"])
            ways = {
                "no_topology_ms": {}, "given_ms": topology | {"schedule": given}, "auto_ms": topology,
                "auto_with_heads_ms": topology | {"heads": Heads()},
            }  # fmt: skip
            turns = [[seconds(**options) for options in ways.values()] for _ in range(5)]
            least = {way: round(1e3 * min(found), 1) for way, found in zip(ways, zip(*turns, strict=True), strict=True)}
            yield {"mask": name, "seq_len": seq_len, "ranks": ranks, "schedule": plan.stats["schedule"]} | least


def table(rows: list[Row], found: dict[str, dict[str, Any]]) -> str:
    """As markdown: the best of all in bold."""
    heads = ["mask, tokens x ranks", *PEERS, "cpflex, no topology", "cpflex", "by"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        if row.name not in found:
            continue
        one = found[row.name]
        figures = [one["peers"].get(peer) for peer in PEERS] + [one["without_topology"], one["ours"]]
        best = max(round(figure, 2) for figure in figures if figure is not None)
        cells = ["-" if f is None else f"**{f:.2f}**" if round(f, 2) == best else f"{f:.2f}" for f in figures]
        name = row.name.removesuffix(", h100-ib").replace(" ranks", "")
        lines.append([name, *cells, one["by"]])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_page(found: dict[str, dict[str, Any]]) -> None:
    """The tables between their marks."""
    text = PAGE.read_text()
    for title, rows in TABLES.items():
        begin, end = f"<!-- {title}: benchmarks/scale.py -->", f"<!-- end of {title} -->"
        text = re.sub(
            f"{re.escape(begin)}.*?{re.escape(end)}", f"{begin}\n{table(rows, found)}\n{end}", text, flags=re.S
        )
    PAGE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words that the row's name must hold")
    parser.add_argument("--tables", action="store_true", help="write docs/scale.md from what is there")
    parser.add_argument("--planning", action="store_true", help="measure what choosing costs instead")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.planning:
        costs = []
        for cost in measure_planning():
            print(cost, flush=True)
            costs.append(cost)
        record = {"command": "python benchmarks/scale.py --planning", "milliseconds of one core": costs}
        (RESULTS.parent / "scale_planning.json").write_text(json.dumps(record, indent=1) + "\n")
        return
    kept = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    found = {one["name"]: one for one in kept}
    rows = [row for rows in TABLES.values() for row in rows]
    for row in rows:
        if options.tables or options.only not in row.name:
            continue
        one = found[row.name] = measure(row)
        print(
            f"{row.name:58} {one['ours']:.2f} ({one['by']}); best of others {max(one['peers'].values()):.2f} "
            f"({one['best_peer']}); {one['seconds']:.0f} s",
            flush=True,
        )
        record = {"command": "python benchmarks/scale.py", "a model": "not a measurement"}
        ordered = [found[row.name] for row in rows if row.name in found]
        options.out.write_text(json.dumps(record | {"rows": ordered}, indent=1) + "\n")
    if options.out == RESULTS:
        write_page(found)


if __name__ == "__main__":
    main()

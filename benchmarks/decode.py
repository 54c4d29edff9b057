"""What decoding over ranks costs besides its arithmetic.

    python benchmarks/decode.py --steps                  # 4k to 64k tokens, 2 gloo ranks; about two minutes
    python benchmarks/decode.py --steps --out benchmarks/results/decode.json
    python benchmarks/decode.py --planning
    python benchmarks/decode.py --planning --out benchmarks/results/decode_planning.json
    python benchmarks/decode.py --travel                 # counts, of no machine; half a minute

Planning: the host's time for one `make_decode_plan` of a long context, by a mask that was traced once, and for each
step of its horizon (`fits`, `advance` and `evict`), per new token. One thread's CPU time, the least of many plans, each
of which begins where the one before it ended. Beside it, for one step, what torch's own pages ask for at each: its
`create_block_mask` of the new tokens, and `PagedAttention.convert_logical_block_mask`, on the same thread.

Steps: one new token of one sequence in one layer, by three ways that take turns in the same processes. "pages": every
rank keeps its pages, partial results travel. "gathered": every rank keeps its part, all keys and values are gathered at
each step, then torch's SDPA on those that the mask shows. "whole": every rank keeps everything, and nothing travels.
Their results are compared before any time is shown. A time is that of the slowest rank, the least of the turns.

Travel: what a chunk of one prompt moves in a layer if its queries travel, and if keys do, where ranks have equal parts
of the chunk; counted from the tables of the plans, as ranks do that choose.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.experimental._paged_attention import PagedAttention
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

import cpflex
from cpflex.links.processes import ProcessLinks
from cpflex.links.protocol import Message, Work

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


def torch_us_a_token(name: str, shape: str, repeats: int = 5) -> float:
    """Microseconds of a new token, by a block mask of one step that is made anew; of rows of one query."""
    num_sequences, length = SHAPES[shape]
    mask = MASKS[name]()
    paged = PagedAttention(num_sequences * length // PAGE_SIZE, PAGE_SIZE, num_sequences, device="cpu")
    for seq in range(num_sequences):
        paged.reserve(torch.tensor(seq), torch.tensor(length))

    def newest(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask(b, h, q + length - 1, k)

    spent = []
    for _ in range(repeats):
        began = time.thread_time()
        made = create_block_mask(newest, num_sequences, None, 1, length, "cpu", (1, PAGE_SIZE))
        paged.convert_logical_block_mask(made)
        spent.append(time.thread_time() - began)
    return 1e6 * min(spent) / num_sequences


class Counted(ProcessLinks):
    """Counts exchanges and what arrives with them."""

    num_exchanges = num_bytes = 0

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work:
        self.num_exchanges += 1
        self.num_bytes += sum(x.numel() * x.element_size() for _, x in receives)
        return super().exchange(sends, receives)


TRAVEL_RANKS, TRAVEL_HEADS = 4, cpflex.Heads(64, 8, 128)
TRAVEL_CHUNKS, TRAVEL_KEPT = (1, 256, 2048, 8192), (0, 8192, 32768, 131072)


def travel() -> list[dict[str, Any]]:
    """MiB that all ranks together receive, of queries with their partials, and of keys; and which is chosen."""
    rows = []
    print(f"{'mask':12} {'chunk':>6} {'kept':>7} {'queries, MiB':>13} {'keys, MiB':>10}  travel")
    for name in ("causal", "window 4096"):
        mask = cpflex.mask_mod(MASKS[name]())
        for chunk in TRAVEL_CHUNKS:
            for kept in TRAVEL_KEPT:
                pages = cpflex.Pages((chunk + kept) // PAGE_SIZE + 1, PAGE_SIZE, rank=0, world_size=TRAVEL_RANKS)
                pages.reserve("one", chunk + kept)
                pages.fill("one", kept)
                plan = cpflex.make_decode_plan(
                    mask, pages, {"one": chunk}, horizon=1, rows=cpflex.by_token, heads=TRAVEL_HEADS
                )
                (q,), (k,) = plan.traffic.costs.queries_bytes, plan.traffic.costs.keys_bytes
                row = {"mask": name, "chunk": chunk, "kept": kept, "queries_bytes": q, "keys_bytes": k}
                row["travel"] = "keys" if plan.traffic.keys[0] else "queries"
                rows.append(row)
                print(f"{name:12} {chunk:6} {kept:7} {q / 2**20:13.2f} {k / 2**20:10.2f}  {row['travel']}", flush=True)
    return rows


NUM_RANKS, HEADS, KV_HEADS, DIM = 2, 16, 4, 128
LENGTHS = (4096, 16384, 65536)
WINDOWS = {"causal": None, "window 4096": 4096, "window 1024": 1024}
STEPS = 4
"""Of each way in a turn, but for what gathers: one."""


class Layer:
    """One layer of a rank in all ways; every rank draws the same keys."""

    def __init__(self, group: dist.ProcessGroup, length: int, window: int | None, turns: int) -> None:
        self.group, self.window, self.steps = group, window, STEPS * (turns + 1)
        self.links = Counted(group)
        draw = torch.Generator().manual_seed(length)
        shape = 1, KV_HEADS, length + self.steps, DIM
        self.k, self.v = (torch.randn(shape, generator=draw) for _ in "kv")
        self.q = torch.randn(self.steps, 1, HEADS, 1, DIM, generator=draw)
        self.length = length
        self.part = torch.stack([self.k, self.v]).chunk(NUM_RANKS, dim=3)[group.rank()].contiguous()
        mask = cpflex.causal() if window is None else cpflex.causal() & cpflex.sliding_window(window)
        self.mask = cpflex.mask_mod(mask)
        pages = shape[2] // PAGE_SIZE // NUM_RANKS + 2
        self.pages = cpflex.Pages(pages, PAGE_SIZE, self.links)
        self.pages.reserve("one", shape[2])
        self.pool = self.pages.pool(KV_HEADS, DIM)
        at = torch.arange(length)
        mine = at[(at // PAGE_SIZE) % NUM_RANKS == group.rank()]  # the turn of the first sequence is 0
        self.pool.store(self.k[:, :, mine], self.v[:, :, mine], "one", mine)
        self.pages.fill("one", length)
        self.pages.evict(self.mask)
        self.held = len(mine) // PAGE_SIZE
        self.plan: cpflex.DecodePlan | None = None

    def by_pages(self, step: int) -> Tensor:
        if self.plan is None or not self.plan.fits({"one": 1}):
            self.plan = cpflex.make_decode_plan(self.mask, self.pages, {"one": 1}, HORIZON, into=self.plan)
        at = slice(self.length + step, self.length + step + 1)
        self.pool.assign(self.k[:, :, at], self.v[:, :, at], self.plan)
        out = cpflex.flex_attention(self.q[step], self.pool.k, self.pool.v, block_mask=self.plan, enable_gqa=True)
        self.plan.advance()
        assert isinstance(out, Tensor)
        return out

    def gathered(self, step: int) -> Tensor:
        parts = [torch.empty_like(self.part) for _ in range(NUM_RANKS)]
        dist.all_gather(parts, self.part, group=self.group)
        return self._shown(step, *torch.cat(parts, dim=3))

    def whole(self, step: int) -> Tensor:
        return self._shown(step, self.k, self.v)

    def _shown(self, step: int, k: Tensor, v: Tensor) -> Tensor:
        end = self.length + step + 1
        shown = slice(0 if self.window is None else max(0, end - self.window), end)
        return scaled_dot_product_attention(self.q[step], k[:, :, shown], v[:, :, shown], enable_gqa=True)

    def record(self, way: str) -> dict[str, Any]:
        """What it holds and receives in a step, by count, of this rank."""
        row = 2 * KV_HEADS * DIM * 4
        if way == "pages":
            used = self.pages.num_pages - self.pages.num_free[self.group.rank()]
            return {
                "exchanges": self.links.num_exchanges / self.steps,
                "received_bytes": round(self.links.num_bytes / self.steps),
                "kv_bytes": used * PAGE_SIZE * row,
            }
        rows = self.k.shape[2]
        if way == "gathered":
            received = rows // NUM_RANKS * (NUM_RANKS - 1) * row
            return {"exchanges": 1.0, "received_bytes": received, "kv_bytes": self.part.shape[3] * row}
        return {"exchanges": 0.0, "received_bytes": 0, "kv_bytes": rows * row}


def steps_on(rank: int, file: str, lengths: Sequence[int], turns: int, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=NUM_RANKS)
    group = dist.group.WORLD
    assert group is not None
    for length in lengths:
        for name, window in WINDOWS.items():
            layer = Layer(group, length, window, turns)
            ways = {"pages": layer.by_pages, "gathered": layer.gathered, "whole": layer.whole}
            best, difference = dict.fromkeys(ways, float("inf")), 0.0
            for turn in range(turns + 1):
                outs = {}
                for way, attend in ways.items():
                    dist.barrier(group)
                    began = time.perf_counter()
                    count = 1 if way == "gathered" else STEPS  # it takes long
                    outs[way] = torch.cat([attend(turn * STEPS + step) for step in range(count)])
                    seconds = torch.tensor((time.perf_counter() - began) / count)
                    dist.all_reduce(seconds, dist.ReduceOp.MAX, group=group)
                    if turn:  # the first warms up
                        best[way] = min(best[way], seconds.item())
                difference = max(
                    difference, *((out - outs["whole"][: len(out)]).abs().max().item() for out in outs.values())
                )
            assert difference < 1e-5, f"{name}, {length} tokens: the ways differ by {difference}"
            found: list[Any] = [None] * NUM_RANKS
            dist.all_gather_object(found, {way: layer.record(way) for way in ways}, group=group)
            for way in ways if rank == 0 else ():
                most = {key: max(one[way][key] for one in found) for key in found[0][way]}
                queue.put({"tokens": length, "mask": name, "way": way, "ms": round(1e3 * best[way], 3), **most})
    if rank == 0:
        queue.put(None)
    dist.destroy_process_group()


def measured_steps(lengths: Sequence[int], turns: int) -> list[dict[str, Any]]:
    """A row for each length, mask and way; of memory and messages the most of any rank."""
    context, rows = multiprocessing.get_context("spawn"), []
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        arguments = f"{folder}/group", lengths, turns, queue
        ranks = [context.Process(target=steps_on, args=(rank, *arguments), daemon=True) for rank in range(NUM_RANKS)]
        for rank in ranks:
            rank.start()
        print(
            f"{'mask':12} {'tokens':>6} {'way':9} {'ms a step':>9} {'exchanges':>11} {'received':>11} {'K/V held':>9}"
        )
        while True:
            try:
                row = queue.get(timeout=5)
            except Empty:
                if any(rank.exitcode for rank in ranks):
                    raise SystemExit("a rank failed; see above") from None
                continue
            if row is None:
                break
            rows.append(row)
            print(
                f"{row['mask']:12} {row['tokens']:6} {row['way']:9} {row['ms']:9.3f} {row['exchanges']:11.2f}"
                f" {row['received_bytes'] / 2**10:7.1f} KiB {row['kv_bytes'] / 2**20:5.1f} MiB",
                flush=True,
            )
        for rank in ranks:
            rank.join()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--planning", action="store_true")
    what.add_argument("--steps", action="store_true")
    what.add_argument("--travel", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of --steps: tokens that are kept")
    parser.add_argument("--repeats", type=int, help="plans, 15 if None; turns of each way, 3 if None")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes: dict[str, Any] = {"page_size": PAGE_SIZE}
    if arguments.steps:
        rows = measured_steps(arguments.lengths, arguments.repeats or 3)
        sizes |= {"ranks": NUM_RANKS, "heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM, "dtype": "float32"}
        sizes |= {"cpu": _cpu(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    elif arguments.travel:
        rows = travel()
        sizes |= {"ranks": TRAVEL_RANKS, "heads": 64, "kv_heads": 8, "dim": 128, "dtype": "bfloat16"}
    else:
        rows = measured_planning(arguments.repeats or 15)
        sizes |= {"horizon": HORIZON}
    if arguments.out:
        way = "--steps" if arguments.steps else "--travel" if arguments.travel else "--planning"
        command = f"python benchmarks/decode.py {way}"
        found = {"command": command, "torch": torch.__version__, "python": platform.python_version()}
        found |= {"machine": platform.machine(), **sizes, "rows": rows}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def measured_planning(repeats: int) -> list[dict[str, Any]]:
    rows = []
    print(f"{'mask':18} {'shape':9} ranks   runs  plan, ms  plan, us/token  steps, us/token  torch, us/token")
    for shape in SHAPES:
        for name in MASKS:
            of_torch = round(torch_us_a_token(name, shape), 1)
            for world_size in (1, 4):
                row = planning(name, shape, world_size, repeats) | {"torch_us_a_token": of_torch}
                rows.append(row)
                print(
                    f"{name:18} {shape:9} {world_size:5} {row['runs']:6} {row['plan_ms']:9.3f}"
                    f" {row['plan_us_a_token']:14.2f} {row['steps_us_a_token']:16.2f} {of_torch:16.1f}",
                    flush=True,
                )
    return rows


if __name__ == "__main__":
    main()

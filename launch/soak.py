"""Load: thousands of steps, each with other documents, lengths, masks, score_mods and plans, and nothing may pile up.

    python launch/soak.py                       # 2,000 steps on 4 gloo ranks; writes benchmarks/results/soak.json
    python launch/soak.py --steps 200           # a short one

Plans are made in a worker of the data loader and travel to the trainer as bytes; every tenth step has two of them in
flight. Each rank counts its memory, handles, traced score_mods, plans, file descriptors and threads. After a quarter of
the steps all counts must be flat, and memory too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import cpflex
import ranks
from cpflex.ring import handles, operator

RANKS = 4
EVERY = 25
"""Steps between two counts."""

GROWTH_BYTES = 16 << 20
"""What the median memory of the last quarter may be above that of the second; a plan kept each step would be more."""

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "soak.json"
LAYOUTS = (cpflex.balanced, cpflex.zigzag, cpflex.striped, cpflex.contiguous)
SCHEDULES = (cpflex.auto, cpflex.ring, cpflex.direct)


@dataclass(frozen=True)
class Count:
    """What a rank holds after a step."""

    step: int
    rss_bytes: int
    handles: int
    score_mods: int
    plans: int
    file_descriptors: int
    threads: int


@dataclass(frozen=True)
class Plans(Dataset[tuple[int, cpflex.Plan]]):
    """The plan of each step for one rank: documents, length, window, layout and schedule drawn by the step's number."""

    longest: int
    rank: int
    world_size: int

    def __getitem__(self, step: int) -> tuple[int, cpflex.Plan]:
        draw = random.Random(step)
        seq_len = draw.randint(1, self.longest)
        cuts = sorted({0, seq_len, *(draw.randint(0, seq_len) for _ in range(draw.randint(0, 20)))})
        document = cpflex.document(cu_seqlens=cuts) & cpflex.causal()
        masks = {"full": document, "sliding": document & cpflex.sliding_window(draw.randint(1, 300))}
        where = {"rank": self.rank, "world_size": self.world_size}
        how = {"layout": draw.choice(LAYOUTS), "schedule": draw.choice(SCHEDULES)}
        return step, cpflex.make_plan(masks, seq_len, **where, **how)


def main() -> None:
    options = parse_options(sys.argv[1:])
    if ranks.started():
        with ranks.joined("cpu") as (group, _):
            soak(options, group)
    else:
        ranks.start(__file__, sys.argv[1:], num_ranks=options.ranks, device_type="cpu")


def soak(options: argparse.Namespace, group: dist.ProcessGroup) -> None:
    torch.set_num_threads(1)
    plans = Plans(options.seq_len, group.rank(), group.size())
    loader = DataLoader(plans, batch_size=None, sampler=range(options.steps), num_workers=1)
    counts, began = [], time.monotonic()
    in_flight: list[Tensor] = []  # losses of the step before, with its plan
    for step, plan in loader:
        losses = in_flight + attend(plan.bind(group), step)
        in_flight = losses if step % 10 == 0 else []
        if not in_flight:
            torch.stack(losses).sum().backward()
        del losses, plan
        if step % EVERY == EVERY - 1:
            counts.append(count(step))
            show(counts[-1], options.steps, began, group.rank())
    everybody: list[Any] = [None] * group.size()
    dist.all_gather_object(everybody, counts, group=group)
    problems = [f"rank {rank}: {problem}" for rank, mine in enumerate(everybody) for problem in piled_up(mine)]
    if group.rank() == 0:
        write(options, everybody, problems, time.monotonic() - began)
        print("\n".join(problems) or "nothing piled up")
    if problems:
        raise SystemExit(1)


def attend(plan: cpflex.Plan, step: int) -> list[Tensor]:
    """One call in each kind of layer, with a score_mod that was never seen before."""
    bias = torch.randn(4, 17, generator=torch.Generator().manual_seed(step), requires_grad=True)
    losses = []
    for kind in plan.kinds:
        q, k, v = (torch.randn(1, heads, plan.local_len, 16, requires_grad=True) for heads in (4, 2, 2))
        cap = 10.0 + step + len(kind)  # a number of its own: another graph

        def score_mod(score, b, h, q_idx, kv_idx, cap=cap):
            return cap * torch.tanh(score / cap) + bias[h, (q_idx - kv_idx).clamp(0, 16)]

        out = cpflex.flex_attention(q, k, v, score_mod, plan[kind], enable_gqa=True)
        assert isinstance(out, Tensor)
        losses.append(out.square().mean())
    return losses


def count(step: int) -> Count:
    gc.collect()
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Count(
        step,
        resident_pages * os.sysconf("SC_PAGE_SIZE"),
        len(handles._objects),
        len(operator._score_mods),
        sum(type(thing) is cpflex.Plan for thing in gc.get_objects()),
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )


def piled_up(counts: list[Count]) -> list[str]:
    """What was more after a quarter of the steps than before."""
    quarter = len(counts) // 4
    early, late = counts[quarter : 2 * quarter], counts[-quarter:]
    problems = []
    for name in ("handles", "score_mods", "plans", "file_descriptors", "threads"):
        before, after = (max(getattr(one, name) for one in part) for part in (early, late))
        if after > before:
            problems.append(f"{name} rose from {before} to {after}")
    before, after = (statistics.median(one.rss_bytes for one in part) for part in (early, late))
    if after > before + GROWTH_BYTES:
        problems.append(f"memory rose from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
    return problems


def show(counted: Count, num_steps: int, began: float, rank: int) -> None:
    if rank == 0:
        facts = {name: value for name, value in asdict(counted).items() if name not in ("step", "rss_bytes")}
        said = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in facts.items())
        rate = (counted.step + 1) / (time.monotonic() - began)
        memory = f"{counted.rss_bytes / 2**20:.0f} MiB"
        print(f"step {counted.step + 1:5} of {num_steps}: {memory}, {said}; {rate:.1f} steps/s", flush=True)


def write(options: argparse.Namespace, everybody: list[list[Count]], problems: list[str], seconds: float) -> None:
    record = {
        "command": f"python launch/soak.py --steps {options.steps} --ranks {options.ranks} --seq-len {options.seq_len}",
        "versions": {"cpflex": cpflex.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
        "seconds": round(seconds, 1),
        "problems": problems,
        "ranks": [[asdict(one) for one in mine] for mine in everybody],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record) + "\n")
    print(f"wrote {options.out}")


def parse_options(arguments: list[str]) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000, help="steps, each with a plan of its own (default: 2000)")
    parser.add_argument("--ranks", type=int, default=RANKS, help="gloo processes (default: 4)")
    parser.add_argument("--seq-len", type=int, default=1500, help="the longest sequence (default: 1500)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record (default: benchmarks/results/soak.json)")
    options = parser.parse_args(arguments)
    if options.steps < 8 * EVERY:
        parser.error(f"--steps must be at least {8 * EVERY}, for the counts to be compared; got {options.steps}")
    return options


if __name__ == "__main__":
    main()

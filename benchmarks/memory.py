"""Peak memory of a rank in one training step of launch/train.py, by sequence length and number of ranks, on the CPU.

    python benchmarks/memory.py                                  4k to 64k tokens; writes results/memory.json
    python benchmarks/memory.py --seq-lens 1024 --ranks 1 2      a quick look

The model and the text are those of `make train`: four layers of width 128, fp32, sources of Python's standard library,
packed, but in documents of at most 1024 tokens. A figure is what a step adds to the resident memory of a rank that has
its model and has made a small step before; the largest of the ranks. Gloo ranks, each measured in a fresh process,
without and with activation checkpointing of each layer.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from sysconfig import get_path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.utils.checkpoint import checkpoint

import cpflex

sys.path.append(str(Path(__file__).parents[1] / "launch"))

from cpu_peers import machine
from data import Corpus, text_files
from model import Shape, Transformer
from step import loss_and_gradients
from trainee import BuiltIn

SHAPE = Shape(vocab_size=256, num_layers=4, dim=128, num_heads=4, num_kv_heads=2)
WINDOW = 256
LONGEST = 1024
"""Tokens of a document: short, so that a CPU is done in time. What a rank holds does not depend on it."""
SETTING = f"{SHAPE}, window {WINDOW}, documents of at most {LONGEST} tokens, one thread a rank"
WARM_UP_LEN = 256
NAMES = ("plain_mb", "checkpointed_mb")
"""Without and with activation checkpointing."""


def activation_bytes(shape: Shape) -> int:
    """Of a token without checkpointing: what the layers of model.py save for backward, and the logits."""
    kv_dim = shape.dim // shape.num_heads * shape.num_kv_heads
    # two norms: input, output; q, out, out by token; relu and its square, of width 4 dim each; k, v
    layer = (4 + 3 + 8) * shape.dim + 2 * kv_dim + shape.num_heads
    logits = 3 * shape.vocab_size  # logits, their log-softmax, its gradient
    return 4 * (shape.num_layers * layer + logits)


def measure(seq_len: int, num_ranks: int, name: str) -> float:
    """MB that a step adds, of the rank that needs most."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (seq_len, num_ranks, name, folder), num_ranks)
        return float((Path(folder) / "mb").read_text())


def _rank(rank: int, seq_len: int, num_ranks: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=num_ranks)
    group, files = dist.group.WORLD, text_files(Path(get_path("stdlib")))
    torch.manual_seed(0)
    trainee = BuiltIn(Transformer(SHAPE), WINDOW)
    if name == "checkpointed_mb":
        for layer in trainee.model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

    def step(length: int) -> None:
        sample = Corpus(files, length, seed=0, longest=LONGEST)[0]
        plan = trainee.planner(sample.cu_seqlens, group=group)
        loss_and_gradients(trainee, sample, plan, group, torch.device("cpu"))

    step(WARM_UP_LEN)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = peak_mb()
    step(seq_len)
    added: list[Any] = [None] * num_ranks
    dist.all_gather_object(added, peak_mb() - before)
    if rank == 0:
        (Path(folder) / "mb").write_text(str(max(added)))
    dist.destroy_process_group()


def peak_mb() -> float:
    """The most that has been resident in this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024 / 1e6


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: a line for each length, a column for each number of ranks; with checkpointing after the slash."""
    seq_lens, ranks = (sorted({row[key] for row in rows}) for key in ("seq_len", "ranks"))
    cells = {(row["seq_len"], row["ranks"]): " / ".join(f"{row[name]:.0f} MB" for name in NAMES) for row in rows}
    header = ["tokens", *(f"{n} rank{'s' * (n > 1)}" for n in ranks)]
    lines = [header, ["---"] * len(header), *([f"{s:,}", *(cells[s, n] for n in ranks)] for s in seq_lens)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seq-lens", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536], help="(4k to 64k)"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="(1 2 4)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # tensors that are freed leave the resident memory at once
    described, rows = machine(), []
    for seq_len, num_ranks in itertools.product(options.seq_lens, options.ranks):
        figures = {name: measure(seq_len, num_ranks, name) for name in NAMES}
        rows.append({"seq_len": seq_len, "ranks": num_ranks, **figures})
        print(rows[-1], flush=True)
    print(f"\nwithout / with activation checkpointing\n{table(rows)}")
    print(f"\nby the formula, layers and logits: {activation_bytes(SHAPE):,} bytes a token without checkpointing")
    record = {
        "command": "python " + " ".join(["benchmarks/memory.py", *sys.argv[1:]]),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cpflex": cpflex.__version__},
        "machine": described,
        "setting": SETTING,
        "activation_bytes_per_token": activation_bytes(SHAPE),
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

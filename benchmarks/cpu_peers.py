"""cpflex beside torch's own context-parallel FlexAttention: forward and backward on two gloo ranks of a CPU.

    python benchmarks/cpu_peers.py                               16384 tokens; writes results/cpu_peers.json
    python benchmarks/cpu_peers.py --seq-len 2048 --repeats 1    a quick look

Both get the same tokens and documents, and their results are compared before any time is shown. They take turns, each
time in fresh processes among which the cores are split evenly; a time is the slower rank's, and the best of the turns
counts. torch runs eager, the only way in which it can train on a CPU, with its device check taken out, under the load
balancer that suits each mask best, and with compiled block masks.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import cpflex
from documents import draw_documents

NUM_RANKS = 2
RESULTS = ("out", "dq", "dk", "dv")
STAGES = ("first_plan_s", "plan_s", "forward_s", "backward_s")
TOLERANCE = 1e-4
"""Between results of the two, absolute; gradients of 16k tokens differ by some 1e-5 in fp32."""


class Tokens(NamedTuple):
    """The whole sequence, equal on every rank."""

    q: Tensor  # [B, H, S, D]
    k: Tensor  # [B, H, S, D]
    v: Tensor  # [B, H, S, D]
    grad_out: Tensor  # [B, H, S, D]


class Planned(NamedTuple):
    """This rank's tokens, and what a peer does with them."""

    local: Tokens
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    unshard: Callable[[Tensor], Tensor]


PlanFn = Callable[[str, Tokens], Planned]


MASKS = ("documents", "causal")
"""Packed documents, causal in each; one document, causal."""


def plan_cpflex(mask: str, tokens: Tokens) -> Planned:
    """A plan with the default layout and schedule."""
    seq_len = tokens.q.shape[2]
    mask_mod = cpflex.causal()
    if mask == "documents":
        mask_mod = mask_mod & cpflex.document(cu_seqlens=draw_documents(seq_len, seed=0))
    plan = cpflex.make_plan(mask_mod, seq_len, dist.group.WORLD)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cpflex.flex_attention(q, k, v, block_mask=plan)  # type: ignore[return-value]

    local = Tokens(*(plan.shard(x, dim=2, pad_value=0.0) for x in tokens))
    return Planned(local, attend, lambda x: plan.unshard(x, dim=2))


def plan_torch(mask: str, tokens: Tokens) -> Planned:
    """torch's private context parallelism: K and V are all-gathered, then one local FlexAttention."""
    import torch.nn.attention.flex_attention as flex
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import _attention as cp
    from torch.distributed.tensor.parallel import parallelize_module

    flex._validate_device = lambda query, key, value: None  # it refuses backward on a CPU
    seq_len = tokens.q.shape[2]
    ids = torch.zeros(seq_len, dtype=torch.int64)
    if mask == "documents":
        lengths = torch.tensor(draw_documents(seq_len, seed=0)).diff()
        ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    masks = {
        "documents": lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (ids[q_idx] == ids[kv_idx]),
        "causal": lambda b, h, q_idx, kv_idx: kv_idx <= q_idx,
    }
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    block_mask = _compiled_create_block_mask()(masks[mask], None, None, seq_len, seq_len, "cpu")
    if mask == "causal":
        balancer = cp._HeadTailLoadBalancer(seq_len, NUM_RANKS, "cpu")
    else:
        balancer = cp._PTRRLoadBalancer(block_mask, NUM_RANKS)
    shards: list[Any] = cp._context_parallel_shard(mesh, [*tokens, block_mask], [2] * 5, balancer)
    *local, local_mask = shards
    style = cp._ContextParallel(seq_dim=2, attention_type=cp._ContextParallel.AttentionType.FLEX)
    attend = parallelize_module(_FlexAttention(), mesh, style)

    def unshard(x: Tensor) -> Tensor:
        return cp.context_parallel_unshard(mesh, [x], [2], balancer)[0]

    return Planned(Tokens(*local), lambda q, k, v: attend(q, k, v, block_mask=local_mask), unshard)


@functools.cache
def _compiled_create_block_mask() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=False)


class _FlexAttention(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(query, key, value, block_mask=block_mask)  # type: ignore[return-value]


PEERS: dict[str, PlanFn] = {"cpflex": plan_cpflex, "torch": plan_torch}


def missing() -> str:
    """What `plan_torch` needs and is not here; empty if nothing."""
    import torch.nn.attention.flex_attention as flex

    try:
        from torch.distributed.tensor.experimental import _attention as cp
    except ImportError as problem:
        return str(problem)
    private = [(cp, "_ContextParallel"), (cp, "_context_parallel_shard"), (cp, "context_parallel_unshard")]
    private += [(cp, "_HeadTailLoadBalancer"), (cp, "_PTRRLoadBalancer"), (flex, "_validate_device")]
    absent = [f"{module.__name__}.{name}" for module, name in private if not hasattr(module, name)]
    if not any(shutil.which(compiler) for compiler in ("g++", "clang++")):
        absent.append("a C++ compiler, for torch.compile")
    return ", ".join(absent)


# -- one turn of one peer, in processes of its own


def take_turn(peer: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Rows of figures, one for each mask, and the results, by "mask result"."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (peer, options, folder), NUM_RANKS)
        return torch.load(Path(folder) / "turn.pt")


def _rank(rank: int, peer: str, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // NUM_RANKS))
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=NUM_RANKS)
    torch.manual_seed(0)
    tokens = Tokens(*torch.randn(4, 1, options.heads, options.seq_len, options.head_dim))
    rows, results = [], {}
    for mask in options.masks:
        row, whole = measure(PEERS[peer], mask, tokens)
        rows.append({"peer": peer, "mask": mask, **row})
        results |= {f"{mask} {name}": x for name, x in zip(RESULTS, whole, strict=True)}
    if rank == 0:
        torch.save((rows, results), Path(folder) / "turn.pt")
    dist.destroy_process_group()


def measure(plan_fn: PlanFn, mask: str, tokens: Tokens) -> tuple[dict[str, Any], list[Tensor]]:
    """Seconds of each stage on the slower rank, peak memory of each rank, and the whole results.

    Plans twice, as a first batch and as any later one, and takes two steps, of which the faster counts.
    """
    _forget_peak()
    first_plan_s, _ = _timed(lambda: plan_fn(mask, tokens))
    plan_s, planned = _timed(lambda: plan_fn(mask, tokens))
    q, k, v, grad_out = (x.contiguous() for x in planned.local)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    steps, results = [], []
    for _ in range(2):
        forward_s, out = _timed(lambda: planned.attend(*leaves))
        backward_s, grads = _timed(lambda out=out: torch.autograd.grad(out, leaves, grad_out))
        steps.append((forward_s, backward_s))
        results = [out.detach(), *grads]
    own_peak, peaks = _peak_mb(), [None] * NUM_RANKS
    dist.all_gather_object(peaks, own_peak)
    seconds = dict(zip(STAGES, (first_plan_s, plan_s, *min(steps, key=sum)), strict=True))
    return {**seconds, "peak_mb": peaks}, [planned.unshard(x) for x in results]


def _timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the slower rank is done, and the result."""
    dist.barrier()
    start = time.perf_counter()
    result = fn()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item(), result


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024 / 1e6


# -- the comparison


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    return {name: (ours[name] - theirs[name]).abs().max().item() for name in ours}


def best(rows: list[dict[str, Any]], peer: str, mask: str) -> dict[str, Any]:
    """Of all turns: the least of each time, the greatest peak."""
    turns = [row for row in rows if (row["peer"], row["mask"]) == (peer, mask)]
    fastest = min(turns, key=lambda row: row["forward_s"] + row["backward_s"])
    plans = {stage: min(row[stage] for row in turns) for stage in ("first_plan_s", "plan_s")}
    total_s = fastest["forward_s"] + fastest["backward_s"]
    return fastest | plans | {"total_s": total_s, "peak_mb": max(max(row["peak_mb"]) for row in turns)}


def table(rows: list[dict[str, Any]], masks: Sequence[str]) -> tuple[str, dict[str, dict[str, float]]]:
    """The table, and the ratios cpflex / torch by mask."""
    columns = ("forward_s", "backward_s", "total_s", "plan_s", "first_plan_s", "peak_mb")
    names = ("forward", "backward", "total", "plan", "first plan", "peak/rank")
    lines = [f"{'':20}" + "".join(f"{name:>12}" for name in names)]
    ratios: dict[str, dict[str, float]] = {}
    for mask in masks:
        by_peer = {peer: best(rows, peer, mask) for peer in PEERS}
        for peer, row in by_peer.items():
            values = [f"{row[c]:10.0f}MB" if c == "peak_mb" else f"{row[c]:11.3f}s" for c in columns]
            lines.append(f"{mask:12}{peer:8}" + "".join(values))
        ratios[mask] = {c: by_peer["cpflex"][c] / by_peer["torch"][c] for c in columns}
        lines.append(f"{'':12}{'ratio':8}" + "".join(f"{ratio:12.3f}" for ratio in ratios[mask].values()))
    return "\n".join(lines), ratios


def machine() -> dict[str, Any]:
    described = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    model = next((line.split(":", 1)[1].strip() for line in described if line.startswith("model name")), "")
    return {"cpu": model or platform.processor(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=16384, help="a multiple of 256, torch's limit (%(default)s)")
    parser.add_argument("--heads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--head-dim", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS, help="(both)")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each peer (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_peers.json")
    options = parser.parse_args()
    if absent := missing():
        sys.exit(f"cpu_peers: torch {torch.__version__} is here without {absent}; the benchmark was written for 2.13")
    if options.seq_len % (128 * NUM_RANKS):
        parser.error(f"--seq-len must be a multiple of {128 * NUM_RANKS}, torch's limit; got {options.seq_len}")
    described = machine()
    rows: list[dict[str, Any]] = []
    results: dict[str, dict[str, Tensor]] = {}
    for _, peer in itertools.product(range(options.repeats), PEERS):
        turn, results[peer] = take_turn(peer, options)
        rows += turn
    apart = differences(results["cpflex"], results["torch"])
    print("greatest difference between the two: " + ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    if not max(apart.values()) <= TOLERANCE:
        sys.exit("cpu_peers: the two do not compute the same; times would mean nothing")
    text, ratios = table(rows, options.masks)
    print(text)
    record = {
        "command": "python " + " ".join(["benchmarks/cpu_peers.py", *sys.argv[1:]]),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cpflex": cpflex.__version__},
        "machine": described,
        "setting": f"{NUM_RANKS} gloo ranks, fp32, batch 1, {options.heads} heads, {options.seq_len} tokens, "
        f"head dim {options.head_dim}",
        "ratios": ratios,
        "differences": apart,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

"""The fused kernels on one GPU beside compiled FlexAttention, cuDNN and FlashAttention-2, forward and backward.

    python launch/bench.py kernels                      # all rows, under 8 minutes on an H200
    python launch/bench.py kernels --rows causal        # rows whose name contains "causal"

One process, random normal bf16. In each row the peers take turns, after a warm-up, and the median of the turns counts;
TFLOP/s count visible pairs only (4 * D a pair forward, 2.5 times that backward), so they compare peers in a row, not
rows. ``call`` is `cpflex.flex_attention` of one rank with its backward, ``kernel`` the kernels alone, ``hopper`` those
of sm_90 in Gluon. Results of cpflex and FlexAttention are compared before they are timed. Writes results/kernels.json
and a plot beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import cpflex
from documents import draw_documents

TOKENS = 32768
"""Batch * sequence of a row."""
HEADS = {64: 32, 128: 16, 256: 8}
WINDOW = 1024
ROUNDS = 5
ROUND_MS = 60
"""How long a peer runs in each of its turns, about."""

STAGES = ("forward", "backward")
DEVICE = "cuda"
RESULTS = Path(__file__).parent / "results" / "kernels.json"


class Row(NamedTuple):
    """One comparison."""

    mask: str
    score: str
    head_dim: int
    seq_len: int
    group_size: int = 1

    @property
    def name(self) -> str:
        sizes = f"D{self.head_dim} S{self.seq_len >> 10}k" + (f" GQA{self.group_size}" if self.group_size > 1 else "")
        return f"{self.mask if self.score == 'none' else self.score} {sizes}"

    @property
    def batch(self) -> int:
        return max(1, TOKENS // self.seq_len)


ROWS = [
    *(Row(mask, "none", 128, seq_len) for mask in ("full", "causal") for seq_len in (4096, 8192, 16384, 32768)),
    *(Row(mask, "none", 128, 16384) for mask in ("window", "doc_causal", "doc_window")),
    *(Row("doc_causal", "none", 128, seq_len) for seq_len in (4096, 32768)),
    *(Row("causal", score, 128, 16384) for score in ("softcap", "alibi")),
    *(Row(mask, "none", 64, 16384) for mask in ("full", "causal", "window", "doc_causal", "doc_window")),
    *(Row("causal", score, 64, 16384) for score in ("softcap", "alibi")),
]


# -- masks, scores and how many pairs are visible


def cuts_of(row: Row) -> list[int]:
    return draw_documents(row.seq_len, seed=0)


def mask_mod_of(row: Row) -> Callable:
    """For cpflex, on the CPU."""
    mask = cpflex.full() if row.mask == "full" else cpflex.causal()
    if "window" in row.mask:
        mask = mask & cpflex.sliding_window(WINDOW)
    return mask & cpflex.document(cu_seqlens=cuts_of(row)) if "doc" in row.mask else mask


def flex_mask_mod_of(row: Row) -> Callable | None:
    """For torch, on the GPU; None for no mask."""
    ids = torch.from_numpy(np.repeat(np.arange(len(cuts_of(row)) - 1), np.diff(cuts_of(row)))).to(DEVICE)
    mods = {
        "full": None,
        "causal": lambda b, h, q, k: q >= k,
        "window": lambda b, h, q, k: (q >= k) & (q - k < WINDOW),
        "doc_causal": lambda b, h, q, k: (q >= k) & (ids[q] == ids[k]),
        "doc_window": lambda b, h, q, k: (q >= k) & (q - k < WINDOW) & (ids[q] == ids[k]),
    }
    return mods[row.mask]


def score_mod_of(row: Row) -> Callable | None:
    slopes = 2.0 ** (-8.0 * torch.arange(1, HEADS[row.head_dim] + 1, device=DEVICE) / HEADS[row.head_dim])
    mods = {
        "none": None,
        "softcap": lambda score, b, h, q, k: 30.0 * torch.tanh(score / 30.0),
        "alibi": lambda score, b, h, q, k: score - slopes[h] * (q - k),
    }
    return mods[row.score]


def visible_pairs(row: Row) -> int:
    """Of one head."""
    if row.mask == "full":
        return row.seq_len**2
    cuts = np.array(cuts_of(row) if "doc" in row.mask else [0, row.seq_len])
    place = np.arange(row.seq_len) - np.repeat(cuts[:-1], np.diff(cuts))  # within the document
    seen = place + 1
    return int(np.minimum(seen, WINDOW).sum() if "window" in row.mask else seen.sum())


# -- peers: each makes a forward and a backward function of its tensors


class Peer(NamedTuple):
    """What is timed. ``backward`` is called after ``forward``, any number of times."""

    forward: Callable[[], Tensor]
    backward: Callable[[], Any]


def with_autograd(attend: Callable[[], Tensor], leaves: list[Tensor], grad_out: Tensor) -> Peer:
    kept = {}

    def forward() -> Tensor:
        kept["out"] = attend()
        return kept["out"]

    return Peer(forward, lambda: torch.autograd.grad(kept["out"], leaves, grad_out, retain_graph=True))


def cpflex_call(row: Row, leaves: list[Tensor], grad_out: Tensor) -> Peer:
    plan = cpflex.make_plan(mask_mod_of(row), row.seq_len)
    score_mod = score_mod_of(row)
    traced = None if score_mod is None else cpflex.score_mod(score_mod)

    def attend() -> Tensor:
        options = {"backend": "triton"}
        return cpflex.flex_attention(*leaves, traced, plan, enable_gqa=True, kernel_options=options)  # type: ignore[return-value]

    return with_autograd(attend, leaves, grad_out)


def cpflex_kernel(
    row: Row, leaves: list[Tensor], grad_out: Tensor, backend: str = "triton", deterministic: bool = True
) -> Peer:
    from cpflex.kernels import Call, attend_and_finish, attend_backward, begin_backward
    from cpflex.ring.handles import resolve

    mask, (step,), _ = resolve(cpflex.make_plan(mask_mod_of(row), row.seq_len).handle).on(grad_out.device)
    score_mod = score_mod_of(row)
    mod = None if score_mod is None else cpflex.score_mod(score_mod).mod
    options = {"backend": backend, "deterministic": deterministic}
    call = Call(mask, 1 / math.sqrt(row.head_dim), mod and mod.graph, mod.captured if mod else (), **options)
    q, k, v = (x.detach() for x in leaves)
    kept: dict[str, Tensor] = {"dq": torch.zeros_like(q)}

    def forward() -> Tensor:
        out, lse, _ = attend_and_finish(q, k, v, step.tile_mask, call, None)
        kept["lse"], kept["delta"] = begin_backward(out, grad_out, torch.zeros_like(lse), lse, call)
        return out

    def forward_alone() -> Tensor:
        return attend_and_finish(q, k, v, step.tile_mask, call, None)[0]

    def backward() -> Any:
        if "delta" not in kept:
            forward()
        return attend_backward(q, k, v, grad_out, kept["lse"], kept["delta"], step.tile_mask, call, kept["dq"], [])

    return Peer(forward_alone, backward)


def hopper_kernel(row: Row, leaves: list[Tensor], grad_out: Tensor) -> Peer | None:
    """Where `tuning.GLUON` has a row for this GPU; passes that have none are the portable ones."""
    from cpflex.kernels import tuning

    dims = leaves[0].shape[3], leaves[2].shape[3]
    if tuning.gluon_row("forward", grad_out.device, *dims, grad_out.dtype) is None:
        return None
    return cpflex_kernel(row, leaves, grad_out, "gluon")


def hopper_in_one_pass(row: Row, leaves: list[Tensor], grad_out: Tensor) -> Peer | None:
    """Whose backward makes dq in the pass of dk and dv."""
    from cpflex.kernels import tuning

    dims = leaves[0].shape[3], leaves[2].shape[3]
    if tuning.gluon_row("onepass", grad_out.device, *dims, grad_out.dtype) is None:
        return None
    return cpflex_kernel(row, leaves, grad_out, "gluon", deterministic=False)


def flex(row: Row, leaves: list[Tensor], grad_out: Tensor) -> Peer:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # else it falls back to eager, silently, after 8 rows
    mask_mod = flex_mask_mod_of(row)
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = None
    if mask_mod is not None:
        block_mask = torch.compile(create_block_mask)(mask_mod, None, None, row.seq_len, row.seq_len, device=DEVICE)
    score_mod = score_mod_of(row)
    options = {"score_mod": score_mod, "block_mask": block_mask, "enable_gqa": row.group_size > 1}
    return with_autograd(lambda: compiled(*leaves, **options), leaves, grad_out)


def sdpa(backend: str) -> Callable[[Row, list[Tensor], Tensor], Peer | None]:
    def peer(row: Row, leaves: list[Tensor], grad_out: Tensor) -> Peer | None:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        if row.mask not in ("full", "causal") or row.score != "none":
            return None

        def attend() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                q, k, v = leaves
                is_grouped = row.group_size > 1
                return scaled_dot_product_attention(q, k, v, is_causal=row.mask == "causal", enable_gqa=is_grouped)

        return with_autograd(attend, leaves, grad_out)

    return peer


PEERS: dict[str, Callable[[Row, list[Tensor], Tensor], Peer | None]] = {
    "kernel": cpflex_kernel,
    "hopper": hopper_kernel,
    "hopper_onepass": hopper_in_one_pass,
    "call": cpflex_call,
    "flex": flex,
    "cudnn": sdpa("CUDNN_ATTENTION"),
    "flash2": sdpa("FLASH_ATTENTION"),
}


# -- compiling


class Compilations:
    """Counts what Triton compiles for cpflex's kernels, and what it finds on disk."""

    def __init__(self) -> None:
        self.compiled = 0
        self.found = 0

    def __call__(self, *, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        self.found += cache_hit
        self.compiled += not cache_hit


@contextlib.contextmanager
def counted(compilations: Compilations) -> Iterator[None]:
    from triton import knobs

    knobs.compilation.listener = compilations
    try:
        yield
    finally:
        knobs.compilation.listener = None


def forget_kernels() -> None:
    """As in a new process: the next launch looks on disk."""
    from cpflex.kernels import backward, captured, forward

    for kernel in (forward.attend_kernel, backward.dq_kernel, backward.dkdv_kernel, captured.captured_kernel):
        kernel.device_caches.clear()


def first_calls(peer: Peer) -> dict[str, float]:
    """Seconds of the first forward and backward: compiled (``cold``), then loaded from disk (``warm``)."""
    found = {}
    for state in ("cold", "warm"):
        forget_kernels()
        for stage, fn in (("forward", peer.forward), ("backward", peer.backward)):
            begin = time.perf_counter()
            fn()
            torch.cuda.synchronize()
            found[f"{stage}_{state}_s"] = time.perf_counter() - begin
    return found


# -- timing


def time_once(fn: Callable[[], Any], repeats: int) -> float:
    """Milliseconds a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def interleaved(fns: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each, taking turns."""
    repeats = {}
    for name, fn in fns.items():
        fn()
        repeats[name] = max(2, math.ceil(ROUND_MS / max(time_once(fn, 2), 1e-3)))
    turns: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(ROUNDS):
        for name, fn in fns.items():
            turns[name].append(time_once(fn, repeats[name]))
    return {name: statistics.median(times) for name, times in turns.items()}


def measure(row: Row, compilations: Compilations) -> dict[str, Any]:
    """One row of the record."""
    torch.manual_seed(0)
    shape = (row.batch, HEADS[row.head_dim], row.seq_len, row.head_dim)
    of_keys = (row.batch, HEADS[row.head_dim] // row.group_size, *shape[2:])
    leaves = [
        torch.randn(x, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) for x in (shape, of_keys, of_keys)
    ]
    grad_out = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
    from triton.errors import TritonError

    record: dict[str, Any] = {"row": row.name, **row._asdict(), "batch": row.batch, "heads": shape[1], "failed": {}}
    peers = {}
    for name, make in PEERS.items():
        try:
            peer = make(row, leaves, grad_out)
            if peer is None:
                continue
            if name == "kernel":
                with counted(compilations):
                    record["first_call"] = first_calls(peer)
            peer.forward()
            peer.backward()
            peers[name] = peer
        except (RuntimeError, ValueError, NotImplementedError, TritonError) as error:
            record["failed"][name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if {"call", "flex"} <= peers.keys():
        record["difference_to_flex"] = differences(peers["call"], peers["flex"])
    flops = 4 * visible_pairs(row) * row.head_dim * row.batch * shape[1]
    for stage, factor in (("forward", 1.0), ("backward", 2.5)):
        times = interleaved({name: getattr(peer, stage) for name, peer in peers.items()})
        record[f"{stage}_ms"] = times
        record[f"{stage}_tflops"] = {name: factor * flops / ms / 1e9 for name, ms in times.items()}
        record[f"{stage}_vs_flex"] = {n: times["flex"] / ms for n, ms in times.items() if "flex" in times}
    return record


def differences(one: Peer, other: Peer) -> dict[str, float]:
    """Largest absolute difference of out, dq, dk, dv."""
    outs = [(peer.forward(), *peer.backward()) for peer in (one, other)]
    names = ("out", "dq", "dk", "dv")
    return {n: (a.float() - b.float()).abs().max().item() for n, a, b in zip(names, *outs, strict=True)}


# -- the record


def setting() -> dict[str, str]:
    import triton

    gpu = torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return {
        "gpu": gpu.name,
        "python": platform.python_version(),
        "cudnn": str(torch.backends.cudnn.version()),
        **versions,
    }


def gemm_tflops(size: int = 8192) -> float:
    """What a bf16 matrix product reaches in this run."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return 2 * size**3 / interleaved({"gemm": lambda: a @ b})["gemm"] / 1e9


def show(record: dict[str, Any]) -> None:
    for stage in STAGES:
        tflops, ratio = record[f"{stage}_tflops"], record[f"{stage}_vs_flex"]
        cells = [f"{tflops[n]:5.0f} ({ratio.get(n, math.nan):4.2f}x)" if n in tflops else " " * 13 for n in PEERS]
        print(f"{record['row']:22}{stage:10}{'  '.join(cells)}", flush=True)
    for name, why in record["failed"].items():
        print(f"{record['row']:22}{name} failed: {why}", flush=True)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: install matplotlib")
        return
    figure, axes = plt.subplots(2, 1, figsize=(max(8, len(records) * 0.9), 8), sharex=True, layout="constrained")
    width = 0.8 / len(PEERS)
    for axis, stage in zip(axes, STAGES, strict=True):
        for i, peer in enumerate(PEERS):
            heights = [record[f"{stage}_tflops"].get(peer, 0.0) for record in records]
            axis.bar([x + i * width for x in range(len(records))], heights, width, label=peer)
        axis.set_ylabel(f"{stage}, TFLOP/s of visible pairs")
    axes[0].legend(ncols=len(PEERS))
    axes[1].set_xticks([x + 0.4 for x in range(len(records))], [r["row"] for r in records], rotation=60, ha="right")
    figure.savefig(path, dpi=150)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py kernels", description="The fused kernels on one GPU beside their peers."
    )
    parser.add_argument("--rows", default="", help="only rows whose name contains this, such as 'causal D128'")
    parser.add_argument("--seconds", type=float, default=420, help="begin no row after this long")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record; the plot is written beside it")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    rows = [row for row in ROWS if options.rows in row.name]
    if not rows:
        raise SystemExit(f"no row is named like {options.rows!r}; there are: {', '.join(row.name for row in ROWS)}")
    if not torch.cuda.is_available():
        raise SystemExit("the kernels are timed on a CUDA GPU, and there is none here; nothing was measured")
    begin = time.perf_counter()
    compilations = Compilations()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # empty, so that first calls compile
        record: dict[str, Any] = {"setting": setting(), "gemm_tflops": gemm_tflops(), "rows": []}
        print(f"{record['setting']}\n8192^3 bf16 product: {record['gemm_tflops']:.0f} TFLOP/s")
        print(f"{'':32}{'  '.join(f'{name:13}' for name in PEERS)} TFLOP/s (and speed beside flex)")
        for row in rows:
            if time.perf_counter() - begin > options.seconds:
                record["left_out"] = [r.name for r in rows[rows.index(row) :]]
                print(f"{options.seconds:.0f} s are over; left out: {', '.join(record['left_out'])}")
                break
            record["rows"].append(measure(row, compilations))
            show(record["rows"][-1])
            torch.cuda.empty_cache()
    record |= {"compiled_variants": compilations.compiled, "found_on_disk": compilations.found}
    report_compilations(record)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    plot(record["rows"], options.out.with_suffix(".png"))
    print(f"{time.perf_counter() - begin:.0f} s; wrote {options.out}")


def report_compilations(record: dict[str, Any]) -> None:
    print(f"compiled {record['compiled_variants']} variants; found on disk {record['found_on_disk']}")
    first_calls = [row["first_call"] for row in record["rows"] if "first_call" in row]
    for state in ("cold", "warm"):
        worst = [max((call[f"{stage}_{state}_s"] for call in first_calls), default=0) for stage in STAGES]
        print(f"longest first call, {state}: forward {worst[0]:.2f} s, backward {worst[1]:.2f} s")


if __name__ == "__main__":
    main()

"""The fused kernels of pages on one GPU beside FlexAttention with torch's PagedAttention, FlashInfer, and a copy.

    python launch/bench.py decode_kernel                       # all rows, some minutes
    python launch/bench.py decode_kernel --rows "causal p64"   # rows whose name contains this

One new token of each sequence, random normal bf16, keys in pages. What a step costs is the bytes of the keys and values
that it must read: GB/s count those of visible keys, once for all query heads of a group, the same for all peers, and
are compared with a copy within the device (read and written bytes), of which 80 % are the goal. Peers take turns, after
a warm-up. ``kernel`` are the two launches alone, ``call`` is `cpflex.flex_attention` of one rank. Results of peers are
compared with those of ``kernel`` before they are timed. Writes results/decode_kernel.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cpflex
from cpflex.kernels import Call, attend_pages, combine, empty_partials
from cpflex.mods.trace import trace_mask_mod, trace_score_mod

# B sequences, L tokens of each, Hq query heads, H heads of keys and values, D head dim, R rows of the pool

TOKENS = 1 << 19
"""Of all sequences, at most."""
LONGEST = 1 << 17
HEADS = (32, 8)
HEAD_DIM = 128
WINDOW, SINKS = 4096, 4
GOAL = 0.8
DEVICE = "cuda"
RESULTS = Path(__file__).parent / "results" / "decode_kernel.json"


class Row(NamedTuple):
    """One comparison."""

    mask: str
    page_size: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.mask} p{self.page_size} B{self.batch} L{self.length}"

    @property
    def length(self) -> int:
        """Tokens of a sequence, the new one included; the last page is not full."""
        return min(LONGEST, TOKENS // self.batch) - 5


PAGE_SIZES, BATCHES = (16, 32, 64, 128), (1, 4, 16, 64)
ROWS = [
    *(Row("causal", page_size, batch) for page_size in (64, 16, 32, 128) for batch in BATCHES),
    *(Row(mask, 64, batch) for mask in ("window", "sinks", "alibi", "softcap") for batch in BATCHES),
    *(Row("window", page_size, 16) for page_size in (16, 32, 128)),
]


# -- masks and scores


def mask_of(row: Row) -> Callable[..., Tensor]:
    """Of positions of a sequence; for cpflex and for torch."""
    masks = {
        "window": lambda b, h, q, k: (k <= q) & (q - k < WINDOW),
        "sinks": lambda b, h, q, k: (k <= q) & ((q - k < WINDOW) | (k < SINKS)),
    }
    return masks.get(row.mask, lambda b, h, q, k: k <= q)


def score_of(row: Row) -> Callable[..., Tensor] | None:
    slopes = 2.0 ** (-8.0 * torch.arange(1, HEADS[0] + 1, device=DEVICE) / HEADS[0])
    mods = {
        "alibi": lambda score, b, h, q, k: score - slopes[h] * (q - k),
        "softcap": lambda score, b, h, q, k: 30.0 * torch.tanh(score / 30.0),
    }
    return mods.get(row.mask)


def visible_keys(row: Row) -> int:
    """Of one sequence."""
    seen = {"window": WINDOW, "sinks": WINDOW + SINKS}.get(row.mask, row.length)
    return min(row.length, seen)


def bytes_of(row: Row) -> int:
    """That must be read: K and V of visible keys."""
    return 2 * row.batch * visible_keys(row) * HEADS[1] * HEAD_DIM * 2


# -- peers: each makes a function of the same pages


class Problem(NamedTuple):
    """All but the last token of each sequence are kept; the step adds it."""

    q: Tensor  # [1, Hq, B, D]
    pool: Any  # k and v [1, H, R, D]
    plan: cpflex.DecodePlan
    slots: Tensor  # int64 [B, pages]: the pages of each sequence, in the pool


Attend = Callable[[], Tensor]
"""out [1, Hq, B, D]"""


def problem_of(row: Row) -> Problem:
    """Pages of all sequences, dealt in turns, so that neighbours in a sequence are none in the pool."""
    num_pages = -(-row.length // row.page_size)
    pages = cpflex.Pages(row.batch * num_pages, row.page_size)
    pool = pages.pool(HEADS[1], HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    for i in range(num_pages):
        for seq in torch.randperm(row.batch, generator=torch.Generator().manual_seed(i)).tolist():
            kept = pages.capacity(seq) if seq in pages else 0
            pages.reserve(seq, min(row.page_size, row.length - kept))
            pages.fill(seq, min(row.page_size, row.length - 1 - kept))
    for x in (pool.k, pool.v):
        x.normal_()
    plan = cpflex.make_decode_plan(cpflex.mask_mod(mask_of(row)), pages, dict.fromkeys(range(row.batch), 1), horizon=1)
    q, k, v = (torch.randn(1, h, row.batch, HEAD_DIM, device=DEVICE).bfloat16() for h in (HEADS[0], HEADS[1], HEADS[1]))
    pool.assign(k, v, plan)
    slots = torch.stack([torch.from_numpy(pages.held(seq).slot.astype("int64")) for seq in range(row.batch)])
    return Problem(q, pool, plan, slots.to(DEVICE))


def cpflex_call(row: Row, problem: Problem) -> Attend:
    q, pool, plan, _ = problem
    score_mod = score_of(row)
    traced = None if score_mod is None else cpflex.score_mod(score_mod)
    return lambda: cpflex.flex_attention(q, pool.k, pool.v, traced, plan, enable_gqa=True)  # type: ignore[return-value]


def cpflex_kernel(row: Row, problem: Problem) -> Attend:
    q, pool, plan, _ = problem
    score_mod = score_of(row)
    mod = None if score_mod is None else trace_score_mod(score_mod)
    captured = mod.captured if mod else ()
    call = Call(trace_mask_mod(mask_of(row)), 1 / math.sqrt(HEAD_DIM), mod and mod.graph, captured)
    work, parts = plan.work(q.device), plan.parts(q.device)
    partials = empty_partials(work.num_partials, HEADS[0], HEAD_DIM, q.device)
    into = empty_partials(row.batch, HEADS[0], HEAD_DIM, q.device)
    into = into._replace(out=torch.empty_like(into.out, dtype=q.dtype))

    def attend() -> Tensor:
        attend_pages(q, pool.k, pool.v, work, call, partials)
        return combine(partials, parts, into=into).out.movedim(0, 1).unsqueeze(0)

    return attend


def flex(row: Row, problem: Problem, compiled: bool = True) -> Attend:
    """With PagedAttention: its BlockMask is of the new token, at the end of its sequence."""
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # else it falls back to eager, silently, after 8 rows
    q, pool, _, slots = problem
    last, mask, score = row.length - 1, mask_of(row), score_of(row)
    paged = PagedAttention(pool.k.shape[2] // row.page_size, row.page_size, row.batch, device=DEVICE)
    paged.page_table[:, : slots.shape[1]] = slots
    logical = torch.arange(slots.shape[1], device=DEVICE).expand_as(slots)
    paged.physical_to_logical.scatter_(1, slots, logical)
    lengths = torch.full((row.batch,), row.length, device=DEVICE)
    block_mask = create_block_mask(
        lambda b, h, q, k: mask(b, h, q + last, k), row.batch, None, 1, row.length,
        device=DEVICE, BLOCK_SIZE=(128, row.page_size),
    )  # fmt: skip
    block_mask = paged.convert_logical_block_mask(block_mask, kv_len=lengths)
    score_mod = None
    if score is not None:
        score_mod = paged.get_score_mod(lambda s, b, h, q, k: score(s, b, h, q + last, k), lengths)
    attention = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    q = q.transpose(0, 2).contiguous()  # [B, Hq, 1, D]
    options = {"score_mod": score_mod, "block_mask": block_mask, "enable_gqa": True}
    return lambda: attention(q, pool.k, pool.v, **options).transpose(0, 2)


def flashinfer(row: Row, problem: Problem) -> Attend | None:
    if importlib.util.find_spec("flashinfer") is None or row.mask in ("sinks", "alibi"):
        return None
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper  # type: ignore[import-not-found]

    q, pool, _, slots = problem
    shape = (HEADS[1], -1, row.page_size, HEAD_DIM)
    caches = tuple(x.view(shape).permute(1, 2, 0, 3).contiguous() for x in (pool.k, pool.v))  # [pages, tokens, H, D]
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE), "NHD")
    bounds = torch.arange(row.batch + 1, dtype=torch.int32, device=DEVICE) * slots.shape[1]
    in_last_page = torch.full((row.batch,), (row.length - 1) % row.page_size + 1, dtype=torch.int32, device=DEVICE)
    wrapper.plan(
        bounds, slots.flatten().int(), in_last_page, *HEADS, HEAD_DIM, row.page_size,
        window_left=WINDOW - 1 if row.mask == "window" else -1, logits_soft_cap=30.0 if row.mask == "softcap" else 0.0,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    q = q[0].movedim(0, 1).contiguous()  # [B, Hq, D]
    return lambda: wrapper.run(q, caches).movedim(0, 1).unsqueeze(0)


PEERS: dict[str, Callable[[Row, Problem], Attend | None]] = {
    "kernel": cpflex_kernel,
    "call": cpflex_call,
    "flex": flex,
    "flashinfer": flashinfer,
}


# -- one row, and the record


def measure(row: Row, timed: Callable[[dict[str, Attend]], dict[str, float]], copy_gb_per_s: float) -> dict[str, Any]:
    """Microseconds and GB/s of each peer; how far its result is from that of ``kernel``, which comes first."""
    torch.manual_seed(0)
    problem = problem_of(row)
    record: dict[str, Any] = {"row": row.name, **row._asdict(), "length": row.length, "failed": {}, "differences": {}}
    attends: dict[str, Attend] = {}
    first: Tensor | None = None
    for name, make in PEERS.items():
        with _told(record["failed"], name):
            if (attend := make(row, problem)) is not None:
                out = attend()
                first = out.clone() if first is None else first
                record["differences"][name] = (out.float() - first.float()).abs().max().item()
                attends[name] = attend
    milliseconds = timed(attends)
    record["us"] = {name: 1e3 * ms for name, ms in milliseconds.items()}
    record["gb_per_s"] = {name: bytes_of(row) / ms / 1e6 for name, ms in milliseconds.items()}
    record["of_a_copy"] = {name: speed / copy_gb_per_s for name, speed in record["gb_per_s"].items()}
    return record


@contextlib.contextmanager
def _told(failed: dict[str, str], name: str) -> Iterator[None]:
    """A peer that cannot is no reason to stop."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a compiler, another package: anything may fail
        failed[name] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"


def copy_gb_per_s(timed: Callable[[dict[str, Attend]], dict[str, float]], size_bytes: int = 1 << 30) -> float:
    """Of a copy within the device: bytes read and bytes written."""
    source, target = (torch.empty(size_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * size_bytes / timed({"copy": lambda: target.copy_(source)})["copy"] / 1e6


def show(record: dict[str, Any]) -> None:
    cells = [
        f"{record['gb_per_s'][n]:5.0f} ({record['of_a_copy'][n]:4.0%})" if n in record["us"] else " " * 12
        for n in PEERS
    ]
    print(f"{record['row']:28}{'  '.join(cells)}", flush=True)
    for name, why in record["failed"].items():
        print(f"{record['row']:28}{name} failed: {why}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.py decode_kernel", description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", default="", help="only rows whose name contains this, such as 'causal p64'")
    parser.add_argument("--seconds", type=float, default=420, help="begin no row after this long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    rows = [row for row in ROWS if options.rows in row.name]
    if not rows:
        raise SystemExit(f"no row is named like {options.rows!r}; there are: {', '.join(row.name for row in ROWS)}")
    if not torch.cuda.is_available():
        raise SystemExit("the kernels are timed on a CUDA GPU, and there is none here; nothing was measured")
    from kernels import interleaved, setting

    began, speed = time.perf_counter(), copy_gb_per_s(interleaved)
    record: dict[str, Any] = {"setting": setting(), "copy_gb_per_s": speed, "rows": []}
    print(f"{record['setting']}\ncopy within the device: {speed:.0f} GB/s")
    print(f"{'':28}{'  '.join(f'{name:12}' for name in PEERS)} GB/s of visible keys (and of a copy)")
    for row in rows:
        if time.perf_counter() - began > options.seconds:
            record["left_out"] = [r.name for r in rows[rows.index(row) :]]
            print(f"{options.seconds:.0f} s are over; left out: {', '.join(record['left_out'])}")
            break
        record["rows"].append(measure(row, interleaved, speed))
        show(record["rows"][-1])
        torch.cuda.empty_cache()
    reached = [row["row"] for row in record["rows"] if row["of_a_copy"].get("kernel", 0.0) >= GOAL]
    print(f"{len(reached)} of {len(record['rows'])} rows reach {GOAL:.0%} of a copy")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

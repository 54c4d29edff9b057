"""What is checked on the pretended device, in a process of its own."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from pretended import Cuda, pretending
from torch import Tensor

import cpflex
from cpflex.kernels.launch import FUSED

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
Peers: Any = importlib.import_module("host").Peers


# -- the harness itself


@triton.jit
def scale_kernel(x_ptr, tables, out_ptr, count, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count) * tl.load(tables[0] + at, mask=at < count)
    tl.store(out_ptr + at, x * factor, mask=at < count)


@triton.jit
def product_kernel(x_ptr, y_ptr, out_ptr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    rows, cols = tl.arange(0, ROWS)[:, None] * SIZE, tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + rows + cols), tl.load(y_ptr + cols[:, None] * SIZE + cols)
    tl.store(out_ptr + rows + cols, tl.dot(x, y))


def check_copies() -> None:
    with pretending(90) as events:
        host, pinned = torch.arange(6.0), torch.arange(6.0).pin_memory()
        assert pinned.is_pinned() and not host.is_pinned()
        for seen, copy in [
            ("h2d", lambda: host.to("cuda")),
            ("h2d", lambda: host.cuda()),
            ("h2d", lambda: host.to("cuda", non_blocking=True)),  # from pageable memory
            ("h2d", lambda: torch.tensor([1.0, 2.0], device="cuda")),
            ("h2d", lambda: torch.zeros(6, device="cuda").copy_(host)),
            ("h2d_async", lambda: pinned.to("cuda", non_blocking=True)),
            ("h2d_async", lambda: torch.zeros(6, device="cuda").copy_(pinned[:6], non_blocking=True)),
            ("h2d_async", lambda: torch.empty(6, pin_memory=True).to("cuda", non_blocking=True)),
            ("h2d", lambda: pinned.to("cuda")),
            ("d2h", lambda: torch.zeros(6, device="cuda").cpu()),
            ("d2h", lambda: host.copy_(torch.zeros(6, device="cuda"))),
            ("d2h_async", lambda: torch.zeros(6, device="cuda").to("cpu", non_blocking=True)),
            ("h2d", lambda: torch.zeros(6, device="cuda")[torch.tensor([0, 1])]),
        ]:
            events.clear()
            copy()
            copies = [event.kind for event in events if event.kind.startswith(("h2d", "d2h"))]
            assert copies == [seen], f"{copies}, not {seen}"
        events.clear()
        moved = host.to("cuda")
        assert isinstance(moved, Cuda) and moved.is_cuda and moved.device == torch.device("cuda", 0)
        assert moved.to("cuda") is moved and moved.to("cuda:0") is moved
        assert events.counts() == {"h2d": 1, "allocation": 1} and events[0].detail == 24


def check_syncs() -> None:
    with pretending(90) as events:
        x = torch.arange(6.0, device="cuda")
        for wait in [
            lambda: x.sum().item(),
            lambda: bool((x > 2).any()),
            lambda: x[x > 2],
            lambda: torch.equal(x, x),
            lambda: torch.nonzero(x),
            lambda: torch.cuda.synchronize(),
            lambda: torch.cuda.Event().synchronize(),
        ]:
            events.clear()
            wait()
            assert events.count("sync") == 1, events
        events.clear()
        y = (x * 2 + 1).view(2, 3)[:, :2]
        assert [(event.kind, event.what) for event in events if event.kind != "allocation"] == [("operation", "mul"), ("operation", "add")]  # fmt: skip
        assert y.cpu().tolist() == [[1.0, 3.0], [7.0, 9.0]]


def check_mixed_devices() -> None:
    with pretending(90):
        x, number = torch.ones(3, device="cuda"), torch.tensor(2.0)
        assert (x * number).cpu().tolist() == [2.0, 2.0, 2.0]
        try:
            x * torch.ones(3)
        except RuntimeError as error:
            assert "same device" in str(error)
        else:
            raise AssertionError("operands on two devices were not refused")


def check_a_launch() -> None:
    with pretending(90) as events:
        x, table, out = (torch.ones(1000, device="cuda") for _ in range(3))
        scale_kernel[(8,)](x, (table,), out, 1008, 0.5, BLOCK=128, num_warps=2, **FUSED)
        (launch,) = events.launches
        assert (launch.name, launch.grid, launch.threads) == ("scale_kernel", (8, 1, 1), 64)
        addresses = {"x_ptr": x.data_ptr(), "tables[0]": table.data_ptr(), "out_ptr": out.data_ptr()}
        assert launch.arguments == {**addresses, "count": 1008, "factor": 0.5}
        assert events.variants == {"scale_kernel": 1}
        scale_kernel[(1,)](
            x, (table,), out, 1001, 0.5, BLOCK=128, num_warps=2, **FUSED
        )  # not a multiple of 16: another variant
        scale_kernel[(2,)](x, (table,), out, 1003, 0.5, BLOCK=128, num_warps=2, **FUSED)
        assert events.variants == {"scale_kernel": 2}
        assert [launch.arguments["count"] for launch in events.launches] == [1008, 1001, 1003]
    with pretending(90, compiles=False) as events:
        x = torch.ones(1000, device="cuda")
        scale_kernel.device_caches.clear()
        scale_kernel[(8,)](x, (x,), x, 1000, 0.5, BLOCK=128, num_warps=2, **FUSED)
        (launch,) = events.launches
        assert (launch.name, launch.grid, launch.threads) == ("scale_kernel", (8, 1, 1), 64)
        assert launch.arguments["x_ptr"] == x.data_ptr() and launch.arguments["count"] == 1000
        assert events.variants == {"scale_kernel": 1}
    scale_kernel.device_caches.clear()


def check_shared_memory() -> None:
    """An operand of 256 x 256 numbers of 2 bytes takes 128 KiB."""
    from triton.runtime.errors import OutOfResources

    for capability, fits in ((90, True), (86, False)):
        with pretending(capability) as events:
            x, out = (torch.ones(256, 256, device="cuda", dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
            try:
                product_kernel[(1,)](x, x, out, ROWS=64, SIZE=256, num_warps=8, **FUSED)
            except OutOfResources as error:
                assert not fits and "shared memory" in str(error) and str(99 << 10) in str(error)
            else:
                assert fits
            assert len(events.launches) == fits


def check_attention() -> None:
    """Forward and backward by torch's own autograd, one launch each; ranks as threads are on the device too."""
    from cpflex.testing import run_ranks

    def step(group: Any = None) -> list[Tensor]:
        plan = cpflex.make_plan(cpflex.causal(), 200, group)
        q, k, v = (torch.zeros(1, 2, plan.local_len, 16, dtype=torch.bfloat16, device="cuda").requires_grad_() for _ in "qkv")  # fmt: skip
        out = cpflex.flex_attention(q, k, v, block_mask=plan)
        assert isinstance(out, Cuda)
        out.sum().backward()
        assert q.grad is not None and q.grad.is_cuda and q.grad.shape == q.shape
        return []

    with pretending(90, compiles=False) as events:
        step()
        assert [launch.name for launch in events.launches] == [
            "attend_kernel",
            "delta_kernel",
            "dq_kernel",
            "dkdv_kernel",
        ]
        events.clear()
        run_ranks(step, 2)
        names = [launch.name for launch in events.launches]
        assert sorted(set(names)) == ["attend_kernel", "delta_kernel", "dkdv_kernel", "dq_kernel"]
        assert len(names) == 2 * (2 * 3 + 1)  # ranks, steps, kernels of each step; delta once


# -- budgets: what a call makes the host do


def call_counts(world_size: int, mask: str, moved: bool) -> dict[str, dict[str, int]]:
    """What the first and the second call of a fresh plan do, forward and backward; ``moved``: after ``plan.to("cuda")``,
    which has its own entry.
    """
    seq_len, rank = 1024 * world_size, world_size // 2
    cuts = [*range(0, seq_len, seq_len // 13), seq_len]
    masks = {"causal": cpflex.causal(), "documents": cpflex.document(cu_seqlens=cuts) & cpflex.causal()}
    with pretending(90, compiles=False) as events:
        x = torch.zeros(1, 1, 128, 16, dtype=torch.bfloat16, device="cuda").requires_grad_()
        first = cpflex.flex_attention(x, x, x, block_mask=cpflex.make_plan(cpflex.full(), 128))
        torch.autograd.grad(first, x, torch.zeros_like(x))  # what torch does once in a process is not counted
        links = Peers(rank, world_size)
        plan = cpflex.make_plan(masks[mask], seq_len, rank=rank, world_size=world_size)
        plan = plan.bind(links) if world_size > 1 else plan
        found = {}

        def take(name: str) -> None:
            found[name] = {k: n for k, n in events.counts().items() if k != "allocation"} | dict(links.said)
            events.clear()
            links.said.clear()

        heads = (4, 2, 2)
        q, k, v = (torch.zeros(1, h, plan.local_len, 16, dtype=torch.bfloat16, device="cuda").requires_grad_() for h in heads)  # fmt: skip
        grad_out = torch.zeros_like(q)
        events.clear()
        if moved:
            plan.to("cuda")
            take("to")
        for which in ("first", "second"):
            out = cpflex.flex_attention(q, k, v, block_mask=plan, enable_gqa=True)
            take(f"{which} forward")
            torch.autograd.grad(out, (q, k, v), grad_out)
            take(f"{which} backward")
    return found


# -- variants: what is compiled anew


def variants() -> dict[str, dict[str, int]]:
    """Variants of each kernel, all in all, after more and more training steps that differ in the ways that are named."""
    found: dict[str, dict[str, int]] = {}

    def masked(number: int) -> Callable:
        window, ids = torch.tensor(number), torch.arange(4096) // number
        return lambda b, h, q, k: (k <= q) & (q - k < number) & (k > q - window) & (ids[q] == ids[k])

    def scored(number: float, length: int) -> Callable:
        table = torch.zeros(2 * length + 1, device="cuda").requires_grad_()
        return lambda s, b, h, q, k: number * torch.tanh(s / number) + number * table[(q - k).clamp(-length, length)]

    def step(
        name: str, length: int = 256, number: int = 64, table: int = 16, batch: int = 1, heads: int = 2, ranks: int = 1,
        dim: int = 64, dtype: torch.dtype = torch.bfloat16, layout: Any = cpflex.zigzag, shift: int = 0, stride: int = 0,
        score_mod: bool = True,
    ) -> None:  # fmt: skip
        plan = cpflex.make_plan(masked(number), length, rank=ranks // 2, world_size=ranks, layout=layout)
        plan = plan if ranks == 1 else plan.bind(Peers(ranks // 2, ranks))
        rows, whole = batch * heads * plan.local_len, dim + stride
        flat = [torch.zeros(rows * whole + shift, dtype=dtype, device="cuda")[shift:] for _ in "qkv"]
        q, k, v = (x.view(batch, heads, -1, whole)[..., :dim].requires_grad_() for x in flat)
        out = cpflex.flex_attention(q, k, v, scored(float(number), table) if score_mod else None, plan)
        torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
        found[name] = dict(events.variants)

    with pretending(90, compiles=False) as events:
        step("one")
        step("length", length=261)
        step("length of 1", length=1)
        step("batch", batch=3)
        step("heads", heads=16)
        step("numbers", number=1)
        step("other numbers", number=48)
        step("table", table=1)
        step("an odd table", table=7)
        step("a place that is no multiple of 16 bytes", shift=1)
        step("rows that are no multiple of 16 bytes", stride=1)
        step("rows apart", stride=8)
        step("a layout", layout=cpflex.striped)
        step("ranks", ranks=4)
        step("more ranks", ranks=8, length=2048)
        step("a layout of ranks", ranks=4, layout=cpflex.contiguous)
        step("a dtype", dtype=torch.float16)
        step("a head dim", dim=128)
        step("a head dim of half units", dim=20)
        step("half units elsewhere", dim=20, shift=1, stride=4)
        step("a mod", score_mod=False)
    return found


# -- launches: does the chip have the shared memory?

CAPABILITIES = (80, 86, 90, 100)
HEAD_DIMS = (64, 128, 256)
NUM_TABLES = {"none": 0, "bias": 1, "pair_bias": 1, "dense_mask": 1, "two_biases": 2, "mask_and_two_biases": 3, "three_biases": 3}  # fmt: skip
"""Mods, and how many tables they read at (q, kv)."""


def launch_failure(capability: int, head_dim: int, mods: str) -> str:
    """Why a training step does not launch on a chip; "" if it does."""
    from triton.runtime.errors import OutOfResources

    seq_len = 256
    allowed, pairs, by_distance = torch.ones(seq_len, seq_len, dtype=torch.bool), torch.zeros(seq_len, seq_len), torch.zeros(3, 4, 129)  # fmt: skip
    with pretending(capability) as events:
        pairs, tables = pairs.to("cuda"), [x.to("cuda") for x in by_distance.unbind()]

        def biased(count: int) -> Callable:
            def score_mod(score, b, h, q, k):
                return score + sum(table[h, (q - k - i).clamp(0, 128)] for i, table in enumerate(tables[:count]))

            return score_mod

        count = NUM_TABLES[mods] - (mods == "mask_and_two_biases")
        score_mod = None if mods in ("none", "dense_mask") else biased(count)
        score_mod = (lambda score, b, h, q, k: score + pairs[q, k]) if mods == "pair_bias" else score_mod
        mask_mod = (lambda b, h, q, k: allowed[q, k]) if "mask" in mods else cpflex.causal()
        plan = cpflex.make_plan(mask_mod, seq_len)
        q, k, v = (torch.zeros(1, h, seq_len, head_dim, dtype=torch.bfloat16, device="cuda").requires_grad_() for h in (4, 2, 2))  # fmt: skip
        try:
            out = cpflex.flex_attention(q, k, v, score_mod, plan, enable_gqa=True)
            torch.autograd.grad(out, (q, k, v), torch.zeros_like(q))
        except OutOfResources as error:
            return f"{len(events.launches)} launches, then: {error}"
        names = [launch.name for launch in events.launches]
        assert {"attend_kernel", "dq_kernel", "dkdv_kernel"} <= set(names), names
        return ""


def check_a_smaller_row() -> None:
    """By the rows of a larger chip: chosen openly, once for all calls of a kind."""
    from cpflex.kernels import fitting, tuning

    def step(seq_len: int) -> None:
        plan = cpflex.make_plan(cpflex.causal(), seq_len)
        q = torch.zeros(1, 2, seq_len, 128, dtype=torch.bfloat16, device="cuda").requires_grad_()
        torch.autograd.grad(cpflex.flex_attention(q, q, q, block_mask=plan), q, torch.zeros_like(q))

    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    fitting.log.addHandler(handler)
    with mock.patch.object(tuning, "rows_for", return_value=tuning.SM90), pretending(86) as events:
        step(256)
        assert {launch.name for launch in events.launches} >= {"attend_kernel", "dq_kernel", "dkdv_kernel"}
        assert all(launch.shared_bytes <= 99 << 10 for launch in events.launches)
        words = [record.getMessage() for record in said]
        assert {"dq", "dkdv"} <= {word.split()[0] for word in words} and all("cuda:0 has 99;" in word for word in words)
        compiled = dict(events.variants)
        step(512)
        assert len(said) == len(words) and events.variants == compiled
    fitting.log.removeHandler(handler)


def check_refusal_before_sending() -> None:
    from cpflex.kernels import fitting

    with pretending(90, compiles=False), mock.patch.object(fitting, "shared_memory", return_value=-1):
        links = Peers(1, 4)
        plan = cpflex.make_plan(cpflex.causal(), 1024, rank=1, world_size=4).bind(links)
        q = torch.zeros(1, 2, plan.local_len, 32, dtype=torch.bfloat16, device="cuda")
        try:
            cpflex.flex_attention(q, q, q, block_mask=plan)
        except NotImplementedError as error:
            assert "shared memory" in str(error) and "reference" in str(error)
        else:
            raise AssertionError("kernels that cannot be launched were not refused")
        assert not links.said["exchange"]


# -- pages


def decode_step(
    group: Any,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    rows: Any = cpflex.everyone,
    num_sequences: int = 2,
    **how: Any,
) -> list[Tensor]:
    """Two steps of one token of each sequence; ``heads`` on all ranks."""
    pages = cpflex.Pages(16, 64) if group is None else cpflex.Pages(16, 64, group)
    pool = pages.pool(kv_heads, head_dim, dtype=torch.bfloat16, device="cuda")
    for seq in range(num_sequences):
        pages.reserve(seq, 300)
        pages.fill(seq, 200)
    mask = cpflex.mask_mod(cpflex.causal() & cpflex.sliding_window(100))
    plan = cpflex.make_decode_plan(mask, pages, dict.fromkeys(range(num_sequences), 1), rows=rows, **how)
    sizes = heads // pages.world_size if plan.steps.rows.by_head else heads, kv_heads, kv_heads
    q, k, v = (torch.zeros(1, h, plan.num_tokens, head_dim, dtype=torch.bfloat16, device="cuda") for h in sizes)
    for _ in range(2):
        pool.assign(k, v, plan)
        out = cpflex.flex_attention(q, pool.k, pool.v, None, plan, enable_gqa=True)
        assert isinstance(out, Cuda) and out.shape == q.shape and out.dtype == q.dtype
        plan.advance()
    return []


def check_pages_are_prepared(heads: int, kv_heads: int, rows: Any, num_sequences: int, travel: Any = None) -> None:
    """All that two ranks launch was compiled before the first of them sends anything: no message waits for a compiler."""
    from cpflex.kernels import ahead
    from cpflex.testing import ThreadLinks, run_ranks

    prepared: list[dict[str, int]] = []
    exchange = ThreadLinks.exchange

    def exchanged(*arguments: Any) -> Any:
        prepared.append(dict(events.variants))
        return exchange(*arguments)

    with (
        pretending(90, compiles=False) as events,
        mock.patch.object(ThreadLinks, "exchange", exchanged),
        mock.patch.object(ahead, "attend_pages", wraps=ahead.attend_pages) as compiled,
    ):
        how = {"rows": rows, "num_sequences": num_sequences, "travel": travel}
        run_ranks(lambda group: decode_step(group, heads, kv_heads, **how), 2)
        assert {launch.name for launch in events.launches} == {"decode_kernel", "combine_kernel"}
        assert events.variants == prepared[0], f"{prepared[0]}, then {events.variants}"
        assert all(call.args[0].shape[1] == heads for call in compiled.call_args_list), "what the kernel gets"


def check_a_step_copies_nothing_but_its_tables() -> None:
    """One rank: positions and lengths go to the device once a step; nothing comes back, nobody waits."""
    with pretending(90, compiles=False) as events:
        decode_step(None)
        assert {launch.name for launch in events.launches} == {"decode_kernel", "combine_kernel"}
        assert len(events.launches) == 2 * 2, "decode and combine, in each step"
        assert not {"d2h", "d2h_async", "sync"} & events.counts().keys(), events.counts()


def decode_failure(capability: int, head_dim: int) -> str:
    """Why a step does not launch on a chip; "" if it does."""
    from triton.runtime.errors import OutOfResources

    with pretending(capability) as events:
        try:
            decode_step(None, head_dim=head_dim)
        except OutOfResources as error:
            return f"{len(events.launches)} launches, then: {error}"
        assert {launch.name for launch in events.launches} == {"decode_kernel", "combine_kernel"}
        return ""


def check_a_smaller_row_of_pages() -> None:
    from cpflex.kernels import tuning

    rows = tuning.SM86 | {("decode", 128): tuning.KernelConfig(32, 128, 8, 4)}
    with mock.patch.object(tuning, "rows_for", return_value=rows), pretending(86) as events:
        decode_step(None, head_dim=128)
        assert {launch.name for launch in events.launches} == {"decode_kernel", "combine_kernel"}
        assert all(launch.shared_bytes <= 99 << 10 for launch in events.launches)


def check_refusal_of_pages_before_sending() -> None:
    from cpflex.kernels import fitting
    from cpflex.testing import run_ranks

    def step(group: Any) -> str:
        try:
            decode_step(group)
        except NotImplementedError as error:
            return str(error)
        return ""

    with pretending(90, compiles=False) as events, mock.patch.object(fitting, "shared_memory", return_value=-1):
        for said in run_ranks(step, 2):
            assert "the kernel decode of head dims 64 and 64" in said and "reference" in said
        assert not events.launches

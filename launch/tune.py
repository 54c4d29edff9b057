"""Search the KernelConfig of one pass on the GPU at hand, and print a row for `cpflex/kernels/tuning.py`.

    python launch/tune.py --pass forward --head-dim 128              # some minutes: each candidate is compiled twice
    python launch/tune.py --pass dkdv --head-dim 64 --dtype float16
    python launch/tune.py --pass dq --head-dim 128 --tma             # whole blocks by tensor descriptors
    python launch/tune.py --pass decode --head-dim 128               # new tokens against keys in pages

A candidate is timed on causal attention and on packed documents with ALiBi, 16k tokens each; one of decode on a token
and on a chunk of 64 tokens of each of 16 sequences of 32k. The product of the two times decides. Candidates that the
GPU cannot run are passed over.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import cpflex
from cpflex.kernels import Call, PageWork, empty_partials, tuning
from cpflex.kernels.tuning import KernelConfig
from cpflex.ring.handles import resolve
from cpflex.tile_mask import TileMask

SEQ_LEN, TOKENS, HIDDEN = 16384, 32768, 2048
ROUNDS = 7
BLOCKS = (32, 64, 128)
PAGE_ROWS = (16, 32, 64)
WARPS = (4, 8)
STAGES = (2, 3, 4)
SEQUENCES, LENGTH, CHUNK, PAGE_SIZE = 16, 32768, 64, 64
"""Of decode."""


class Problem(NamedTuple):
    """Everything that a launch takes."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, grad_out [B, H, S, D]
    tile_mask: TileMask
    call: Call


def problems(head_dim: int, dtype: torch.dtype) -> list[Problem]:
    """Causal; packed documents with ALiBi, its slopes learned so that the captured pass has work."""
    heads = HIDDEN // head_dim
    slopes = torch.rand(heads, device="cuda")
    score_mod = cpflex.score_mod(lambda score, b, h, q, k: score - slopes[h] * (q - k)).mod
    documents = cpflex.document(cu_seqlens=list(range(0, SEQ_LEN, 2500)) + [SEQ_LEN]) & cpflex.causal()
    made = []
    for mask_mod, mod in ((cpflex.causal(), None), (documents, score_mod)):
        plan = cpflex.make_plan(mask_mod, SEQ_LEN)
        mask, (step,), _ = resolve(plan.handle).on(torch.device("cuda", torch.cuda.current_device()))
        call = Call(mask, 1 / math.sqrt(head_dim), backend="triton")
        if mod is not None:
            call = Call(mask, call.scale, mod.graph, mod.captured, (0,), "triton")
        shape = (TOKENS // SEQ_LEN, heads, SEQ_LEN, head_dim)
        tensors = tuple(torch.randn(shape, dtype=dtype, device="cuda") for _ in range(4))
        made.append(Problem(tensors, step.tile_mask, call))  # type: ignore[arg-type]
    return made


class Pages(NamedTuple):
    """Everything that a launch of decode takes."""

    tensors: tuple[Tensor, Tensor, Tensor]  # q [1, Hq, N, D], k and v [1, H, R, D]
    work: PageWork
    call: Call


def page_problems(head_dim: int, dtype: torch.dtype) -> list[Pages]:
    """One new token of each sequence, and a chunk of them; a head of keys for four of queries."""
    pages, heads = cpflex.Pages(SEQUENCES * LENGTH // PAGE_SIZE, PAGE_SIZE), HIDDEN // head_dim
    pool = pages.pool(max(1, heads // 4), head_dim, dtype=dtype, device="cuda")
    for x in (pool.k, pool.v):
        x.normal_()
    for seq in range(SEQUENCES):
        pages.reserve(seq, LENGTH)
        pages.fill(seq, LENGTH - CHUNK)
    made, mask = [], cpflex.mask_mod(cpflex.causal())
    for count in (1, CHUNK):
        plan = cpflex.make_decode_plan(mask, pages, dict.fromkeys(range(SEQUENCES), count))
        q = torch.randn(1, heads, SEQUENCES * count, head_dim, device="cuda").to(dtype)
        call = Call(mask.on(q.device), 1 / math.sqrt(head_dim), backend="triton")
        made.append(Pages((q, pool.k, pool.v), plan.work(q.device), call))
    return made


@contextmanager
def only(which: str, config: KernelConfig) -> Iterator[None]:
    """Kernels of other passes launch nothing."""
    from cpflex.kernels import backward, captured, forward

    kernels = {
        "forward": forward.attend_kernel,
        "dq": backward.dq_kernel,
        "dkdv": backward.dkdv_kernel,
        "captured": captured.captured_kernel,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(tuning, "lookup", return_value=config))
        for name, kernel in kernels.items():
            if name != which:
                stack.enter_context(mock.patch.object(kernel, "run", return_value=None))
        yield


def launch(which: str, problem: Problem | Pages) -> Callable[[], Any]:
    from cpflex.kernels import backward, decode, forward

    if isinstance(problem, Pages):
        (q, k, v), work, call = problem.tensors, problem.work, replace(problem.call)
        into = empty_partials(work.num_partials, q.shape[1], v.shape[3], q.device)
        return lambda: decode.attend_pages(q, k, v, work, call, into)
    (q, k, v, grad_out), tile_mask, call = problem
    call = replace(call)  # which decided nothing yet
    if which == "forward":
        return lambda: forward.attend_and_finish(q, k, v, tile_mask, call, None)
    lse = torch.full(q.shape[:3], 10.0, device="cuda")
    dq = torch.zeros(q.shape, device="cuda")
    d_captured = [torch.zeros_like(call.captured[slot]) for slot in call.wanted]
    return lambda: backward.attend_backward(q, k, v, grad_out, lse, lse, tile_mask, call, dq, d_captured)


def milliseconds(fn: Callable[[], Any]) -> float:
    fn()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def tried(which: str, config: KernelConfig, made: Sequence[Problem | Pages]) -> list[float] | None:
    """Milliseconds on each problem; None if the GPU cannot run it."""
    from triton.errors import TritonError

    with only(which, config):
        try:
            return [milliseconds(launch(which, problem)) for problem in made]
        except (TritonError, RuntimeError) as error:
            print(f"{config}: {type(error).__name__}", flush=True)
            return None


def candidates(tma: bool, which: str = "forward") -> list[KernelConfig]:
    rows = PAGE_ROWS if which in tuning.PAGE_PASSES else BLOCKS
    return [KernelConfig(*numbers, tma) for numbers in itertools.product(rows, BLOCKS, WARPS, STAGES)]


def row(which: str, head_dim: int, config: KernelConfig, why: str) -> str:
    """As `cpflex/kernels/tuning.py` has it."""
    numbers = f"{config.block_q}, {config.block_kv}, {config.num_warps}, {config.num_stages}"
    flags = "".join(f", {name}=True" for name in ("tma", "apart") if getattr(config, name))
    return f'("{which}", {head_dim}): KernelConfig({numbers}{flags}),  # {why}'


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Search a row of cpflex/kernels/tuning.py on this GPU.")
    parser.add_argument("--pass", dest="which", choices=(*tuning.PASSES, *tuning.PAGE_PASSES), default="forward")
    parser.add_argument("--head-dim", type=int, choices=tuning.WIDTHS, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tma", action="store_true", help="whole blocks by tensor descriptors: sm_90 or later")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("configurations are timed on a CUDA GPU, and there is none here")
    make = page_problems if options.which in tuning.PAGE_PASSES else problems
    made = make(options.head_dim, getattr(torch, options.dtype))
    if options.which == "captured":
        made = made[1:]
    found: dict[KernelConfig, list[float]] = {}
    for config in candidates(options.tma, options.which):
        times = tried(options.which, config, made)
        if times is not None:
            found[config] = times
            print(f"{config}: {', '.join(f'{ms:.2f} ms' for ms in times)}", flush=True)
    if not found:
        raise SystemExit("this GPU could run no candidate")
    best = sorted(found, key=lambda config: math.prod(found[config]))[:5]
    print("\nthe five fastest, and a row for tuning.py:")
    for config in best:
        print(f"    {config}: {', '.join(f'{ms:.2f} ms' for ms in found[config])}")
    times = ", ".join(f"{ms:.2f}" for ms in found[best[0]])
    why = f"{times} ms: {torch.cuda.get_device_name()}, {options.dtype}"
    print("    " + row(options.which, options.head_dim, best[0], why))


if __name__ == "__main__":
    main()

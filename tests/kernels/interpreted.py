"""The fused kernels on the CPU, interpreted, against their torch twin and the dense oracle.

Triton reads TRITON_INTERPRET when the kernels are imported, so these checks run in a process of their own: see `interpreting`.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import interpreter as _interpreter
from triton.runtime.interpreter import GridExecutor

import cpflex
from another_process import another_process
from cases import DIMS, DTYPES, Problem
from chunk_cases import ChunkProblem, assert_right, on_threads
from cpflex.kernels import (
    Call,
    State,
    attend,
    attend_and_finish,
    attend_backward,
    backward,
    begin_backward,
    empty,
    finish,
    forward,
    gradient_dtype,
    reference,
    tuning,
)
from cpflex.kernels.captured import scatter
from cpflex.kernels.launch import columns, described, rows_are_near
from cpflex.kernels.scores import load_rows
from cpflex.mods.graph import Mod
from cpflex.mods.trace import trace_score_mod
from cpflex.ring.handles import resolve
from cpflex.testing import run_ranks
from cpflex.tile_mask import TileMask
from oracle import Attention, assert_within_budget

DIMS |= {"d64": (64, 64), "d80": (80, 80), "d96dv64": (96, 64), "d128": (128, 128), "d192dv128": (192, 128), "d256": (256, 256)}  # fmt: skip

ROUNDINGS = {torch.float32: 40, torch.bfloat16: 4, torch.float16: 4}
"""How far a result may be from its twin, in roundings of the largest number: sums of a few hundred terms, in another order."""


@contextlib.contextmanager
def interpreting() -> Iterator[Callable[..., Any]]:
    """``call(fn, *args)`` runs a function of this module where kernels are interpreted and memory that nobody wrote is NaN."""
    with another_process(TRITON_INTERPRET="1", OPENBLAS_NUM_THREADS="1") as call:
        call(_begin)
        yield call


def _begin() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what torch.empty returns with NaN
    from cpflex.kernels.launch import INTERPRETED

    assert INTERPRETED


# -- whole attentions


def check(problem: Problem) -> None:
    """Every rank's steps, state carried from one to the next: near the twin, and as near the oracle as promised."""
    fused, twin = run(problem, "triton"), run(problem, "reference")
    dtype = DTYPES[problem.dtype]
    near = ROUNDINGS[dtype] * torch.finfo(dtype).eps
    for name, value in fused.named().items():
        size = max(1.0, twin.named()[name].float().nan_to_num(0.0, 0.0, 0.0).abs().max().item())
        _assert_close(name, value, twin.named()[name], rtol=near, atol=near * size)
    exact = problem.dense()
    if dtype == torch.float32:
        for name in ("out", "lse", "dq", "dk", "dv"):  # the bar of torch's own tests of context parallelism
            _assert_close(name, getattr(fused, name), getattr(exact, name).float(), rtol=1e-5, atol=2e-6)
    elif problem.seq_len > 1:  # the error of a single score is luck, the reference's too
        for attention in (fused, exact, reference := problem.dense(torch.float32)):
            attention.d_captured = []  # which remembers that probabilities were rounded; it is near its twin
        assert_within_budget(fused, reference, exact)


def _assert_close(name: str, actual: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **tolerance, msg=lambda said: f"{name}: {said}")


def run(problem: Problem, backend: str) -> Attention:
    """Attention of all tokens by the kernels alone: what ranks exchange is taken from the whole."""
    captured = problem.captured()
    score_fn = problem.score_mod(captured)
    mod = None if score_fn is None else trace_score_mod(score_fn)
    plans = [
        cpflex.make_plan(
            problem.mask_mod, problem.seq_len, rank=rank, world_size=problem.world_size, layout=cpflex.zigzag,
            batch_size=problem.batch_size, num_heads=problem.num_heads,
        )
        for rank in range(problem.world_size)
    ]  # fmt: skip
    pads = plans[0].local_len * problem.world_size - problem.seq_len
    whole = {
        n: torch.cat([x, x.new_zeros(*x.shape[:2], pads, *x.shape[3:])], dim=2) for n, x in problem.tensors.items()
    }
    dtype, q, v = whole["q"].dtype, whole["q"], whole["v"]
    total = Attention(
        torch.full((*q.shape[:3], v.shape[3]), math.nan, dtype=dtype),
        torch.full(q.shape[:3], math.nan),
        *(torch.zeros(whole[name].shape) for name in "qkv"),
        [torch.zeros(x.shape) for x in captured],
    )
    for plan in plans:
        kind = plan.kinds["mask"]
        call = Call(kind.mask, 1 / math.sqrt(q.shape[3]), mod and mod.graph, mod.captured if mod else (), tuple(range(len(captured))), backend, wants_max=problem.seq_len % 2 == 0)  # fmt: skip
        masks = [step.tile_mask for step in kind.steps]
        _run_rank(call, masks, plan.positions, whole, total)
    total.dq, total.dk, total.dv = (x.to(dtype) for x in (total.dq, total.dk, total.dv))
    cut = {name: x[:, :, : problem.seq_len] for name, x in total.named().items() if not name.startswith("d_captured")}
    return Attention(**cut, d_captured=total.d_captured)


def _run_rank(call: Call, masks: Sequence[TileMask], mine: Tensor, whole: dict[str, Tensor], total: Attention) -> None:
    q, grad_out, grad_lse = (whole[name][:, :, mine] for name in ("q", "grad_out", "grad_lse"))
    visits = [mask.kv_positions.long() for mask in masks]
    blocks = [(whole["k"][:, :, at], whole["v"][:, :, at]) for at in visits]
    state = empty(q, blocks[0][1].shape[3])
    for (k, v), mask in list(zip(blocks, masks, strict=True))[:-1]:
        attend(q, k, v, mask, call, state)
    out, lse, max_scores = attend_and_finish(q, *blocks[-1], masks[-1], call, state if len(masks) > 1 else None)
    _check_max(call, q, blocks, masks, max_scores)
    begun = begin_backward(out, grad_out, grad_lse, lse, call)
    dq = torch.zeros(q.shape)
    for at, (k, v), mask in zip(visits, blocks, masks, strict=True):
        dk, dv = attend_backward(q, k, v, grad_out, *begun, mask, call, dq, total.d_captured)
        total.dk[:, :, at] += dk
        total.dv[:, :, at] += dv
    total.out[:, :, mine], total.lse[:, :, mine], total.dq[:, :, mine] = out, lse, dq


def _check_max(
    call: Call, q: Tensor, blocks: Sequence[tuple[Tensor, Tensor]], masks: Sequence[TileMask], found: Tensor
) -> None:
    """The largest scores, where they are wanted, are those that the other backend finds."""
    if not call.wants_max:
        assert found.numel() == 0
        return
    state = empty(q, blocks[0][1].shape[3])
    for (k, v), mask in zip(blocks, masks, strict=True):
        attend(q, k, v, mask, replace(call, backend="reference"), state)
    _assert_close("max_scores", found, state.m, rtol=1e-5, atol=5e-6)


# -- one step, both backends


def tile_mask_of(mask_mod, seq_len: int) -> tuple[Mod, TileMask]:
    """One rank's mask and its only step."""
    mask, (step,), _ = resolve(cpflex.make_plan(mask_mod, seq_len).handle).on(torch.device("cpu"))
    return mask, step.tile_mask


def one_step(
    call: Call, tile_mask: TileMask, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, backend: str
) -> dict[str, Tensor]:
    """The finished softmax of one step and all gradients."""
    call = replace(call, backend=backend)
    state = empty(q, v.shape[3])
    attend(q, k, v, tile_mask, call, state)
    out, lse = finish(state, q.dtype)
    begun = begin_backward(out, grad_out, torch.zeros(lse.shape), lse, call)
    dq = torch.zeros(q.shape)
    d_captured = [torch.zeros(call.captured[slot].shape) for slot in call.wanted]
    dk, dv = attend_backward(q, k, v, grad_out, *begun, tile_mask, call, dq, d_captured)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, **{f"d{i}": x for i, x in enumerate(d_captured)}}


def _same(call: Call, tile_mask: TileMask, *tensors: Tensor) -> dict[str, Tensor]:
    fused, twin = (one_step(call, tile_mask, *tensors, backend) for backend in ("triton", "reference"))
    pairs = tensors[0].shape[:3].numel() * tensors[1].shape[2]
    for name, value in fused.items():
        size = max(1.0, twin[name].nan_to_num(0.0, 0.0, 0.0).abs().max().item())
        if name[1:].isdigit():
            # a captured tensor: sums of so many terms round on the way, though they may come to little
            size = max(size, math.sqrt(pairs / value.numel()))
        _assert_close(name, value, twin[name], rtol=1e-5, atol=5e-6 * size)
    return fused


def _tensors(seq_len: int, heads: int = 2, kv_heads: int = 1, dim: int = 16) -> list[Tensor]:
    return [torch.randn(1, h, seq_len, dim) for h in (heads, kv_heads, kv_heads, heads)]


def check_strides() -> None:
    """Sequence before heads, one tensor for q, k and v, rows apart, an expanded gradient."""
    mask, tile_mask = tile_mask_of(cpflex.causal(), 144)
    call = Call(mask, 0.25)
    packed = torch.randn(1, 144, 4, 16).transpose(1, 2)
    spread = torch.randn(1, 2, 144, 32)[..., ::2]
    backwards = torch.randn(1, 1, 16, 144).mT
    _same(call, tile_mask, packed[:, :2], packed[:, 2:3], packed[:, 3:], torch.ones(()).expand(1, 2, 144, 16))
    _same(call, tile_mask, spread, backwards, backwards, spread.mT.contiguous().mT)


@triton.jit
def load_rows_kernel(x_ptr, y_ptr, stride, first, NARROW: tl.constexpr):
    (rows,) = load_rows(x_ptr, stride, first, 72, 16, 64, (16,), False, NARROW)
    tl.store(y_ptr + tl.arange(0, 64)[:, None] * 16 + tl.arange(0, 16)[None, :], rows)


def check_far_rows() -> None:
    """Rows so far apart that their offsets from the first of a block are no int32."""
    far, rows = 1 << 26, torch.randn(72, 16)
    flags = (
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    )  # MAP_NORESERVE of Linux: nothing is taken but what is touched
    memory = torch.frombuffer(mmap.mmap(-1, 72 * far * 4, flags=flags), dtype=torch.float32)
    spread = memory.as_strided((72, 16), (far, 1))
    spread.copy_(rows)
    for x in (rows, spread):
        is_near = rows_are_near(x[None, None])
        assert is_near == (x is rows)
        found = torch.zeros(64, 16)
        with mock.patch.object(GridExecutor, "_restore_args_dev"):  # which would touch all memory, though on the CPU
            load_rows_kernel[(1,)](x, found, x.stride(0), 8, is_near)
        assert torch.equal(found, rows[8:])


def check_wide_offsets() -> None:
    """Offsets in int64 give the bits of those in int32."""
    mask, tile_mask = tile_mask_of(cpflex.causal(), 144)
    tensors = _tensors(144)
    near = one_step(Call(mask, 0.25), tile_mask, *tensors, "triton")
    with (
        mock.patch.object(forward, "rows_are_near", return_value=False) as in_forward,
        mock.patch.object(backward, "rows_are_near", return_value=False) as in_backward,
    ):
        far = one_step(Call(mask, 0.25), tile_mask, *tensors, "triton")
    assert in_forward.called and in_backward.called
    for name, x in far.items():
        assert torch.equal(x, near[name]), name


def check_public_call() -> None:
    """Two ranks ask for the fused kernels on the CPU; they get what the reference gives."""
    problem = Problem("doc_causal", "softcap", 200, "gqa", world_size=2, batch_size=1)
    tensors, score_mod = problem.tensors, cpflex.score_mod(problem.score_mod([]))  # type: ignore[arg-type]

    def rank(group: Any, backend: str) -> list[Tensor]:
        plan = problem.plan(group)
        local = [plan.shard(tensors[name], dim=2, pad_value=0.0).detach().requires_grad_() for name in "qkv"]
        options = {"backend": backend}
        out = cpflex.flex_attention(*local, score_mod, plan, enable_gqa=True, kernel_options=options)
        assert isinstance(out, Tensor)
        grad_out = plan.shard(tensors["grad_out"], dim=2, pad_value=0.0)
        return [out.detach(), *torch.autograd.grad(out, local, grad_out)]

    fused, twin = (run_ranks(partial(rank, backend=backend), world_size=2) for backend in ("triton", "reference"))
    for found, expected in zip(fused, twin, strict=True):
        for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            _assert_close(name, x, y, rtol=1e-5, atol=5e-6)


def check_chunks(problem: ChunkProblem) -> None:
    """Keys of earlier chunks and of the own one, pads in between, reach fused kernels as one tensor."""
    assert_right(problem, on_threads(problem, kernel_options={"backend": "triton"}))


def check_grid() -> None:
    """Two rows of two ranks: fused kernels shift the heads of mods as their twin does, gradients of tables included."""
    problem = Problem("window_per_head", "relative_bias", 130, "gqa", world_size=4, batch_size=1, ulysses_size=2)

    def rank(group: Any, backend: str) -> list[Tensor]:
        plan, captured = problem.plan(group), problem.captured()
        local = [plan.shard(problem.tensors[name], 2, pad_value=0.0).detach().requires_grad_() for name in "qkv"]
        options = {"backend": backend}
        out = cpflex.flex_attention(*local, problem.score_mod(captured), plan, enable_gqa=True, kernel_options=options)
        assert isinstance(out, Tensor)
        grad_out = plan.shard(problem.tensors["grad_out"], dim=2, pad_value=0.0)
        return [out.detach(), *torch.autograd.grad(out, [*local, *captured], grad_out)]

    fused, twin = (run_ranks(partial(rank, backend=backend), 4) for backend in ("triton", "reference"))
    for found, expected in zip(fused, twin, strict=True):
        for name, x, y in zip(("out", "dq", "dk", "dv", "d_table"), found, expected, strict=True):
            _assert_close(name, x, y, rtol=1e-5, atol=5e-5 if name == "d_table" else 5e-6)


def check_descriptors(problem: Problem) -> None:
    """Whole blocks by tensor descriptors, also of tensors whose strides are those of the sequence before the heads."""
    config = replace(tuning.INTERPRETED, tma=True, pieces=False)
    with mock.patch.object(tuning, "INTERPRETED", config):
        check(problem)
        mask, tile_mask = tile_mask_of(cpflex.causal(), 272)
        packed = torch.randn(2, 272, 4, 24).transpose(1, 2)
        q, k, v, grad_out = packed[:, :2], packed[:, 2:3], packed[:, 3:], torch.randn(2, 2, 272, 24)
        assert None not in described(config, 64, q, k, v, grad_out)
        _same(Call(mask, 0.25), tile_mask, q, k, v, grad_out)
        # rows that begin anywhere keep to pointers
        shifted = torch.randn(2, 1, 272, 25)[..., 1:]
        assert described(config, 64, shifted) == [None]
        _same(Call(mask, 0.25), tile_mask, q, shifted, shifted, grad_out)


def check_apart(problem: Problem) -> None:
    """dK and dV by launches of their own."""
    with mock.patch.object(tuning, "INTERPRETED", replace(tuning.INTERPRETED, apart=True)):
        check(problem)


def check_alone(dtype: torch.dtype) -> None:
    """Gradients of an only step are those that are added up in fp32, rounded once; also where nothing is seen."""
    mask, tile_mask = tile_mask_of(lambda b, h, q, k: (k <= q) & (q >= 140), 208)
    q, k, v, grad_out = (x.to(dtype) for x in _tensors(208))
    call = Call(mask, 0.25, backend="triton")
    assert gradient_dtype(q, call, alone=True) == dtype
    assert gradient_dtype(q, call, alone=False) == torch.float32
    assert gradient_dtype(q, replace(call, backend="reference"), alone=True) == torch.float32
    out, lse, _ = attend_and_finish(q, k, v, tile_mask, call, None)
    begun = begin_backward(out, grad_out, torch.zeros(lse.shape), lse, call)
    dq, added = torch.full(q.shape, math.nan, dtype=dtype), torch.zeros(q.shape)
    alone = dq, *attend_backward(q, k, v, grad_out, *begun, tile_mask, call, dq, [])
    parts = added, *attend_backward(q, k, v, grad_out, *begun, tile_mask, call, added, [])
    for written, part in zip(alone, parts, strict=True):
        assert written.dtype == dtype and part.dtype == torch.float32
        # the interpreter does not round to bf16 as torch does
        ulp = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(written.float(), part.to(dtype).float(), rtol=ulp, atol=0.0)


def check_padded(problem: Problem) -> None:
    """Rows of 80 dims as 64 and 16, and as one block of 128; rows of the first are what all other tests have."""
    assert columns(DIMS[problem.dims][0], tuning.INTERPRETED) in ((64, 16), (128, 64))
    check(problem)
    with mock.patch.object(tuning, "INTERPRETED", replace(tuning.INTERPRETED, pieces=False)):
        assert len(columns(DIMS[problem.dims][0], tuning.INTERPRETED)) == 1
        check(problem)


def check_scale(scale: float) -> None:
    mask, tile_mask = tile_mask_of(cpflex.causal(), 144)
    _same(Call(mask, scale), tile_mask, *_tensors(144))


def check_score_mod(name: str) -> None:
    """Scores that are -inf, derivatives that are not finite at hidden pairs, captured tensors read in every way."""
    seq_len = 144
    mask, tile_mask = tile_mask_of(cpflex.causal(), seq_len)
    tables = [torch.randn(seq_len), torch.randn(2, 3), torch.randn(3, seq_len), torch.randn(4)]
    bias, by_head, rows, short = tables
    score_mods = {
        "-inf for some queries": lambda s, b, h, q, k: torch.where(q < 40, -torch.inf, s),
        "-inf for some keys": lambda s, b, h, q, k: torch.where(k % 3 != 0, -torch.inf, s),
        "the lowest number for all": lambda s, b, h, q, k: s - 1e37,
        "not finite where hidden": lambda s, b, h, q, k: s + torch.log(q - k + 1.0) + torch.sqrt((q - k).float()) * s,
        "a number": lambda s, b, h, q, k: s * 0.5 + 1,
        "without the score": lambda s, b, h, q, k: bias[q] * 1.0,
        "by query": lambda s, b, h, q, k: s * bias[q],
        "by key and head": lambda s, b, h, q, k: s + rows[h, k] * by_head[h, 1],
        "by query and key": lambda s, b, h, q, k: s + short[(q - k).clamp(0, 3)] * rows[2, q],
        "by the score": lambda s, b, h, q, k: s + short[(s > 0).long()],
    }
    mod = trace_score_mod(score_mods[name])
    call = Call(mask, 0.25, mod.graph, mod.captured, tuple(range(len(mod.captured))))
    tensors = _tensors(seq_len)
    if (
        name == "not finite where hidden"
    ):  # zero on the diagonal: the derivative of a root is infinite there, and the pair is seen
        call = replace(call, mask=tile_mask_of(cpflex.causal() & (lambda b, h, q, k: q != k), seq_len)[0])
    found = _same(call, tile_mask, *tensors)
    assert not any(x.isnan().any() for x in found.values())


@triton.jit
def scatter_kernel(target_ptr, place_ptr, part_ptr, seen_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    scatter(target_ptr, tl.load(place_ptr + at), tl.load(part_ptr + at), tl.load(seen_ptr + at))


def check_scatter(name: str, rows: int, cols: int) -> None:
    """What is added where, and by how many atomic additions."""
    i, j = torch.arange(rows)[:, None], torch.arange(cols)
    diagonals = rows + cols - 1
    places, most = {
        "by distance": (i - j + cols, diagonals),
        "by clamped distance": ((i - j).clamp(-3, 3) + 3, diagonals),
        "by bucket of distance": ((i - j).abs() // 4, diagonals),
        "one for all": (i * j * 0, diagonals),
        "one for each pair": (i * cols + j, rows * cols),
        "of two sequences": ((i - j + cols) * (j < 5), rows * cols),
    }[name]
    for seen in (torch.rand(rows, cols) < 0.7, i >= j, torch.zeros(rows, cols, dtype=torch.bool)):
        seen = seen.broadcast_to(rows, cols).contiguous()
        part = torch.where(seen, torch.randn(rows, cols), 0.0)
        found, expected = (torch.zeros(rows * cols + diagonals, dtype=torch.float64) for _ in range(2))
        with mock.patch.object(_interpreter, "atomic_rmw", side_effect=_interpreter.atomic_rmw) as added:
            scatter_kernel[(1,)](found, places.int().contiguous(), part, seen, rows, cols)
        expected.index_add_(0, places.reshape(-1), part.double().reshape(-1))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert sum(int(call.args[3].sum()) for call in added.call_args_list) <= min(most, int(seen.sum()))


def check_refusal_of_large_tables() -> None:
    """The place of a pair is an int32."""
    mask, tile_mask = tile_mask_of(cpflex.causal(), 16)
    table = torch.zeros(1).expand(2**16, 2**15)
    mod = trace_score_mod(lambda s, b, h, q, k: s + table[q, k])
    call = Call(mask, 0.25, mod.graph, mod.captured, (0,), "triton")
    q, k, v, grad_out = _tensors(16)
    lse = torch.zeros(q.shape[:3])
    try:
        attend_backward(q, k, v, grad_out, lse, lse, tile_mask, call, torch.zeros(q.shape), [torch.zeros(1)])
    except NotImplementedError as error:
        assert "2**31" in str(error) and "reference" in str(error)
    else:
        raise AssertionError("a table whose places are no int32 was not refused")


def check_refusal_of_atomics() -> None:
    mask, tile_mask = tile_mask_of(cpflex.causal(), 144)
    short = torch.randn(4)
    mod = trace_score_mod(lambda s, b, h, q, k: s + short[(q - k).clamp(0, 3)])
    call = Call(mask, 0.25, mod.graph, mod.captured, (0,))
    torch.use_deterministic_algorithms(True)
    try:
        one_step(call, tile_mask, *_tensors(144), "triton")
    except RuntimeError as error:
        assert "captured tensor 0" in str(error) and "deterministic" in str(error)
    else:
        raise AssertionError("atomic additions were not refused")
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
    one_step(replace(call, wanted=()), tile_mask, *_tensors(144), "triton")


def check_what_is_hidden_reaches_nothing() -> None:
    """NaN in tiles that the mask empties, and huge numbers in hidden keys of PARTIAL ones."""
    seq_len = 272
    mask, tile_mask = tile_mask_of(cpflex.document(torch.arange(seq_len) // 136), seq_len)
    q, k, v, grad_out = _tensors(seq_len)
    rows = slice(0, 128)
    clean = one_step(Call(mask, 0.25), tile_mask, q, k, v, grad_out, "triton")
    for x in (k, v):
        x[:, :, 136:256] = 1e30
        x[:, :, 256:] = math.nan
    dirty = one_step(Call(mask, 0.25), tile_mask, q, k, v, grad_out, "triton")
    for name in ("out", "lse", "dq"):
        assert torch.equal(clean[name][:, :, rows], dirty[name][:, :, rows]), name


def check_bits() -> None:
    """The same inputs give the same bits, and a first step that is also the last those of two functions."""
    mask, tile_mask = tile_mask_of(cpflex.causal(), 200)
    call = Call(mask, 0.25, backend="triton")
    tensors = _tensors(208)
    first, second = (one_step(call, tile_mask, *tensors, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    out, lse, _ = attend_and_finish(*tensors[:3], tile_mask, call, None)
    torch.testing.assert_close(out, first["out"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, first["lse"], rtol=1e-6, atol=1e-6)


def check_a_state_of_nothing_is_not_read() -> None:
    """Memory under the accumulator of a query that has seen no key may hold anything."""
    mask, tile_mask = tile_mask_of(cpflex.causal(), 144)
    q, k, v, _ = _tensors(144)
    clean = empty(q, 16)
    dirty = State(torch.full_like(clean.acc, math.nan), clean.m.clone(), clean.l.clone())
    for state in (clean, dirty):
        attend(q, k, v, tile_mask, Call(mask, 0.25, backend="triton"), state)
    assert torch.equal(clean.acc, dirty.acc)


def check_what_backward_begins_with() -> None:
    """delta and lse of every query, whatever the strides of the gradient, also where no key is seen."""
    for batch, heads, q_len, dim, dtype in [(2, 3, 70, 24, torch.float32), (1, 2, 33, 256, torch.float16), (3, 1, 1, 16, torch.float32)]:  # fmt: skip
        shape = (batch, heads, q_len, dim)
        out, lse, grad_lse = torch.randn(shape, dtype=dtype), torch.randn(shape[:3]), torch.randn(shape[:3])
        lse[..., ::5] = -math.inf
        for grad_out in (
            torch.randn(shape, dtype=dtype),
            torch.randn(batch, q_len, heads, dim, dtype=dtype).transpose(1, 2),
            torch.randn(*shape[:3], 2 * dim, dtype=dtype)[..., ::2],
            torch.ones((), dtype=dtype).expand(shape),
            torch.randn(heads, 1, dim, dtype=dtype).expand(shape),
        ):
            for gradient in (grad_lse, grad_lse.mT.contiguous().mT, torch.ones(()).expand(shape[:3])):
                _, twin = reference.begin_backward(out, grad_out, gradient, lse)
                lse2, delta = begin_backward(out, grad_out, gradient, lse, Call(None, 1.0, backend="triton"))  # type: ignore[arg-type]
                _assert_close("delta", delta, twin, rtol=1e-5, atol=1e-5)
                expected = torch.where(lse == -math.inf, math.inf, lse * math.log2(math.e))
                _assert_close("lse", lse2, expected, rtol=1e-6, atol=1e-6)
                assert lse2.is_contiguous() and delta.is_contiguous()

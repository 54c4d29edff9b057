"""The fused kernels of pages on the CPU, interpreted, against their torch twins and the dense oracle."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import torch
from paged import HEADS, Paged, assert_near

from cpflex.kernels import Partials, attend_pages, combine, empty_partials, tuning


def check(problem: Paged, block_q: int = 64, block_kv: int = 64) -> None:
    """Partials of each rank as the twin's, the whole as dense attention is; with blocks of these sizes."""
    with mock.patch.object(tuning, "INTERPRETED", replace(tuning.INTERPRETED, block_q=block_q, block_kv=block_kv)):
        found = problem.run("triton")
        for rank in range(problem.world_size):
            near_twin(problem.partials(rank, "triton"), problem.partials(rank, "reference"), problem.dtype)
    assert_near(found, problem)


def near_twin(found: Partials, twin: Partials, dtype: str) -> None:
    """The twin does not round probabilities."""
    tolerance = {"fp32": 5e-6, "bf16": 2e-2, "fp16": 2e-3}[dtype]
    for name, x, y in zip(Partials._fields, found, twin, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda said, name=name: f"{name}: {said}")


def check_bits() -> None:
    """The same, run after run; and whatever lies in rows that nobody has filled and in pages of others."""
    problem = Paged("window", "alibi", lens=(40, 35), new=(1, 3), world_size=1)
    first, second = problem.run("triton"), problem.run("triton")
    other = replace(problem)
    for name in "kv":
        other.tensors[name].nan_to_num_(1e4)
        other.tensors[name][:, :, other.rows_of(1)] = math.nan
    third = other.run("triton")
    for x, y, z in zip(first, second, third, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[:1], z[:1]) and z[1:].isnan().all()


def check_a_page_fills_while_tables_last() -> None:
    """The tables of 40 tokens, and 7 more in the pool: only the length and the position have changed."""
    long = Paged(lens=(47, 20), new=(1, 1), world_size=1)
    short = Paged(lens=(40, 20), new=(1, 1), world_size=1)
    assert long.pages == short.pages
    work, parts = short.work(0)
    work.kv_len[0], work.q_positions[0] = 47, 46
    q, k, v = (long.tensors[name] for name in "qkv")
    into = empty_partials(work.num_partials, q.shape[1], v.shape[3], q.device)
    attend_pages(q, k, v, work, long.call("triton"), into)
    assert_near(combine(into, parts, backend="triton"), long)


def check_combine() -> None:
    """As the twin, into memory of any strides, also where nobody has written an out."""
    for rows, heads, dim, dtype in ((60, 3, 8, torch.float32), (33, 2, 130, torch.bfloat16), (5, 1, 7, torch.float16)):
        partials = empty_partials(rows, heads, dim, torch.device("cpu"))
        partials.out.normal_()
        partials.lse.normal_().mul_(30.0)
        unseen = torch.rand(rows, heads) < 0.3
        partials.lse[unseen], partials.out[unseen] = -math.inf, math.nan
        parts = torch.tensor(
            [[0, 1, rows], [1, 3, 1], [3, 0, 1], [2, 2, 0], [rows - 1, -2, rows // 2]], dtype=torch.int32
        )
        found, twin = (combine(partials, parts, dtype, backend=backend) for backend in ("triton", "reference"))
        again = combine(partials, parts, dtype, backend="triton")
        assert found.out.dtype == dtype and torch.equal(found.out, again.out) and torch.equal(found.lse, again.lse)
        eps = torch.finfo(dtype).eps if dtype != torch.float32 else 5e-6
        torch.testing.assert_close(found.out, twin.out, rtol=eps, atol=eps)
        torch.testing.assert_close(found.lse, twin.lse, rtol=1e-6, atol=1e-5)
    partials.lse[0] = math.nan
    assert combine(partials, parts[:1], backend="triton").out.isnan().all()


def check_any_strides() -> None:
    """A query cut out of a projection, pools of which only some heads are used."""
    problem = Paged(lens=(40, 17), new=(2, 1), world_size=1)
    q, k, v = (problem.tensors[name] for name in "qkv")
    heads, kv_heads = HEADS[problem.heads]
    spread = [torch.full((1, x.shape[2], 3 * n, x.shape[3]), math.nan) for x, n in zip((q, k, v), (heads, kv_heads, kv_heads), strict=True)]  # fmt: skip
    views = [x[:, :, n : 2 * n].transpose(1, 2) for x, n in zip(spread, (heads, kv_heads, kv_heads), strict=True)]
    for view, x in zip(views, (q, k, v), strict=True):
        view.copy_(x)
    expected = problem.partials(0, "triton")
    for name, view in zip("qkv", views, strict=True):
        problem.tensors[name] = view
    for x, y in zip(problem.partials(0, "triton"), expected, strict=True):
        assert torch.equal(x, y)

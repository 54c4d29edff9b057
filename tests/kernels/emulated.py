"""The Gluon kernels on the CPU, emulated, against their torch twin and the dense oracle."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from gluon_emulator import Emulated, Fault, Tma
from torch import Tensor

import cpflex
from cases import DIMS, DTYPES, Problem
from cpflex.kernels import Call, attend, attend_and_finish, empty, hopper_backward, hopper_forward, tuning
from cpflex.kernels.launch import generated
from cpflex.mods.evaluate import evaluate
from cpflex.mods.trace import trace_score_mod
from cpflex.tile_mask import TileMask
from oracle import Attention, assert_within_budget

HOPPER_DIMS = {"h64": (64, 64), "h96": (96, 96), "h128": (128, 128), "h192dv128": (192, 128), "h256": (256, 256)}
DIMS |= HOPPER_DIMS

STAND_INS: Mapping[str, Callable[..., Any]] = {
    "packed": lambda p, dtype: p.to(dtype),
    "unpacked": lambda both, dtype, layout: both,
    "_add_out": Tma.async_atomic_add,
}
"""Two 16-bit numbers in a register are inline assembly; the name of the last is `hopper`'s, with older releases."""

Step = tuple[Tensor, Tensor, TileMask]
"""k, v and the mask of a step."""


def mods_of(call: Call) -> dict[Any, Callable[..., Any]]:
    """Device functions as the graphs that they were made of. That they are the same, other tests prove."""
    mask_mod, score_mod, score_vjp = generated(call, backward=True)

    def positions(b: int, h: int, q_idx: Tensor, kv_idx: Tensor) -> dict[str, Tensor]:
        scalars = {"b": torch.tensor(b), "h": torch.tensor(h)}
        return scalars | {"q_idx": q_idx.long(), "kv_idx": kv_idx.long()}

    def mask(b: int, h: int, q_idx: Tensor, kv_idx: Tensor, *_: Any) -> Tensor:
        return evaluate(call.mask.graph, call.mask.captured, positions(b, h, q_idx, kv_idx))[0]

    def score(score: Tensor, b: int, h: int, q_idx: Tensor, kv_idx: Tensor, *_: Any) -> Tensor:
        if call.score_graph is None:
            return score
        inputs = {"score": score} | positions(b, h, q_idx, kv_idx)
        return evaluate(call.score_graph, call.captured, inputs)[0].expand_as(score)

    def vjp(grad: Tensor, score: Tensor, b: int, h: int, q_idx: Tensor, kv_idx: Tensor, *_: Any) -> tuple[Tensor]:
        inputs = {"grad": grad, "score": score} | positions(b, h, q_idx, kv_idx)
        return (evaluate(call.score_vjp.graph, call.captured, inputs)[0].expand_as(score),)  # type: ignore[union-attr]

    forward_mod = generated(call, backward=False)[1]
    return {mask_mod.function: mask, score_mod.function: score, forward_mod.function: score, score_vjp.function: vjp}


@contextlib.contextmanager
def emulating(call: Call, seed: int = 0) -> Iterator[Emulated]:
    """Inside, launches of Gluon kernels run on the CPU, in the interleaving of the emulator's seed."""
    kernel = Emulated(hopper_forward.attend_kernel, seed, STAND_INS, mods_of(call))
    with mock.patch.object(hopper_forward, "attend_kernel", kernel):
        yield kernel


def continued(module: Any, call: Call, q: Tensor, steps: Sequence[Step]) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, max_scores) of all steps of a rank, by a backend's two functions."""
    state = empty(q, steps[0][1].shape[3])
    for k, v, tile_mask in steps[:-1]:
        module.attend(q, k, v, tile_mask, call, state)
    return module.attend_and_finish(q, *steps[-1], call, state if len(steps) > 1 else None)


class Twin:
    """The same two functions of plain torch."""

    attend = staticmethod(attend)
    attend_and_finish = staticmethod(attend_and_finish)


def check(problem: Problem, seeds: Sequence[int]) -> None:
    """Every rank's steps, in as many interleavings as there are seeds: the same bits in all, as near the oracle as the
    twin is, and as told by it which queries see nothing.
    """
    exact = problem.dense()
    for call, q, steps, mine, real in ranks_of(problem):
        twin = continued(Twin, replace(call, backend="reference"), q, steps)
        found = None
        with emulating(call) as kernel:
            for kernel.seed in seeds:
                again = continued(hopper_forward, call, q, steps)
                found = again if found is None else found
                for name, x, y in zip(("out", "lse", "max_scores"), again, found, strict=True):
                    assert torch.equal(x, y), f"seed {kernel.seed}: another {name} than with seed {seeds[0]}"
        assert found is not None
        if call.wants_max:
            torch.testing.assert_close(found[2], twin[2], rtol=1e-5, atol=1e-5)
        else:
            assert found[2].numel() == 0
        assert (found[0][:, :, ~real] == 0).all() and (found[1][:, :, ~real] == -math.inf).all()
        if not real.any():
            continue
        eps = torch.finfo(q.dtype).eps
        for name, x, y in zip(("out", "lse"), found, twin, strict=False):
            x, y, z = x[:, :, real].double(), y[:, :, real].double(), getattr(exact, name)[:, :, mine[real]].double()
            assert torch.equal(x == -math.inf, z == -math.inf), name
            x, y, z = (t.nan_to_num(math.nan, 0.0, 0.0) for t in (x, y, z))
            size = max(1.0, z.abs().max().item()) * (eps if name == "out" else 1e-5)
            allowed = 3 * (y - z).abs().max().item() + size
            torch.testing.assert_close(x, z, rtol=0, atol=allowed, msg=lambda said, name=name: f"{name}: {said}")


@contextlib.contextmanager
def emulating_backward(call: Call) -> Iterator[list[Emulated]]:
    """Inside, launches of the Gluon kernels of backward run on the CPU."""
    names, mods = ("dq_kernel", "dkdv_kernel"), mods_of(call)
    kernels = [Emulated(getattr(hopper_backward, name), 0, STAND_INS, mods) for name in names]
    with contextlib.ExitStack() as patches:
        for name, kernel in zip(names, kernels, strict=True):
            patches.enter_context(mock.patch.object(hopper_backward, name, kernel))
        patches.enter_context(mock.patch.object(tuning, "capability_of", return_value=90))
        if not call.deterministic:  # for the NaNs of the tests
            patches.enter_context(mock.patch.object(torch, "are_deterministic_algorithms_enabled", return_value=False))
        yield kernels


def check_backward(problem: Problem, seeds: Sequence[int], deterministic: bool = True) -> None:
    """Every rank's steps, in as many interleavings as there are seeds: the same bits in all, within the budget of the
    dense oracle, and gradients of 0 for what is padding. A rank alone has its gradients in 16 bits. Of dq in one pass,
    where sums have no order, the last bits may be others.
    """
    exact, reference = problem.dense(), problem.dense(torch.float32)
    exact.d_captured = reference.d_captured = exact.terms.d_captured = []  # type: ignore[union-attr]
    dtype = DTYPES[problem.dtype]
    found = Attention(reference.out, reference.lse, *(torch.zeros(problem.tensors[name].shape) for name in "qkv"))
    for call, q, steps, mine, real in ranks_of(problem):
        grad_out, lse, delta = (whole[:, :, mine] for whole in _what_backward_reads(problem, exact, len(mine)))
        first, call = None, replace(call, deterministic=deterministic)
        with emulating_backward(call) as kernels, torch.no_grad():
            for seed in seeds:
                for kernel in kernels:
                    kernel.seed = seed
                again = _gradients(problem, call, q, steps, grad_out, lse, delta)
                first = again if first is None else first
                if not deterministic:
                    near = 2 * torch.finfo(first[0].dtype).eps * max(1.0, first[0].abs().max().item())
                    torch.testing.assert_close(again[0], first[0], rtol=0, atol=near)
                for x, y in zip(again[not deterministic :], first[not deterministic :], strict=True):
                    assert torch.equal(x, y), f"seed {seed}: other gradients than with seed {seeds[0]}"
        dq, *visits = first  # type: ignore[misc]
        assert (dq[:, :, ~real] == 0).all()
        found.dq[:, :, mine[real]] = dq[:, :, real].float()
        for total, parts in ((found.dk, visits[::2]), (found.dv, visits[1::2])):
            for part, (_, _, tile_mask) in zip(parts, steps, strict=True):
                at = tile_mask.kv_positions.long()
                inside = at < problem.seq_len
                assert (part[:, :, ~inside] == 0).all()
                total.index_add_(2, at[inside], part[:, :, inside].float())
    for name in ("dq", "dk", "dv"):
        setattr(found, name, getattr(found, name).to(dtype))
    assert_within_budget(found, reference, exact)


def check_planted(old: str, new: str, monkeypatch: pytest.MonkeyPatch, deterministic: bool = True) -> None:
    """With ``new`` in place of ``old`` in the source of the backward kernels, `check_backward` fails."""
    emulator, is_planted = Emulated, []

    def edited(kernel: Any, *args: Any) -> Emulated:
        try:
            made = emulator(kernel, *args, edits={old: new})
        except AssertionError:  # not in the source of this kernel
            return emulator(kernel, *args)
        is_planted.append(kernel)
        return made

    monkeypatch.setitem(globals(), "Emulated", edited)
    with pytest.raises((Fault, AssertionError)) as raised:
        for problem in PLANTED_IN:
            check_backward(problem, range(3), deterministic)
    assert is_planted, "not in the source of any kernel"
    print(str(raised.value)[:200])


PLANTED_IN = [
    Problem("window_per_head", "none", 140, "mqa", "h64", "bf16", world_size=2, batch_size=1),
    Problem("full", "none", 450, "mqa", "h64", "bf16", batch_size=1),  # rings of buffers turn
]


def _what_backward_reads(problem: Problem, exact: Attention, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_out, lse, delta) of the whole sequence and its padding, as `kernels.begin_backward` has them."""
    grad_out, grad_lse = problem.tensors["grad_out"], problem.tensors["grad_lse"]
    delta = (exact.out.to(grad_out.dtype).double() * grad_out.double()).sum(-1) - grad_lse
    lse = torch.where(exact.lse == -math.inf, math.inf, exact.lse * math.log2(math.e))
    pads = num_rows * problem.world_size - problem.seq_len
    padded = {"value": 0.0}, {"value": math.inf}, {"value": 0.0}
    made = grad_out, lse.float()[..., None], delta.float()[..., None]
    x, y, z = (torch.nn.functional.pad(t, (0, 0, 0, pads), **fill) for t, fill in zip(made, padded, strict=True))
    return x, y[..., 0], z[..., 0]


def _gradients(
    problem: Problem, call: Call, q: Tensor, steps: Sequence[Step], grad_out: Tensor, lse: Tensor, delta: Tensor
) -> list[Tensor]:
    """dq of all steps, then dk and dv of each."""
    lse, delta = lse.contiguous(), delta.contiguous()
    dq = torch.zeros(q.shape) if problem.world_size > 1 else torch.full(q.shape, math.nan, dtype=q.dtype)
    visits: list[Tensor] = []
    for k, v, tile_mask in steps:
        visits += hopper_backward.attend_backward(q, k, v, grad_out, lse, delta, tile_mask, call, dq, [])
    return [dq, *visits]


def ranks_of(problem: Problem) -> Iterator[tuple[Call, Tensor, list[Step], Tensor, Tensor]]:
    """Of each rank: the call, its queries, its steps, their positions, and which of them are no padding."""
    captured = problem.captured()
    score_fn = problem.score_mod(captured)
    mod = None if score_fn is None else trace_score_mod(score_fn)
    for rank in range(problem.world_size):
        plan = cpflex.make_plan(
            problem.mask_mod, problem.seq_len, rank=rank, world_size=problem.world_size, layout=cpflex.zigzag,
            batch_size=problem.batch_size, num_heads=problem.num_heads,
        )  # fmt: skip
        pads = plan.local_len * problem.world_size - problem.seq_len
        whole = {
            n: torch.cat([x, x.new_zeros(*x.shape[:2], pads, *x.shape[3:])], 2) for n, x in problem.tensors.items()
        }
        kind = plan.kinds["mask"]
        scale = 1 / math.sqrt(whole["q"].shape[3])
        captured_mod = mod.captured if mod else ()
        wants_max = problem.seq_len % 2 == 0
        call = Call(kind.mask, scale, mod and mod.graph, captured_mod, (), "gluon", wants_max)
        masks = [step.tile_mask for step in kind.steps]
        visits = [mask.kv_positions.long() for mask in masks]
        steps = [(whole["k"][:, :, at], whole["v"][:, :, at], m) for at, m in zip(visits, masks, strict=True)]
        mine = plan.positions.long()
        assert whole["q"].dtype == DTYPES[problem.dtype]
        yield call, whole["q"][:, :, mine], steps, mine, mine < problem.seq_len

"""The Gluon kernels on the CPU, emulated, against their torch twin and the dense oracle."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from gluon_emulator import Emulated
from torch import Tensor

import cpflex
from cases import DIMS, DTYPES, Problem
from cpflex.kernels import Call, attend, attend_and_finish, empty, hopper_forward
from cpflex.kernels.launch import generated
from cpflex.mods.evaluate import evaluate
from cpflex.mods.trace import trace_score_mod
from cpflex.tile_mask import TileMask

HOPPER_DIMS = {"h64": (64, 64), "h96": (96, 96), "h128": (128, 128), "h192dv128": (192, 128), "h256": (256, 256)}
DIMS |= HOPPER_DIMS

STAND_INS: Mapping[str, Callable[..., Any]] = {
    "packed": lambda p, dtype: p.to(dtype),
    "unpacked": lambda both, dtype, layout: both,
}
"""Two 16-bit numbers in a register are inline assembly."""

Step = tuple[Tensor, Tensor, TileMask]
"""k, v and the mask of a step."""


def mods_of(call: Call) -> dict[Any, Callable[..., Any]]:
    """Device functions as the graphs that they were made of. That they are the same, other tests prove."""
    mask_mod, score_mod, _ = generated(call, backward=False)

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

    return {mask_mod.function: mask, score_mod.function: score}


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

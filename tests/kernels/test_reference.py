"""attend and attend_backward of the reference backend, step by step and at the edges of arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import cpflex
from cases import Problem
from cpflex.kernels import Call, attend, attend_backward, empty, finish
from cpflex.mods.trace import trace_score_mod
from cpflex.ring.schedule import Exchange, Schedule, Source, Step
from oracle import Attention, assert_within_budget, dense_attention


def at_once(layout: cpflex.Layout, rank: int, needs: object) -> Schedule:
    """All ranks' keys in one step."""
    shard = ((0, layout.local_len),)
    exchange = Exchange(tuple(Source(r, shard) for r in range(layout.world_size)))
    return Schedule("at_once", "", (exchange,), (0,) * layout.world_size)


SPLITS = {"at once": at_once, "by shard": cpflex.ring, "by need": cpflex.direct}


def run(
    problem: Problem, schedule: Callable, order: Callable[[Sequence[Step]], Sequence[Step]] = tuple, world_size: int = 4
) -> Attention:
    """Attention of all tokens, each rank's part through its steps, in one process."""
    whole = {name: _padded(x, problem, world_size) for name, x in problem.tensors.items()}
    captured = problem.captured()
    score_fn = problem.score_mod(captured)
    mod = None if score_fn is None else trace_score_mod(score_fn)
    (batch, heads, length, _), v_dim = whole["q"].shape, whole["v"].shape[-1]
    total = Attention(
        torch.full((batch, heads, length, v_dim), math.nan),
        torch.full((batch, heads, length), math.nan),
        torch.full(whole["q"].shape, math.nan),
        torch.zeros(whole["k"].shape),
        torch.zeros(whole["v"].shape),
        [torch.zeros(x.shape) for x in captured],
    )
    for rank in range(world_size):
        plan = cpflex.make_plan(
            problem.mask_mod, problem.seq_len, rank=rank, world_size=world_size, layout=cpflex.zigzag, schedule=schedule
        )
        call = Call(
            plan.kinds["mask"].mask,
            1 / math.sqrt(whole["q"].shape[-1]),
            None if mod is None else mod.graph,
            () if mod is None else mod.captured,
            tuple(range(len(captured))),
        )
        _run_rank(call, order(plan.steps), plan.positions, whole, v_dim, total)
    cut = {name: x[:, :, : problem.seq_len] for name, x in total.named().items() if not name.startswith("d_captured")}
    return Attention(**cut, d_captured=total.d_captured)


def _padded(x: Tensor, problem: Problem, world_size: int) -> Tensor:
    plan = cpflex.make_plan(cpflex.full(), problem.seq_len, rank=0, world_size=world_size, layout=cpflex.zigzag)
    padding = plan.local_len * world_size - problem.seq_len
    return torch.cat([x, x.new_zeros(*x.shape[:2], padding, *x.shape[3:])], dim=2)


def _run_rank(
    call: Call, steps: Sequence[Step], mine: Tensor, whole: dict[str, Tensor], v_dim: int, total: Attention
) -> None:
    q, grad_out, grad_lse = (whole[name][:, :, mine] for name in ("q", "grad_out", "grad_lse"))
    state = empty(q, v_dim)
    keys = [step.tile_mask.kv_positions.long() for step in steps]
    for step, visiting in zip(steps, keys, strict=True):
        attend(q, whole["k"][:, :, visiting], whole["v"][:, :, visiting], step.tile_mask, call, state)
    out, lse = finish(state, torch.float32)
    delta = (out * grad_out).sum(dim=-1) - grad_lse
    dq = torch.zeros_like(q)
    for step, visiting in zip(steps, keys, strict=True):
        k, v = whole["k"][:, :, visiting], whole["v"][:, :, visiting]
        dk, dv = attend_backward(q, k, v, grad_out, lse, delta, step.tile_mask, call, dq, total.d_captured)
        total.dk[:, :, visiting] += dk
        total.dv[:, :, visiting] += dv
    total.out[:, :, mine], total.lse[:, :, mine], total.dq[:, :, mine] = out, lse, dq


PROBLEMS = [
    Problem("causal", "none", 1000, "gqa", "d16dv24"),
    Problem("doc_sliding_causal", "relative_bias", 1000, "mqa", "d24"),
    Problem("eviction", "temperature", 321),
    Problem("shared_question", "softcap", 300, "gqa"),
    Problem("nothing", "none", 127),
]


@pytest.mark.by_day(3)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_softmax_continued_over_a_split_of_the_keys_is_the_softmax_of_all(problem: Problem, split: str):
    assert_within_budget(run(problem, SPLITS[split]), problem.dense(torch.float32), problem.dense())


@pytest.mark.parametrize("problem", PROBLEMS[:3], ids=str)
def test_the_order_of_the_steps_does_not_matter(problem: Problem):
    backwards = run(problem, cpflex.ring, order=lambda steps: steps[::-1])
    assert_within_budget(backwards, problem.dense(torch.float32), problem.dense())


def test_a_row_that_sees_nothing_until_late_forgets_nothing():
    """The first keys to visit are hidden from most rows: their state stays at -inf, then continues."""
    problem = Problem("future_only", "none", 300)
    assert_within_budget(run(problem, cpflex.ring), problem.dense(torch.float32), problem.dense())


def attend_locally(mask, score_mod, tensors: dict[str, Tensor], captured: Sequence[Tensor] = ()) -> Attention:
    """Through the public API, on one rank."""
    plan = cpflex.make_plan(mask, tensors["q"].shape[2])
    local = {
        name: plan.shard(x, dim=2, pad_value=math.nan).requires_grad_(name in "qkv") for name, x in tensors.items()
    }
    q, k, v = (local[name] for name in "qkv")
    out, lse = cpflex.flex_attention(q, k, v, score_mod, plan, return_lse=True)
    grads = torch.autograd.grad((out, lse), (q, k, v, *captured), (local["grad_out"], local["grad_lse"]))
    out, lse, dq, dk, dv = (plan.unshard(x.detach(), dim=2) for x in (out, lse, *grads[:3]))
    return Attention(out, lse, dq, dk, dv, list(grads[3:]))


NUMBER = torch.tensor(0.3, requires_grad=True)
PER_KEY = torch.linspace(-1, 1, 300).requires_grad_()

NOT_FINITE_WHERE_HIDDEN = {
    "log of a negative distance": (lambda: lambda s, b, h, q, k: s + torch.log(q - k + 1.0), []),
    "root of a negative distance": (lambda t: lambda s, b, h, q, k: s * torch.sqrt(q - k + 1.0) * t, [NUMBER]),
    "division by a distance": (lambda t: lambda s, b, h, q, k: s / (q - k + 1) + t[k] / (q - k + 1), [PER_KEY]),
    "nan by where": (lambda t: lambda s, b, h, q, k: torch.where(k > q, math.nan, s * t), [NUMBER]),
    "inf by where": (lambda t: lambda s, b, h, q, k: torch.where(k > q, math.inf, s + t[q]), [PER_KEY]),
    "overflow": (lambda t: lambda s, b, h, q, k: s + t * torch.exp((k - q) * 10.0), [NUMBER]),
}


@pytest.mark.parametrize("name", NOT_FINITE_WHERE_HIDDEN)
def test_what_a_score_mod_does_at_hidden_pairs_reaches_nothing(name: str):
    make, captured = NOT_FINITE_WHERE_HIDDEN[name]
    tensors = Problem(seq_len=300).tensors
    found = attend_locally(cpflex.causal(), make(*captured), tensors, captured)
    dense = [
        dense_attention(**tensors, mask_mod=cpflex.causal(), score_mod=make, captured=captured, precision=precision)
        for precision in (torch.float32, torch.float64)
    ]
    assert all(x.isfinite().all() for x in found.named().values())
    assert_within_budget(found, *dense)


def hides_by_score(s, b, h, q, k):
    """As a mask: -inf at visible pairs, for whole rows too."""
    return torch.where((q >= k) & (q % 3 != 1), s, -math.inf)


def test_a_score_of_minus_infinity_hides_a_pair():
    tensors = Problem(seq_len=300).tensors
    by_score = attend_locally(cpflex.full(), hides_by_score, tensors)
    by_mask = attend_locally(lambda b, h, q, k: (q >= k) & (q % 3 != 1), None, tensors)
    hidden = torch.arange(300) % 3 == 1
    assert (by_score.lse[:, :, hidden] == -math.inf).all()
    assert (by_score.out[:, :, hidden] == 0).all()
    assert (by_score.dq[:, :, hidden] == 0).all()
    for name, x in by_score.named().items():
        torch.testing.assert_close(x, by_mask.named()[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
def test_a_score_that_is_not_a_number_spoils_its_own_row_and_is_not_hidden(value: float):
    tensors = Problem(seq_len=300).tensors
    plan = cpflex.make_plan(cpflex.causal(), 300)
    q, k, v = (plan.shard(tensors[name], dim=2, pad_value=0.0) for name in "qkv")
    spoiled = cpflex.flex_attention(q, k, v, lambda s, b, h, q, k: torch.where((q == 200) & (k == 150), value, s), plan)
    sound = cpflex.flex_attention(q, k, v, lambda s, b, h, q, k: s * 1, plan)
    assert spoiled[:, :, 200].isnan().all()
    rest = torch.arange(300) != 200
    torch.testing.assert_close(spoiled[:, :, :300][:, :, rest], sound[:, :, :300][:, :, rest], rtol=0, atol=0)


def test_scores_far_apart_neither_overflow_nor_lose_the_small_ones():
    tensors = Problem(seq_len=300).tensors
    found = attend_locally(cpflex.causal(), lambda s, b, h, q, k: s - 2000.0 * (q // 128 - k // 128) + 3e4, tensors)
    exact = dense_attention(
        **tensors,
        mask_mod=cpflex.causal(),
        score_mod=lambda: lambda s, b, h, q, k: s - 2000.0 * (q // 128 - k // 128) + 3e4,
    )
    assert all(x.isfinite().all() for x in found.named().values())
    torch.testing.assert_close(found.out.double(), exact.out, rtol=0, atol=1e-2)  # scores of 3e4 are rounded to 2e-3


def test_a_fully_masked_row_gives_zeros_and_minus_infinity():
    tensors = Problem(seq_len=300, heads="mha").tensors
    found = attend_locally(cpflex.causal() & (lambda b, h, q, k: (q % 7 != 2) & (k % 5 != 4)), None, tensors)
    masked, unseen = torch.arange(300) % 7 == 2, torch.arange(300) % 5 == 4
    assert (found.out[:, :, masked] == 0).all()
    assert (found.lse[:, :, masked] == -math.inf).all()
    assert (found.dq[:, :, masked] == 0).all()
    assert (found.dk[:, :, unseen] == 0).all()
    assert (found.dv[:, :, unseen] == 0).all()


def test_strided_inputs_and_an_expanded_gradient_are_accepted():
    plan = cpflex.make_plan(cpflex.causal(), 128)
    base = torch.randn(2, 128, 3, 4, 16)  # [B, S, qkv, H, D]
    q, k, v = (base[:, :, i].transpose(1, 2).requires_grad_() for i in range(3))
    strided = torch.autograd.grad(cpflex.flex_attention(q, k, v, block_mask=plan).sum(), (q, k, v))
    dense = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    out = cpflex.flex_attention(*dense, block_mask=plan)
    for ours, theirs in zip(strided, torch.autograd.grad(out, dense, torch.ones_like(out)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_piece_at_a_time_is_all_at_once(monkeypatch: pytest.MonkeyPatch):
    from cpflex.kernels import reference

    problem = Problem("doc_causal", "relative_bias", 1000, "gqa")
    monkeypatch.setattr(reference, "SCORES_PER_PIECE", 10_000)
    assert_within_budget(run(problem, at_once), problem.dense(torch.float32), problem.dense())

"""Leak probes: what a mask hides may change in any way and nothing that it is hidden from moves by a bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import cpflex
from cases import LAYOUTS, Problem
from cpflex.testing import ThreadLinks, run_ranks
from runs import TOKEN_TENSORS, assemble, attend_on_rank

SEQ_LEN = 512
NAN = float("nan")
HUGE = 1e18
"""Its square fits fp32."""


def run(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    results = run_ranks(partial(attend_on_rank, problem=problem, tensors=tensors), problem.world_size, timeout=60)
    return assemble(results).named()


def changed(
    problem: Problem, where: Tensor, change: Callable[[Tensor], Tensor], names: str = "all"
) -> dict[str, Tensor]:
    """The inputs with other values at tokens ``where``, bool [S]."""
    tensors = {name: x.clone() for name, x in problem.tensors.items()}
    for name, x in tensors.items():
        if names == "all" or name in names.split():
            x[:, :, where] = change(x[:, :, where])
    return tensors


def redrawn(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(99)).to(x.dtype) * 3


def huge(x: Tensor) -> Tensor:
    return redrawn(x).sign() * HUGE


def nan(x: Tensor) -> Tensor:
    return torch.full_like(x, NAN)


def assert_nothing_moves(problem: Problem, tensors: dict[str, Tensor], unmoved: Tensor, names=TOKEN_TENSORS) -> None:
    before, after = run(problem, problem.tensors), run(problem, tensors)
    for name in names:
        assert torch.equal(before[name][:, :, unmoved], after[name][:, :, unmoved]), f"{name} moved"
    assert not torch.equal(before["out"][:, :, ~unmoved], after["out"][:, :, ~unmoved]), (
        "the change is seen where it may be"
    )


LEAKS = [
    Problem(mask, score, SEQ_LEN, "gqa", "d16dv24", dtype, layout, schedule, world_size)
    for mask, score, dtype, layout, schedule, world_size in [
        ("doc_full", "none", "fp32", "zigzag", "ring", 3),
        ("doc_causal", "none", "bf16", "contiguous", "direct", 4),
        ("doc_causal", "relative_bias", "fp32", "striped", "ring", 2),
        ("doc_full", "softcap", "fp32", "zigzag", "direct", 3),
        ("doc_full", "temperature", "fp32", "contiguous", "ring", 1),
        ("doc_full", "none", "fp32", "striped", "relay:2", 4),
        ("doc_causal", "relative_bias", "bf16", "zigzag", "striped:1/2", 5),
        ("doc_causal", "none", "fp32", "zigzag", "even:3", 3),
    ]
]


@pytest.mark.parametrize("change", [redrawn, huge], ids=["other values", "huge values"])
@pytest.mark.parametrize("problem", LEAKS, ids=str)
def test_no_document_hears_of_another(problem: Problem, change: Callable[[Tensor], Tensor]):
    """Tokens of one document change, in q, k, v and both gradients: all results of the others stay, bit by bit."""
    ids = document_ids(problem)
    inside = ids == ids[200]
    assert 1 < inside.sum() < problem.seq_len / 2
    names = "all" if change is redrawn else "q k v"
    assert_nothing_moves(problem, changed(problem, inside, change, names), ~inside)


def document_ids(problem: Problem) -> Tensor:
    """Of the mask, whether causal or not: position i is in the document of j if either sees the other."""
    zero, position = torch.tensor(0), torch.arange(problem.seq_len)
    sees = problem.mask_mod(zero, zero, position[:, None], position[None, :])
    return (sees | sees.T).int().argmax(dim=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 4])
def test_nothing_outside_the_window_moves(layout: str, world_size: int):
    problem = Problem("sliding17", seq_len=SEQ_LEN, layout=layout, world_size=world_size)
    token, position = 250, torch.arange(SEQ_LEN)
    tensors = changed(problem, position == token, redrawn)
    before, after = run(problem, problem.tensors), run(problem, tensors)
    for names, reach in (
        (("out", "lse", "dq"), (position >= token) & (position < token + 17)),
        (("dk", "dv"), (position > token - 17) & (position < token + 17)),
    ):
        for name in names:
            moved = (
                (before[name] != after[name]).flatten(3).any(-1)
                if before[name].ndim > 3
                else before[name] != after[name]
            )
            assert not moved[:, :, ~reach].any(), f"{name} moved outside the window"
            assert moved[:, :, token].all(), f"{name} did not move at the token"
    assert (before["out"] != after["out"])[:, :, token + 16].any(), "the last token of the window sees it"


@pytest.mark.parametrize("mask", ["causal", "sliding17", "prefix_lm", "doc_causal", "dilated"])
def test_the_future_does_not_reach_the_past(mask: str):
    """Values near the largest in hidden keys of PARTIAL tiles, too."""
    problem = Problem(mask, seq_len=SEQ_LEN, heads="gqa", world_size=3)
    future = torch.arange(SEQ_LEN) >= 401
    for change in (redrawn, huge):
        tensors = changed(problem, future, change, "q k v")
        assert_nothing_moves(problem, tensors, ~future, ("out", "lse", "dq"))


@pytest.mark.parametrize("schedule", ["ring", "direct", "even:3"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_nan_in_tiles_that_the_mask_empties_reaches_nothing(layout: str, schedule: str):
    """Documents that begin and end with tiles: NaN in all of one document's tensors."""
    bounds = [0, 128, 384, 512]

    class Aligned(Problem):
        mask_mod = property(lambda self: cpflex.document(cu_seqlens=bounds) & cpflex.causal())

    problem = Aligned(seq_len=SEQ_LEN, layout=layout, schedule=schedule, world_size=2)
    position = torch.arange(SEQ_LEN)
    inside = (position >= 128) & (position < 384)
    assert_nothing_moves(problem, changed(problem, inside, nan), ~inside)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(("mask", "score"), [("full", "none"), ("causal", "key_bias"), ("two_sided", "temperature")])
def test_what_pads_hold_reaches_nothing(mask: str, score: str, world_size: int):
    """NaN in the pads of every input, those of the gradients included, or zeros: the same bits."""
    problem = Problem(mask, score, 300, "gqa", world_size=world_size)

    def attend(group: ThreadLinks, pad: float) -> tuple[Tensor, ...]:
        plan = problem.plan(group)
        local = {x: plan.shard(t, dim=2, pad_value=pad).requires_grad_(x in "qkv") for x, t in problem.tensors.items()}
        captured = problem.captured()
        q, k, v = (local[x] for x in "qkv")
        out, lse = cpflex.flex_attention(q, k, v, problem.score_mod(captured), plan, enable_gqa=True, return_lse=True)
        return torch.autograd.grad((out, lse), (q, k, v, *captured), (local["grad_out"], local["grad_lse"])) + (
            out,
            lse,
        )

    runs = [run_ranks(partial(attend, pad=pad), world_size) for pad in (NAN, 0.0, 1e30)]
    for other in runs[1:]:
        for ranks in zip(runs[0], other, strict=True):
            for a, b in zip(*ranks, strict=True):
                assert a.isfinite().logical_or(a == -torch.inf).all()
                assert torch.equal(a, b)


def test_batches_and_heads_do_not_hear_of_each_other():
    problem = Problem("causal", "softcap", 300, "mha", world_size=2)
    tensors = {name: x.clone() for name, x in problem.tensors.items()}
    for x in tensors.values():
        x[1, 0] = redrawn(x[1, 0])
    before, after = run(problem, problem.tensors), run(problem, tensors)
    for name in TOKEN_TENSORS:
        same = [[torch.equal(before[name][b, h], after[name][b, h]) for h in range(2)] for b in range(2)]
        assert same == [[True, True], [False, True]], name


def test_the_mask_of_a_batch_row_is_its_own():
    """Padding: the tokens beyond a row's length change, and its results do not."""
    problem = Problem("padding", seq_len=300, world_size=2)
    lengths = torch.linspace(0, 300, problem.batch_size).long()
    tensors = {name: x.clone() for name, x in problem.tensors.items()}
    for b, length in enumerate(lengths):
        for name in ("k", "v"):
            tensors[name][b, :, length:] = HUGE
    before, after = run(problem, problem.tensors), run(problem, tensors)
    for name in TOKEN_TENSORS:
        assert torch.equal(before[name], after[name]), name

"""The fused kernels of pages on a GPU: error budget against float64, their twins, bits, CUDA graphs, nothing recompiled."""

from __future__ import annotations

import pytest
import torch
import verdicts
from cases_decode import STEPS, Kept, Step
from torch import Tensor

import cpflex
from cpflex.kernels import Call, attend_pages, combine, empty_partials
from cpflex.mods.trace import trace_mask_mod
from cpflex.testing import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(420),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KERNELS = {"decode_kernel", "combine_kernel"}
"""Each test launches them."""
SAME_BITS = Step("window", "alibi")


def within_budget(kept: Kept, found: dict[str, Tensor]) -> None:
    verdicts.assert_pages_within_budget(found, kept.exact(torch.float64), kept.exact(torch.float32))


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_step_stays_within_the_budget(step: Step):
    kept = Kept(step)
    within_budget(kept, kept.attend(kept.plan()))


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_partials_and_their_sum_are_those_of_the_twins(step: Step):
    """On the same tables, rows and device; the twins round no probability."""
    kept = Kept(step)
    plan = kept.plan(splits=20)
    kept.pool.assign(*kept.new, plan)
    work, parts = plan.work(kept.q.device), plan.parts(kept.q.device)
    score_mod = step.score_mod()
    mod = None if score_mod is None else cpflex.score_mod(score_mod)
    score = (None, ()) if mod is None else (mod.mod.graph, tuple(mod.captured))
    found: dict[str, dict[str, Tensor]] = {}
    for backend in ("triton", "reference"):
        call = Call(trace_mask_mod(step.mask_mod()), step.dims[0] ** -0.5, *score, backend=backend)
        partials = attend_pages(kept.q, kept.pool.k, kept.pool.v, work, call)
        found[backend] = {"out": partials.out, "lse": partials.lse}
        whole = combine(partials, parts, backend="triton")
        twin = combine(partials, parts, backend="reference")
        verdicts.assert_near_twin(whole._asdict(), twin._asdict(), 1e-5)
    verdicts.assert_near_twin(
        found["triton"], found["reference"], {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}[step.dtype]
    )


@pytest.mark.parametrize("splits", [1, 3, 500])
def test_splits_change_nothing_but_rounding(splits: int):
    kept = Kept(Step("sinks", "softcap"))
    within_budget(kept, kept.attend(kept.plan(splits=splits)))


def test_the_same_inputs_give_the_same_bits():
    kept = Kept(SAME_BITS)
    plan = kept.plan(splits=20)
    first = kept.attend(plan)
    for _ in range(5):
        torch.empty(1 << 28, device="cuda")  # other memory
        verdicts.assert_same_bits(kept.attend(plan), first)


@pytest.mark.parametrize("rows", [cpflex.everyone, cpflex.by_sequence], ids=lambda rows: rows.__name__)
def test_several_ranks_stay_within_the_budget(rows):
    """Ranks are threads on one GPU."""
    step = Step("sinks", lens=(4001, 1200), new=(2, 2))

    def rank(group) -> dict[str, Tensor]:
        kept = Kept(step, group)
        plan = kept.plan(rows=rows)
        mine = slice(plan.steps.first, plan.steps.end)
        kept.q, kept.new = kept.q[:, :, mine], [x[:, :, mine] for x in kept.new]
        return kept.attend(plan)

    ranks = run_ranks(rank, world_size=2)
    found = ranks[0] if rows is cpflex.everyone else {n: torch.cat([x[n] for x in ranks], dim=2) for n in ranks[0]}
    within_budget(Kept(step), found)


def test_a_step_is_captured_once_and_replayed_while_its_pages_fill():
    """Tables are read on the device: lengths and positions move, the graph stays."""
    kept = Kept(Step("causal", lens=(4001, 70), new=(1, 1)))
    plan, call = kept.plan(), Call(trace_mask_mod(cpflex.causal()), kept.step.dims[0] ** -0.5)
    work, parts, (_, heads, rows, _) = plan.work(kept.q.device), plan.parts(kept.q.device), kept.q.shape
    partials = empty_partials(work.num_partials, heads, kept.step.dims[1], kept.q.device)
    into = empty_partials(rows, heads, kept.step.dims[1], kept.q.device)

    def run() -> None:
        attend_pages(kept.q, kept.pool.k, kept.pool.v, work, call, partials)
        combine(partials, parts, into=into)

    kept.pool.assign(*kept.new, plan)
    replay = verdicts.captured(run)
    for _ in range(3):
        kept.pool.assign(*kept.new, plan)
        replay()
        found = {"out": into.out.clone(), "lse": into.lse.clone()}
        run()
        verdicts.assert_same_bits(found, {"out": into.out, "lse": into.lse})
        plan.advance()


def test_a_whole_call_is_captured_once_and_replayed():
    """`flex_attention` asks the device nothing; keys are kept before it, outside of the graph."""
    kept = Kept(Step("sinks", "alibi", lens=(4001, 70), new=(1, 1)))
    plan, score_mod, found = kept.plan(), cpflex.score_mod(kept.step.score_mod()), {}

    def run() -> None:
        out, lse = cpflex.flex_attention(
            kept.q, kept.pool.k, kept.pool.v, score_mod, plan, enable_gqa=True, return_lse=True
        )  # type: ignore[misc]
        found.update(out=out, lse=lse)

    kept.pool.assign(*kept.new, plan)
    run()
    replay = verdicts.captured(run)
    of_graph = dict(found)
    for _ in range(3):
        kept.pool.assign(*kept.new, plan)
        replay()
        replayed = {name: x.clone() for name, x in of_graph.items()}
        run()
        verdicts.assert_same_bits(replayed, found)
        plan.advance()


def test_other_lengths_batches_pages_and_splits_compile_nothing():
    from triton import knobs

    compiled: list[str] = []
    knobs.compilation.listener = lambda *, src, cache_hit, **rest: compiled.append(src.name)
    try:
        for lens, page_size, splits in [((300, 40), 16, 1), ((1,), 64, 3), ((5001, 70, 64, 1), 32, 40)]:
            kept = Kept(Step("window", lens=lens, new=(1,) * len(lens), page_size=page_size))
            kept.attend(kept.plan(splits=splits))
            torch.cuda.synchronize()
        kernels = [name for name in compiled if name in KERNELS]
        assert len(kernels) <= 3, kernels  # combine into float32, and into bfloat16
    finally:
        knobs.compilation.listener = None

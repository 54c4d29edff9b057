"""A sequence in chunks: what N ranks compute of each, with the keys so far, is dense attention of the whole, forward and
all gradients.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cpflex
from cases import LAYOUTS
from chunk_cases import MASKS, ChunkProblem, assert_right, attend, on_threads
from cpflex.planning.make import traced
from cpflex.recurrent.chain import make_chain
from cpflex.sharding.joined import Joined
from cpflex.testing import ThreadLinks, run_ranks
from processes import RankProcesses

P = ChunkProblem
BOUNDS = (0, 130, 290, 301)
SAMPLE = [
    P("window and sinks", BOUNDS, "balanced", "auto", 2),
    P("causal", (0, 64, 65, 200), "zigzag", "ring", 3),
    P("documents", (0, 150, 310), "striped", "direct", 4),
    P("random table", (0, 100, 237), "contiguous", "even:3", 2),
    P("by head", BOUNDS, "balanced", "ring:both", 4, ulysses_size=2),
    P("window and sinks", (0, 256, 512), "contiguous", "relay:2", 4),
    P("own chunk alone", BOUNDS, "zigzag", "direct", 2),
    P("window and sinks", BOUNDS, "zigzag", "auto", 1),
    P("causal", BOUNDS, "zigzag", "gather", 2, ulysses_size=2),
    P("window and sinks", (0, 1, 2, 3, 140), "balanced", "striped:1/2", 4),
]


@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_chunks_are_one_dense_attention(problem: ChunkProblem):
    assert_right(problem, on_threads(problem))


@pytest.mark.by_day(30)
@pytest.mark.parametrize("problem", [
    P(mask, bounds, layout, schedule, world_size)
    for mask in MASKS for bounds in ((0, 130, 290, 301), (0, 256, 384))
    for layout, schedule in (("balanced", "auto"), ("zigzag", "ring"), ("contiguous", "direct"), ("striped", "even:3"))
    for world_size in (2, 3, 4)
], ids=str)  # fmt: skip
def test_many_chunks_are_one_dense_attention(problem: ChunkProblem):
    assert_right(problem, on_threads(problem))


@pytest.mark.by_day(4)
@pytest.mark.parametrize("problem", [SAMPLE[0], SAMPLE[8], SAMPLE[4], SAMPLE[9]], ids=str)
def test_processes_compute_chunks(problem: ChunkProblem, request: pytest.FixtureRequest):
    processes: RankProcesses = request.getfixturevalue({2: "two_processes", 4: "four_processes"}[problem.world_size])
    assert_right(problem, processes.run(attend, replace(problem)))


# -- plans of chunks


def _plans(mask: Any, bounds: tuple[int, ...], **options: Any) -> list[cpflex.Plan]:
    plans: list[cpflex.Plan] = []
    for begin, end in pairwise(bounds):
        plans.append(cpflex.make_plan(cpflex.cached(mask, plans), end - begin, **options))
    return plans


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_chunk_is_where_it_is_in_its_sequence(layout: str):
    length, start = 150, 1000
    plans = [
        cpflex.make_plan(cpflex.causal(), length, start=start, rank=r, world_size=3, layout=LAYOUTS[layout])
        for r in range(3)
    ]
    positions = torch.cat([plan.positions for plan in plans])
    assert positions.sort().values.tolist() == list(range(start, start + len(positions)))
    x = torch.arange(start, start + length)
    for plan in plans:
        local = plan.shard(x, dim=0, pad_value=-1)
        is_pad = plan.positions >= start + length
        torch.testing.assert_close(local, plan.positions.masked_fill(is_pad, -1))
        told = [torch.arange(begin, stop) for begin, stop in plan.fragments[plan.rank]]
        torch.testing.assert_close(torch.cat([*told, torch.zeros(0).long()]), local[~is_pad])
        assert f"from position {start:,}" in plan.explain()


def test_attention_within_a_chunk_is_the_mask_at_its_positions():
    """Keys before it are not held, and not seen."""
    mask = cpflex.causal() & (lambda b, h, q, k: (q // 50 == k // 50) | (k < 210))
    q, k, v = torch.randn(3, 1, 2, 120, 8)
    at = torch.arange(200, 320)
    score = (q @ k.mT / 8**0.5).masked_fill(~mask(at * 0, at * 0, at[:, None], at), -torch.inf)
    expected = score.softmax(dim=-1) @ v

    def on_rank(group: ThreadLinks) -> torch.Tensor:
        plan = cpflex.make_plan(mask, 120, group, start=200)
        plan.check()
        local = (plan.shard(x, dim=2, pad_value=torch.nan) for x in (q, k, v))
        return plan.unshard(cpflex.flex_attention(*local, block_mask=plan), dim=2)  # pyright: ignore[reportArgumentType]

    for found in run_ranks(on_rank, world_size=2):
        torch.testing.assert_close(found, expected)


def test_a_first_chunk_is_planned_as_a_whole_sequence_is():
    options: dict[str, Any] = {"rank": 1, "world_size": 2, "layout": cpflex.zigzag}
    alone = cpflex.make_plan(cpflex.causal(), 300, **options)
    for mask, start in ((cpflex.causal(), 0), (cpflex.cached(cpflex.causal(), []), None)):
        assert cpflex.make_plan(mask, 300, start=start, **options).to_bytes() == alone.to_bytes()


@pytest.mark.parametrize("ulysses_size", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plans_of_chunks_travel_as_bytes_and_are_checked(layout: str, ulysses_size: int):
    mask = {"full": cpflex.causal(), "sliding": MASKS["window and sinks"](SAMPLE[0])}
    options: dict[str, Any] = {"world_size": 4, "layout": LAYOUTS[layout], "ulysses_size": ulysses_size}
    for rank in range(4):
        plans: list[cpflex.Plan] = []
        for begin, end in pairwise(BOUNDS):
            kinds = {kind: cpflex.cached(one, plans) for kind, one in mask.items()}
            plans.append(cpflex.make_plan(kinds, end - begin, rank=rank, **options))
        plan = cpflex.Plan.from_bytes(plans[-1].to_bytes())
        assert plan.to_bytes() == plans[-1].to_bytes()
        assert pickle.loads(pickle.dumps(plan)).fingerprint == plan.fingerprint
        for kind in mask:
            assert plan[kind].kv_local_len == sum(one.local_len for one in plans)
            held = torch.cat([one.positions[one.positions < one.layout.end] for one in plans])
            found = plan[kind].kv_positions
            torch.testing.assert_close(found[found < BOUNDS[-1]], held)
        assert "290 of 2 earlier chunks, from position 0, and the 11 tokens of this one" in plan.explain()


@pytest.mark.parametrize("seed", range(12))
def test_joined_keys_are_each_shard_after_the_other(seed: int):
    random = np.random.default_rng(seed)
    world_size, start, parts = int(random.integers(1, 5)), 0, []
    for name in random.choice(list(LAYOUTS), 3):
        start += int(random.integers(0, 50))
        part = LAYOUTS[name](int(random.integers(1, 400)), world_size, None)
        parts.append(replace(part, start=start))
        start = parts[-1].end
    joined = Joined(tuple(parts))
    for rank in range(world_size):
        found = joined.positions(rank)
        expected = np.concatenate([np.where((at := part.positions(rank)) < part.end, at, -1) for part in parts])
        np.testing.assert_array_equal(np.where(found < joined.end, found, -1), expected)
    everywhere = np.concatenate([joined.positions(rank) for rank in range(world_size)])
    assert len(np.unique(everywhere)) == len(everywhere)
    assert (everywhere < joined.end).sum() == joined.seq_len


def test_balanced_deals_a_chunk_out_by_the_work_over_all_keys_so_far():
    early = cpflex.causal() & (lambda b, h, q, k: (k >= 2048) | (q < 2304))  # a quarter of the queries see the cache
    options: dict[str, Any] = {"rank": 0, "world_size": 4}
    plans = _plans(early, (0, 2048, 3072), **options)
    assert plans[-1].stats["imbalance"] < 1.3
    within = cpflex.make_plan(early, 1024, start=2048, **options).layout
    as_within = cpflex.make_plan(
        cpflex.cached(early, plans[:1]), 1024, layout=lambda *_: replace(within, start=0), **options
    )
    assert as_within.stats["imbalance"] > 1.3


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
def test_chunks_plan_without_unproven_tiles(mask: str):
    for result in on_threads(P(mask, BOUNDS)):
        assert result["unproven"] == [0, 0, 0]


def test_chunks_of_a_sequence_compile_to_one_graph():
    graphs = 0

    def counted(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v, plan: cpflex.flex_attention(q, k, v, block_mask=plan), fullgraph=True, backend=counted
    )
    mask, k = MASKS["window and sinks"](SAMPLE[0]), torch.randn(1, 2, 512, 8)
    for plan in _plans(mask, (0, 128, 256, 384, 512)):
        keys = k[:, :, : plan.kv_local_len].clone()
        torch._dynamo.maybe_mark_dynamic(keys, 2)
        found = compiled(keys[:, :, -128:].contiguous(), keys, keys, plan)
        torch.testing.assert_close(found, cpflex.flex_attention(keys[:, :, -128:], keys, keys, block_mask=plan))
    assert graphs <= 2, "one for keys of the queries' length, one for all others"


def test_a_chunk_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    plan = _plans(cpflex.causal(), BOUNDS, rank=0, world_size=2)[-1]
    plan.plot(str(tmp_path / "chunk.png"))
    assert (tmp_path / "chunk.png").stat().st_size > 10_000


# -- refusals

IDS = torch.arange(300) // 40


def _earlier(length: int = 100, world_size: int = 2, **options: Any) -> cpflex.Plan:
    return cpflex.make_plan(cpflex.causal(), length, rank=0, world_size=world_size, **options)


def _next(mask: Any, length: int = 100, **options: Any) -> cpflex.Plan:
    return cpflex.make_plan(mask, length, rank=0, world_size=2, **options)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a start that is none": (lambda: _next(cpflex.causal(), start=-1), ValueError, "start must be an integer"),
    "an end too far": (lambda: _next(cpflex.causal(), start=2**31 - 100), ValueError, "below 2\\*\\*31"),
    "a start before the end of earlier chunks": (
        lambda: _next(cpflex.cached(cpflex.causal(), [_earlier()]), start=99),
        ValueError, "earlier chunks end at 100 and this one starts at 99",
    ),
    "a start that leaves out keys": (
        lambda: _next(cpflex.cached(cpflex.causal(), [_earlier()]), start=101),
        ValueError, "of the queries at 101 to 200 some may see keys at 100 to 100",
    ),
    "a kind whose last keys are missing": (
        lambda: _next({"a": cpflex.cached(cpflex.causal(), [_earlier()]), "b": cpflex.cached(cpflex.causal(), [_earlier(90)])}),
        ValueError, "'b': of the queries at 100 to 199 some may see keys at 90 to 99",
    ),
    "pads too far": (
        lambda: _next(cpflex.causal(), 90, start=2**31 - 92), ValueError, "tokens end at 2147483646 and their pads at"
    ),
    "pads of earlier chunks too far": (
        lambda: _next(cpflex.cached(lambda b, h, q, k: q == k, [_earlier(1)]), 64, start=2**31 - 66, layout=cpflex.contiguous),
        ValueError, "tokens end at 2147483646 and their pads at 2147483677",
    ),
    "a later chunk without earlier ones": (
        lambda: _next(cpflex.cached(cpflex.causal(), []), start=100), ValueError, "no earlier ones are given"
    ),
    "chunks out of order": (
        lambda: cpflex.cached(cpflex.causal(), [_earlier(), _earlier()]), ValueError, "must follow one another"
    ),
    "one plan": (lambda: cpflex.cached(cpflex.causal(), _earlier()), TypeError, "a list of the plans"),  # pyright: ignore[reportArgumentType]
    "chunks of other ranks": (
        lambda: _next(cpflex.cached(cpflex.causal(), [_earlier(world_size=4)])), ValueError, "by 2 ranks and keys of"
    ),
    "a chunk left out that the mask reaches": (
        lambda: _next(cpflex.cached(cpflex.causal(), [_earlier(start=100)])),
        ValueError, "of the queries at 200 to 299 some may see keys at 0 to 99",
    ),
    "a table that ends before the chunk": (
        lambda: _next(lambda b, h, q, k: IDS[q] == IDS[k], start=201), ValueError, "of 300 elements with q_idx"
    ),
    "documents that end before the chunk": (
        lambda: _next(cpflex.document(IDS), start=201), ValueError, "made for \\[300\\] tokens; end of the chunk=301"
    ),
    "documents of more tokens than a whole sequence": (
        lambda: _next(cpflex.document(IDS)), ValueError, "made for \\[300\\] tokens; seq_len=100"
    ),
    "a recurrent layer": (
        lambda: make_chain(_next(cpflex.causal(), start=100)), NotImplementedError, "a chunk that starts at 100"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_chunk_is_refused_by_name(case: str):
    make, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        make()


def test_chunks_that_a_window_has_left_may_be_left_out_with_their_keys():
    whole, tensors = MASKS["window and sinks"](SAMPLE[0]), torch.randn(3, 1, 2, 500, 8)
    bounds = (0, 50, 200, 380, 500)
    at = torch.arange(500)
    score = (tensors[0] @ tensors[1].mT / 8**0.5).masked_fill(~whole(at * 0, at * 0, at[:, None], at), -torch.inf)
    expected = (score.softmax(dim=-1) @ tensors[2])[:, :, 380:]

    def on_rank(group: ThreadLinks) -> torch.Tensor:
        plans = _plans(whole, bounds[:-1], group=group)
        kept = [plans[0], plans[2]]
        plan = cpflex.make_plan(cpflex.cached(whole, kept), 120, group)
        plan.check()
        spans = ((0, 50), (200, 380), (380, 500))
        shards = [
            one.shard(tensors[:, :, :, slice(*span)], dim=3, pad_value=torch.nan)
            for one, span in zip((*kept, plan), spans, strict=True)
        ]
        _, k, v = torch.cat(shards, dim=3)
        return plan.unshard(cpflex.flex_attention(shards[-1][0], k, v, block_mask=plan), dim=2)  # pyright: ignore[reportArgumentType]

    for found in run_ranks(on_rank, world_size=2):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_chunk_before_may_be_left_out_too_where_the_new_one_says_where_it_begins(world_size: int):
    """Sinks, and a window that has left all else behind."""
    whole = cpflex.causal() & (cpflex.document(torch.arange(500) // 256) | (lambda b, h, q, k: k < 4))
    q, k, v = torch.randn(3, 1, 2, 500, 8)
    at = torch.arange(500)
    score = (q @ k.mT / 8**0.5).masked_fill(~whole(at * 0, at * 0, at[:, None], at), -torch.inf)
    expected = (score.softmax(dim=-1) @ v)[:, :, 256:376]

    def on_rank(group: ThreadLinks) -> tuple[torch.Tensor, torch.Tensor]:
        first = cpflex.make_plan(cpflex.cached(whole, []), 50, group)
        plan = cpflex.make_plan(cpflex.cached(whole, [first]), 120, group, start=256)
        cpflex.Plan.from_bytes(plan.to_bytes()).check()
        shards = [
            one.shard(torch.stack([q, k, v])[:, :, :, one.start : one.layout.end], dim=3, pad_value=torch.nan)
            for one in (first, plan)
        ]
        _, keys, values = torch.cat(shards, dim=3)
        found = cpflex.flex_attention(shards[1][0], keys, values, block_mask=plan)
        return plan.unshard(found, dim=2), plan.positions  # pyright: ignore[reportArgumentType]

    results = run_ranks(on_rank, world_size=world_size)
    assert min(positions.min().item() for _, positions in results) == 256
    for found, _ in results:
        torch.testing.assert_close(found, expected)


def test_tables_of_scores_reach_the_end_of_the_chunk_and_keys_are_all_that_are_held():
    bias = torch.zeros(250)
    plans = _plans(cpflex.causal(), (0, 100, 260))
    q, k = torch.randn(1, 2, plans[1].local_len, 8), torch.randn(1, 2, plans[1].kv_local_len, 8)
    with pytest.raises(ValueError, match="250 elements with a position; the plan has positions up to 259"):
        cpflex.flex_attention(q, k, k, lambda s, b, h, i, j: s + bias[j], plans[1])
    later = cpflex.make_plan(cpflex.cross(cpflex.full(), cpflex.make_plan(cpflex.causal(), 60, start=200)), 30)
    q_of_30 = torch.randn(1, 2, later.local_len, 8)
    k_of_60 = torch.randn(1, 2, later.kv_local_len, 8)
    with pytest.raises(ValueError, match="250 elements with a position; the plan has positions up to 259"):
        cpflex.flex_attention(q_of_30, k_of_60, k_of_60, lambda s, b, h, i, j: s + bias[j], later)
    with pytest.raises(
        ValueError, match=r"they are \[\d+, \d+\] of the chunks whose plans were given to cpflex.cached"
    ):
        cpflex.flex_attention(q, k[:, :, :-1], k[:, :, :-1], block_mask=plans[1])


def test_ranks_of_different_chunks_are_told_so():
    def on_rank(group: ThreadLinks) -> None:
        plan = cpflex.make_plan(cpflex.causal(), 128, group, start=256 * group.rank, layout=cpflex.zigzag)
        q = torch.randn(1, 2, plan.local_len, 8)
        with pytest.raises(cpflex.RankMismatch, match=r"the ranks disagree about (layout|start)"):
            cpflex.flex_attention(q, q, q, block_mask=plan)

    run_ranks(on_rank, world_size=2)


def test_a_traced_mask_of_a_chunk_is_false_from_its_end_on():
    graph = traced(cpflex.full(), 10, None, None, {}, 20)
    assert [x.item() for x in graph.captured] == [30]

"""Queries and keys of two lengths: what N ranks compute is one dense attention's, forward and all gradients."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import cpflex
from cases import LAYOUTS
from cpflex.mods.intervals import EMPTY
from cpflex.testing import ThreadLinks, run_ranks
from cross_cases import EVERYWHERE, MASKS, CrossProblem, assert_right, attend, on_threads
from processes import RankProcesses

P = CrossProblem
SAMPLE = [
    P("full", 127, 300, "contiguous", "balanced", "ring", 2),
    P("monotonic", 300, 900, "striped", "zigzag", "direct", 3, score=False),
    P("band", 700, 100, "zigzag", "balanced", "auto", 4, "mqa", "d24"),
    P("images so far", 300, 321, EVERYWHERE, "balanced", "direct", 3),
    P("images so far", 300, 321, "balanced", "balanced", "relay:2", 4, score=False),
    P("documents", 321, 127, "zigzag", "contiguous", "even:3", 2),
    P("varlen", 64, 700, "contiguous", "striped", "ring:both", 3, "mha", score=False),
    P("block diffusion", 100, 200, EVERYWHERE, "zigzag", "auto", 2, score=False),
    P("random table", 5, 321, "striped", "contiguous", "direct", 4),
    P("by head and batch", 300, 100, "zigzag", "balanced", "ring", 2, "mqa"),
    P("by head and batch", 130, 260, "zigzag", "balanced", "direct", 4, ulysses_size=2),
    P("nothing", 127, 1, "contiguous", "contiguous", "auto", 2),
    P("full", 1, 900, "balanced", "contiguous", "gather", 3, score=False),
    P("documents", 127, 300, "contiguous", "zigzag", "striped:1/2", 4, score=False),
    P("full", 700, 7, EVERYWHERE, "balanced", "relay:2", 4),
    P("monotonic", 127, 300, "contiguous", "contiguous", "ring", 1),
    P("full", 256, 1024, "contiguous", "contiguous", "direct", 2, score=False),
]  # fmt: skip


@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_attention_to_another_sequence_is_one_dense_attention(problem: CrossProblem):
    assert_right(problem, on_threads(problem))


@pytest.mark.parametrize(
    "problem", [replace(SAMPLE[i], world_size=2) for i in (0, 2, 3)] + [SAMPLE[4], SAMPLE[10]], ids=str
)
def test_processes_compute_attention_to_another_sequence(problem: CrossProblem, request: pytest.FixtureRequest):
    processes: RankProcesses = request.getfixturevalue({2: "two_processes", 4: "four_processes"}[problem.world_size])
    assert_right(problem, processes.run(attend, replace(problem)))  # what it made for itself does not travel


@pytest.mark.by_day(3)
@pytest.mark.parametrize("keys", [EVERYWHERE, *LAYOUTS])
@pytest.mark.parametrize("mask", MASKS)
def test_a_plan_of_two_sequences_travels_as_bytes_and_is_checked(mask: str, keys: str):
    problem = P(mask, 127, 300, keys, world_size=2)
    for rank in range(2):
        plan, _ = problem.plans(rank=rank, world_size=2)
        plan.check()
        again = cpflex.Plan.from_bytes(plan.to_bytes())
        assert again.to_bytes() == plan.to_bytes()
        assert (again["cross"].kv_seq_len, again["cross"].kv_local_len) == (300, plan["cross"].kv_local_len)
        assert pickle.loads(pickle.dumps(plan)).fingerprint == plan.fingerprint
        assert plan["cross"].explain()


def test_a_plan_whose_keys_were_changed_is_refused():
    plan, _ = P("monotonic").plans(rank=0, world_size=2)
    kind = plan.kinds["cross"]
    assert kind.keys is not None
    for keys in (replace(kind.keys, seq_len=299), replace(kind.keys, chunks=kind.keys.chunks[::-1])):
        plan.kinds["cross"] = replace(kind, keys=keys)
        with pytest.raises(ValueError, match="the plan is wrong"):
            plan.check()


def test_square_kinds_beside_a_cross_kind_are_planned_as_without():
    masks = {"self": cpflex.causal() & cpflex.sliding_window(40)}
    options = {"rank": 1, "world_size": 2, "layout": cpflex.zigzag}
    alone = cpflex.make_plan(masks, 300, **options)
    beside = cpflex.make_plan(masks | {"cross": cpflex.cross(cpflex.full(), 50)}, 300, **options)
    assert beside.kinds["self"].facts == alone.kinds["self"].facts
    assert beside["self"].to_bytes() == alone.to_bytes()


def test_balanced_counts_the_work_of_a_cross_kind_over_fixed_keys():
    encoder = cpflex.make_plan(cpflex.full(), 4096, rank=0, world_size=4, layout=cpflex.contiguous)
    late = cpflex.cross(lambda b, h, q, k: q >= 3072, encoder)
    plan = cpflex.make_plan(late, 4096, rank=0, world_size=4)
    assert plan.stats["imbalance"] < 1.05
    assert cpflex.make_plan(late, 4096, rank=0, world_size=4, layout=cpflex.contiguous).stats["imbalance"] == 4
    nodes = cpflex.Topology(gpus_per_node=2, intra_gb_per_s=370.0, inter_gb_per_s=47.0)
    for keys, most in ((encoder, 2), (4096, 1.05)):  # who sees no keys receives none, which is worth waiting for
        plan = cpflex.make_plan(cpflex.cross(late.mask, keys), 4096, rank=0, world_size=4, topology=nodes)
        assert plan.stats["imbalance"] <= most


@pytest.mark.parametrize("keys", [EVERYWHERE, "zigzag"])
def test_a_plan_of_two_sequences_is_explained_and_drawn_as_a_rectangle(keys: str, tmp_path: Path):
    pytest.importorskip("matplotlib")
    plan, _ = P("band", 300, 900, keys, world_size=2).plans(rank=1, world_size=2)
    text = plan.explain()
    assert "900 of another sequence, " + ("all on every rank" if keys == EVERYWHERE else "zigzag: 2 chunks") in text
    assert "future keys are visible" not in text
    plan.plot(str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").stat().st_size > 0


@pytest.mark.parametrize("keys", [EVERYWHERE, "zigzag"])
def test_what_is_drawn_is_the_mask_on_its_own_axes(keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    explaining, painted = importlib.import_module("cpflex.seeing.explain"), []
    monkeypatch.setattr(explaining, "_paint", lambda ax, verdicts, colors, extent: painted.append((verdicts, extent)))
    problem = P("monotonic", 300, 900, keys, world_size=2)
    plan = problem.plans(rank=1, world_size=2)[0]["cross"]
    plan.plot(str(tmp_path / "plan.png"))
    (verdicts, (left, right, bottom, top)), *_ = painted
    (rows, columns), seen = verdicts.shape, problem.mask_mod
    assert (left, top) == (0, 0) and 300 <= bottom < 300 + bottom // rows and 900 <= right < 900 + right // columns
    q, k = (torch.arange(n).clamp(max=most - 1) for n, most in ((bottom, 300), (right, 900)))
    dense = seen(torch.tensor(0), torch.tensor(0), q[:, None], k).view(rows, bottom // rows, columns, right // columns)
    assert torch.equal(torch.from_numpy(verdicts != EMPTY), dense.any(dim=3).any(dim=1))


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no number of keys": (lambda: cpflex.cross(cpflex.full(), 0), ValueError, "keys must be a plan, or a number of keys"),
    "keys of other ranks": (
        lambda: cpflex.make_plan(
            cpflex.cross(cpflex.full(), cpflex.make_plan(cpflex.full(), 100, rank=0, world_size=4)), 60, rank=0, world_size=2
        ),
        ValueError,
        "the queries are shared by 2 ranks and the keys by 4",
    ),
    "keys that exchange heads otherwise": (
        lambda: cpflex.make_plan(
            cpflex.cross(cpflex.full(), cpflex.make_plan(cpflex.full(), 128, rank=0, world_size=2)),
            64, rank=0, world_size=2, ulysses_size=2,
        ),
        ValueError,
        "exchanges heads among 2 ranks, and the plan of its keys among 1",
    ),
    "keys on every rank where heads are exchanged": (
        lambda: cpflex.make_plan(cpflex.cross(cpflex.full(), 100), 64, rank=0, world_size=2, ulysses_size=2),
        NotImplementedError,
        "all its keys on every rank, of which 2 would exchange heads",
    ),
    "a mask of other lengths": (
        lambda: cpflex.make_plan(
            cpflex.cross(cpflex.document(torch.zeros(60).int(), kv_ids=torch.zeros(100).int()), 60), 100
        ),
        ValueError,
        r"was made for \(queries, keys\) \[\(60, 100\)\]; these are 100 queries and 60 keys",
    ),
    "a mask of two lengths as a square": (
        lambda: cpflex.make_plan(cpflex.document(torch.zeros(60).int(), kv_ids=torch.zeros(100).int()), 100),
        ValueError,
        r"was made for \[60, 100\] tokens; seq_len=100",
    ),
    "a table too short for the keys": (
        lambda: cpflex.make_plan(cpflex.cross(lambda b, h, q, k: SHORT[k] > 0, 101), 50),
        ValueError,
        "indexes a captured tensor of 100 elements with kv_idx; number of keys=101",
    ),
    "ids of the keys alone": (
        lambda: cpflex.document(cu_seqlens=[0, 5], kv_ids=torch.zeros(5).int()), ValueError, "kv_ids go with doc_ids"
    ),
}  # fmt: skip
SHORT = torch.ones(100)


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_plan_of_two_sequences_is_refused_by_name(case: str):
    make, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        make()


CALLS: dict[str, tuple[dict[str, int], dict[str, Any], str]] = {
    "keys of the queries' length": (
        {"key": 64, "value": 64},
        {},
        "key has 64 tokens and the plan has kv_local_len=160",
    ),
    "keys without values": ({"value": 159}, {}, "key and value must have one length; got 160 and 159"),
    "queries of the keys' length": ({"query": 160}, {}, "query has 160 tokens and the plan has local_len=64"),
    "a score table too short for the keys": (
        {},
        {"score_mod": lambda s, b, h, q, k: s + SHORT[k]},
        "captured tensor of 100 elements with a position; the plan has kv_seq_len=300",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_wrong_lengths_of_two_sequences_are_refused_on_every_rank(case: str):
    lengths, options, message = CALLS[case]

    def on_rank(group: ThreadLinks) -> None:
        plan, _ = P(q_len=120, kv_len=300, layout="zigzag").plans(group)
        right = {"query": 64, "key": 160, "value": 160}
        is_wrong = group.rank == 0
        sizes = right | lengths if is_wrong else right
        given = {name: torch.randn(2, 4, tokens, 8) for name, tokens in sizes.items()}
        with pytest.raises((ValueError, cpflex.RankMismatch), match=message):
            cpflex.flex_attention(**given, block_mask=plan["cross"], **(options if is_wrong else {}))

    run_ranks(on_rank, world_size=2)


def test_ranks_whose_keys_are_laid_out_differently_are_told_so():
    def on_rank(group: ThreadLinks) -> None:
        plan, _ = replace(P(), keys="zigzag" if group.rank else "contiguous").plans(group)
        q = torch.randn(2, 4, plan.local_len, 8)
        k = torch.randn(2, 4, plan["cross"].kv_local_len, 8)
        with pytest.raises(cpflex.RankMismatch, match="layout of the keys"):
            cpflex.flex_attention(q, k, k, block_mask=plan["cross"])

    run_ranks(on_rank, world_size=2)


def test_plans_of_many_keys_compile_to_one_graph_and_checkpoint():
    compiled = torch.compile(
        lambda q, k, v, plan: cpflex.flex_attention(q, k, v, block_mask=plan, enable_gqa=True),
        fullgraph=True,
        backend="aot_eager",
    )
    for mask in (cpflex.full(), lambda b, h, q, k: k <= 2 * q):
        plan = cpflex.make_plan(cpflex.cross(mask, 300), 127)
        tensors = [torch.randn(1, h, n, 8, requires_grad=True) for h, n in ((4, plan.local_len), (2, 300), (2, 300))]
        found, expected = (
            f(*tensors, plan) for f in (compiled, lambda *x: cpflex.flex_attention(*x[:3], None, x[3], enable_gqa=True))
        )
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(x.square().sum(), tensors) for x in (found, expected)]
        torch.testing.assert_close(*grads)


def test_mask_formats_of_two_lengths_plan_without_unproven_tiles():
    formats = {
        "varlen": cpflex.masks_from.varlen([0, 400, 1000], [0, 900, 3000], causal=True, window_size=(200, 0)),
        "ranges": cpflex.masks_from.ranges(
            [[0, 500], [500, 1000]], [[0, 1500], [0, 3000]], [0, 1], q_len=1000, kv_len=3000
        ),
    }
    for name, mask in formats.items():
        plan = cpflex.make_plan(cpflex.cross(mask, 3000), 1000)
        assert plan.stats["unproven_tiles"] == 0, name


@pytest.mark.parametrize("chunks", [[0, 300], [0, 120, 300]])
def test_a_prompt_in_chunks_sees_through_windows_and_sinks_what_the_whole_one_does(chunks: list[int]):
    whole = cpflex.causal() & (cpflex.sliding_window(90) | (lambda b, h, q, k: k < 4))
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 16, generator=random) for _ in range(3))
    expected = cpflex.flex_attention(q, k, v, block_mask=cpflex.make_plan(whole, 300, layout=_as_it_is))

    def on_rank(group: ThreadLinks) -> torch.Tensor:
        parts = []
        for begin, end in pairwise(chunks):
            start = torch.tensor(begin)
            cache = cpflex.make_plan(cpflex.causal(), end, group, layout=cpflex.striped)
            mask = cpflex.cross(lambda b, h, q, k, start=start: whole(b, h, q + start, k), cache)
            plan = cpflex.make_plan(mask, end - begin, group)
            keys = (cache.shard(x[:, :, :end], dim=2, pad_value=torch.nan) for x in (k, v))
            out = cpflex.flex_attention(plan.shard(q[:, :, begin:end], dim=2, pad_value=0.0), *keys, block_mask=plan)
            assert isinstance(out, torch.Tensor)
            parts.append(plan.unshard(out, dim=2))
        return torch.cat(parts, dim=2)

    for found in run_ranks(on_rank, world_size=3):
        torch.testing.assert_close(found, expected)


def _as_it_is(seq_len: int, world_size: int, work: Any = None) -> cpflex.Layout:
    return cpflex.Layout(seq_len, seq_len, ((0,),), "as it is")


@pytest.mark.parametrize("lengths", [(120, 300), (300, 120)], ids=str)
def test_a_torch_block_mask_of_two_lengths_is_its_mask_mod(lengths: tuple[int, int]):
    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= 2 * q) & ((k + h) % 5 != 0)

    q_len, kv_len = lengths
    block_mask = create_block_mask(mask_mod, None, 4, q_len, kv_len, device="cpu")
    q, (k, v) = torch.randn(2, 4, q_len, 16), torch.randn(2, 2, 4, kv_len, 16)
    score = (q @ k.mT / 4).masked_fill(~block_mask_dense(mask_mod, lengths), -torch.inf)
    expected = score.softmax(dim=-1).nan_to_num() @ v
    torch.testing.assert_close(cpflex.flex_attention(q, k, v, block_mask=block_mask), expected)


def block_mask_dense(mask_mod: Callable[..., torch.Tensor], lengths: tuple[int, int]) -> torch.Tensor:
    """bool [4, Q, K]"""
    h, q, k = (torch.arange(n) for n in (4, *lengths))
    return mask_mod(torch.tensor(0), h[:, None, None], q[:, None], k)

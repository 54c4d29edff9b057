"""Heads exchanged inside, keys outside: the zoo on grids of ranks, and everything else that a plan of one dim does."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention.flex_attention import AuxRequest
from torch.utils.checkpoint import checkpoint

import cpflex
from cases import DIMS, DTYPES, FACTORS, HEADS_OF_GRIDS, Problem, pairwise
from cpflex.ring.handles import resolve
from cpflex.ring.heads import why_not_divided
from cpflex.testing import ThreadLinks, run_ranks
from grids import SHAPES, in_two_groups, mesh_of, num_ranks, two_groups
from oracle import assert_within_budget
from processes import RankProcesses
from runs import TOKEN_TENSORS, assemble, attend_on_rank
from test_fp32_bar import Bar, check
from test_fp32_bar import attend as attend_at_the_bar
from test_probes import HUGE, changed, document_ids, redrawn

GROUPS = ("one group", "two groups")


def on_shape(shape: str, **row: Any) -> Problem:
    return Problem(**row, world_size=num_ranks(shape), ulysses_size=SHAPES[shape])


GRIDS = FACTORS | {"heads": list(HEADS_OF_GRIDS), "groups": GROUPS, "shape": list(SHAPES)}
ROWS = pairwise({name: values for name, values in GRIDS.items() if name != "world_size"})
SAMPLE = [(row.pop("groups"), on_shape(row.pop("shape"), **row)) for row in ROWS]


def attend(group: Any, problem: Problem, groups: str, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    if groups == "two groups":
        group = in_two_groups(group, problem.ulysses_size)
    return attend_on_rank(group, problem, tensors)


def on_threads(problem: Problem, groups: str, tensors: dict[str, Tensor] | None = None) -> list[dict[str, Any]]:
    fn = partial(attend, problem=problem, groups=groups, tensors=tensors)
    return run_ranks(fn, problem.world_size, timeout=60)


@pytest.mark.by_day(24)
@pytest.mark.parametrize(("groups", "problem"), SAMPLE, ids=lambda x: str(x))
def test_grids_compute_what_one_dense_attention_does(groups: str, problem: Problem):
    results = on_threads(problem, groups)
    assert_within_budget(assemble(results), problem.dense(torch.float32), problem.dense())


OF_HEADS = [
    on_shape("2x2", mask="window_per_head", score="relative_bias", heads="gqa", seq_len=321, layout="balanced"),
    on_shape("2x2", mask="head_and_batch", score="alibi", heads="mqa4", seq_len=127, dtype="bf16", schedule="ring"),
    on_shape("2x4", mask="window_per_head", score="relative_bias", heads="gqa", seq_len=321, schedule="direct"),
    on_shape("1x4", mask="window_per_head", score="alibi", heads="mha4", seq_len=300),
    on_shape("2x4", mask="padding", score="key_bias", heads="mqa4", seq_len=300, dims="d16dv24", layout="striped"),
    Problem("window_per_head", "relative_bias", 321, "mqa", layout="zigzag", world_size=6, ulysses_size=3),
    Problem("doc_causal", "alibi", 5, "mqa", layout="striped", world_size=6, ulysses_size=3),
]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("problem", OF_HEADS, ids=str)
def test_masks_and_scores_of_single_heads_are_those_of_the_whole_model(problem: Problem, groups: str):
    """Three heads on three ranks, too: shards are lengthened until three can share them."""
    assert_within_budget(assemble(on_threads(problem, groups)), problem.dense(torch.float32), problem.dense())


ON_PROCESSES = [
    on_shape("2x2", mask="causal", seq_len=321, heads="gqa", dims="d16dv24", schedule="ring"),
    on_shape("2x2", mask="window_per_head", score="relative_bias", seq_len=300, heads="mqa4", dtype="bf16"),
    on_shape("2x2", mask="padding", score="softcap", seq_len=127, heads="mha4", dtype="fp16", schedule="direct"),
    on_shape("1x4", mask="doc_causal", score="alibi", seq_len=300, heads="gqa"),
]


def attend_on_groups(group: dist.ProcessGroup, problem: Problem, how: str) -> dict[str, Any]:
    size = problem.ulysses_size
    if how == "flat":
        return attend_on_rank(group, problem)
    mesh = mesh_of(group, size)
    if how == "mesh":
        return attend_on_rank(mesh, problem)
    return attend_on_rank((mesh["heads"], mesh["cp"].get_group()), problem)


@pytest.mark.parametrize("how", ["flat", "mesh", "two groups"])
@pytest.mark.parametrize("problem", ON_PROCESSES, ids=str)
def test_processes_in_grids_compute_what_one_dense_attention_does(
    problem: Problem, how: str, four_processes: RankProcesses
):
    results = four_processes.run(attend_on_groups, problem, how)
    assert_within_budget(assemble(results), problem.dense(torch.float32), problem.dense())


# -- one dim of a mesh is called heads, or is the first


def ranks_of_meshes(group: dist.ProcessGroup) -> list[tuple[int, int]]:
    made = []
    for names in (("cp", "heads"), ("heads", "cp"), ("a2a", "ring"), None):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        plan = cpflex.make_plan(cpflex.causal(), 64, mesh)
        made.append((plan.rank, plan.ulysses_size))
    return made


def test_the_dim_of_heads_is_that_of_the_name_or_the_first(four_processes: RankProcesses):
    outside_in, inside_out = [0, 1, 2, 3], [0, 2, 1, 3]  # by rank of the job: plan.rank
    found = four_processes.run(ranks_of_meshes)
    for place, expected in enumerate((outside_in, inside_out, inside_out, inside_out)):
        assert [ranks[place] for ranks in found] == [(rank, 2) for rank in expected]


# -- what one dim does


def bits(problem: Problem, groups: str) -> list[Tensor]:
    results = on_threads(problem, groups)
    return [x for rank in results for x in (*(rank[name] for name in TOKEN_TENSORS), *rank["d_captured"])]


@pytest.mark.parametrize("score", ["none", "relative_bias"])
def test_a_grid_of_either_kind_gives_the_same_bits_at_every_run(score: str):
    problem = on_shape("2x4", mask="doc_causal", score=score, heads="gqa", dtype="bf16", layout="balanced")
    first = bits(problem, "one group")
    for groups in GROUPS:
        assert all(map(torch.equal, first, bits(problem, groups)))


def test_a_row_of_one_rank_is_as_if_there_were_none():
    problem = on_shape("2x1", mask="doc_causal", score="relative_bias", heads="gqa", seq_len=321)
    plain = dataclasses.replace(problem, ulysses_size=1)
    without = run_ranks(partial(attend_on_rank, problem=plain, ulysses_size=None), 2)
    for groups in GROUPS:
        for rank, other in zip(on_threads(problem, groups), without, strict=True):
            assert all(torch.equal(rank[name], other[name]) for name in TOKEN_TENSORS)


def bytes_sent(group: ThreadLinks, problem: Problem) -> tuple[int, int, cpflex.Plan]:
    attend_on_rank(group, problem)
    return group.num_exchanges, group.bytes_sent, problem.plan(group)


@pytest.mark.parametrize("heads", ["mha4", "gqa", "mqa4"])
@pytest.mark.parametrize("shape", ["2x2", "2x4", "1x4"])
def test_bytes_are_those_of_the_heads_and_of_the_plan(shape: str, heads: str):
    """q, k, v and grad_out go to other ranks of the row, out, dq, dk and dv come back; keys travel with a rank's heads."""
    problem = on_shape(shape, mask="causal", heads=heads, dtype="bf16", schedule="ring", seq_len=384, dims="d16dv24")
    (query_heads, kv_heads), (dim, v_dim) = problem.all_heads, DIMS[problem.dims]
    size, batch, itemsize = problem.ulysses_size, problem.batch_size, DTYPES[problem.dtype].itemsize
    mine = max(1, kv_heads // size)
    of_summed = 4 if kv_heads < size else itemsize
    for _, sent, plan in run_ranks(partial(bytes_sent, problem=problem), problem.world_size):
        per_token = query_heads // size * (2 * dim + 2 * v_dim) * itemsize + query_heads // size * 2 * 4
        per_token += mine * (dim + v_dim) * (itemsize + of_summed)
        of_heads = (size - 1) * batch * plan.local_len * per_token
        rows = 2 * plan.stats["sent_tokens"] * itemsize  # in forward and in backward
        grads = sum(t.num_rows for step in plan.steps for t in step.exchange.grad_sends) * 4
        assert sent == of_heads + batch * mine * (dim + v_dim) * (rows + grads)


def test_other_documents_are_not_heard_of():
    problem = on_shape("2x4", mask="doc_causal", score="relative_bias", heads="gqa", seq_len=512)
    ids = document_ids(problem)
    inside = ids == ids[200]
    before = assemble(on_threads(problem, "one group")).named()
    for change in (redrawn, lambda x: redrawn(x).sign() * HUGE):
        tensors = changed(problem, inside, change, "q k v")
        after = assemble(on_threads(problem, "one group", tensors)).named()
        for name in TOKEN_TENSORS:
            assert torch.equal(before[name][:, :, ~inside], after[name][:, :, ~inside]), f"{name} moved"
        assert not torch.equal(before["out"][:, :, inside], after["out"][:, :, inside])


def test_what_a_head_does_not_see_does_not_reach_it():
    """One head of keys changes: the query heads of the others stay, bit by bit, also where a rank has both."""
    problem = on_shape("2x2", mask="causal", heads="mha4", seq_len=300)
    tensors = {name: x.clone() for name, x in problem.tensors.items()}
    tensors["k"][:, 2], tensors["v"][:, 2] = HUGE, -HUGE
    before, after = (assemble(on_threads(problem, "one group", x)).named() for x in (None, tensors))
    others = [0, 1, 3]
    for name in TOKEN_TENSORS:
        assert torch.equal(before[name][:, others], after[name][:, others]), name


@pytest.mark.by_day(3)
@pytest.mark.parametrize("shape", ["1x2", "2x2", "2x4"])
@pytest.mark.parametrize("mask", ["causal", "documents"])
def test_grids_meet_the_bar_of_fp32(mask: str, shape: str):
    bar = Bar(mask, 64, num_ranks(shape))
    check(bar, run_ranks(partial(attend_at_the_bar, bar=bar, ulysses_size=SHAPES[shape]), bar.world_size))


# -- as an operator: compiled, checkpointed, under autocast, with other outputs


class Block(torch.nn.Module):
    """[B, S_local, 32] -> the same."""

    def __init__(self, softcap: Any) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 8 * 16)
        self.out = torch.nn.Linear(4 * 16, 32)
        self.softcap = softcap

    def forward(self, x: Tensor, plan: cpflex.Plan) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (8, 16)).transpose(1, 2).split([4, 2, 2], dim=1)
        out, lse = cpflex.flex_attention(q, k, v, self.softcap, plan, enable_gqa=True, return_lse=True)
        return self.out((out * lse.sigmoid()[..., None]).transpose(1, 2).flatten(2))


BIAS = torch.randn(4, 33, generator=torch.Generator().manual_seed(3))


def block() -> Block:
    torch.manual_seed(0)
    return Block(cpflex.score_mod(lambda s, b, h, q, k: s + BIAS[h, (q - k).clamp(-16, 16) + 16]))


def gradients_of(run: Any, parameters: list[Tensor], x: Tensor, plan: cpflex.Plan) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = run(x, plan)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def as_an_operator(group: dist.ProcessGroup, how: str) -> list[float]:
    """Largest differences from the plain block."""
    problem = on_shape("2x2", mask="window_per_head", heads="gqa", seq_len=300)
    plan = problem.plan(group)
    plain = block()
    x = plan.shard(torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(1)), dim=1, pad_value=0.0)
    run = {
        "compiled": torch.compile(plain, fullgraph=True, backend="aot_eager"),
        "checkpointed": partial(checkpoint, plain, use_reentrant=False),
    }[how]
    pairs = zip(*(gradients_of(f, list(plain.parameters()), x, plan) for f in (run, plain)), strict=True)
    with torch.no_grad():
        pairs = [*pairs, (run(x, plan), plain(x, plan))]
    return [(a - b).abs().max().item() for a, b in pairs]


@pytest.mark.by_day(6)
@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_a_block_on_a_grid_is_compiled_whole_and_checkpointed(how: str, four_processes: RankProcesses):
    for differences in four_processes.run(as_an_operator, how):
        assert max(differences) < 1e-5


def with_all_outputs(group: ThreadLinks, problem: Problem) -> tuple[Tensor, ...]:
    plan = problem.plan(group)
    q, k, v = (plan.shard(problem.tensors[name], 2, pad_value=0.0) for name in "qkv")
    aux = AuxRequest(lse=True, max_scores=True)
    out, found = cpflex.flex_attention(q, k, v, block_mask=plan, enable_gqa=True, return_aux=aux)
    with torch.autocast("cpu", torch.bfloat16):
        again = cpflex.flex_attention(q, k, v, block_mask=plan, enable_gqa=True)
    assert torch.equal(out, again)
    return tuple(plan.unshard(x, 2) for x in (out, found.lse, found.max_scores))


@pytest.mark.parametrize("shape", ["2x2", "1x4"])
def test_lse_and_largest_scores_come_back_to_their_tokens(shape: str):
    problem = on_shape(shape, mask="window_per_head", heads="gqa", seq_len=127)
    alone = dataclasses.replace(problem, world_size=1, ulysses_size=1)
    expected = run_ranks(partial(with_all_outputs, problem=alone), 1)[0]
    for found in run_ranks(partial(with_all_outputs, problem=problem), problem.world_size):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


# -- refusals, and that all ranks hear of them

DIVISIONS = {(8, 2): [1, 2, 4, 8], (4, 4): [1, 2, 4], (6, 1): [1, 2, 3, 6], (12, 6): [1, 2, 3, 6, 12]}


@pytest.mark.parametrize(("query", "kv"), DIVISIONS)
def test_heads_are_divided_as_far_as_they_go_and_other_sizes_are_named(query: int, kv: int):
    sizes = [n for n in range(1, query + 1) if not why_not_divided(query, kv, n)]
    assert sizes == DIVISIONS[query, kv]
    assert f"use one of {', '.join(map(str, sizes))} ranks" in why_not_divided(query, kv, 5)


def plan_of(**options: Any) -> cpflex.Plan:
    return cpflex.make_plan(**({"mask": cpflex.causal(), "seq_len": 300, "rank": 0, "world_size": 4} | options))


def of_odd_shards(seq_len: int, world_size: int, work: Any) -> Any:
    from cpflex.sharding.layout import Layout

    chunk_len = -(-seq_len // world_size) | 1
    return Layout(seq_len, chunk_len, tuple((r,) for r in range(world_size)), "odd")


WINDOWS = torch.tensor([1, 20, 300])
REFUSED = {
    "a size that is no count": ({"ulysses_size": 0}, "ulysses_size must be an integer of at least 1; got 0"),
    "a size that is a bool": ({"ulysses_size": True}, "ulysses_size must be an integer of at least 1"),
    "a size that does not divide the ranks": ({"ulysses_size": 3}, "must divide the ranks of the group; got 3 for 4"),
    "heads of a mask that the ranks do not divide": (
        {"ulysses_size": 2, "num_heads": 3, "mask": lambda b, h, q, k: q - k < WINDOWS[h]},
        "the ranks that exchange heads must divide them; got 2 ranks and num_heads=3",
    ),
    "shards that cannot be shared": (
        {"ulysses_size": 2, "layout": of_odd_shards},
        "layout must give shards that 2 ranks can share equally",
    ),
    "heads of a machine": (
        {"ulysses_size": 4, "topology": cpflex.Topology.named("h100-ib"), "heads": cpflex.Heads(6, 6)},
        "6 query heads and 6 heads of keys cannot be exchanged among 4 ranks",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_grids_are_refused_by_name(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        plan_of(**options)


def call(group: Any, culprit: int, what: str) -> None:
    """One rank makes a mistake, or does something else."""
    size, rank = 2, group.rank if isinstance(group, ThreadLinks) else group.rank()
    wrong = rank == culprit
    mask = cpflex.causal() & cpflex.sliding_window(9) if wrong and what == "another mask" else cpflex.causal()
    grid = in_two_groups(group, size) if what.endswith("in two groups") else group
    plan = cpflex.make_plan(mask, 64, grid, ulysses_size=size, layout=cpflex.zigzag)
    heads, length = (3 if wrong and what.startswith("heads") else 4), plan.local_len
    q = torch.randn(1, heads, length, 16, requires_grad=True)
    cpflex.flex_attention(q, q, q, block_mask=plan).sum().backward()
    if what.startswith("another layer"):
        cpflex.flex_attention(q, q, q, block_mask=plan, scale=0.5 if wrong else None)


MISTAKES = {
    "heads that cannot be divided": "rank {} raised ValueError: 3 query heads and 3 heads of keys cannot be exchanged",
    "heads that cannot be divided, in two groups": "rank {} raised ValueError: 3 query heads",
    "another layer": "disagree about scale: .*group rank {}: 0.5",
    "another layer, in two groups": "disagree about scale: .*group rank {}: 0.5",
    "another mask": "disagree about mask",
}


@pytest.mark.parametrize("culprit", [0, 3])
@pytest.mark.parametrize("what", MISTAKES)
def test_all_ranks_of_a_grid_hear_of_a_mistake(what: str, culprit: int, four_processes: RankProcesses):
    outcomes = four_processes.outcomes(call, culprit, what)
    for rank, outcome in enumerate(outcomes):
        if rank == culprit and what.startswith("heads"):
            assert isinstance(outcome.error, ValueError), outcome.traceback
        else:
            assert isinstance(outcome.error, cpflex.RankMismatch), outcome.traceback
            with pytest.raises(cpflex.RankMismatch, match=MISTAKES[what].format(culprit)):
                raise outcome.error


def no_grids(group: dist.ProcessGroup) -> list[str]:
    mesh = mesh_of(group, 2)
    said = []
    for wrong, options in (
        ((mesh["cp"], mesh["cp"]), {}),
        ((group, mesh["cp"]), {}),
        ((mesh, mesh["cp"]), {}),
        (init_device_mesh("cpu", (1, 2, 2)), {}),
        (mesh, {"ulysses_size": 4}),
    ):
        try:
            cpflex.make_plan(cpflex.causal(), 64, wrong, **options)
        except ValueError as error:
            said.append(str(error))
    try:
        cpflex.make_plan(cpflex.causal(), 64, rank=group.rank(), world_size=4, ulysses_size=4).bind(mesh)
    except ValueError as error:
        said.append(str(error))
    return said


def test_groups_that_are_no_grid_are_refused(four_processes: RankProcesses):
    for one, whole, nested, three, other, bound in four_processes.run(no_grids):
        assert "must have this process alone in common" in one and "must have this process alone in common" in whole
        assert "each of two groups must be of one dim" in nested
        assert "the mesh must be 1-D or 2-D" in three
        assert "among the 2 ranks of their group, for every mask kind; got ulysses_size=4" in other
        assert "made for heads exchanged among 4 ranks; the group exchanges them among 2 ranks" in bound


# -- two groups as one


def mail(group: ThreadLinks, size: int, seed: int) -> bool:
    """Several messages of any size between any two ranks arrive, in the order sent."""
    from cpflex.links.grid import GridLinks

    grid = GridLinks(*two_groups(group, size))
    assert (grid.rank, grid.world_size) == (group.rank, group.world_size)
    random = torch.Generator().manual_seed(seed)
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)
    sends, receives, expected = [], [], []
    for source, target in itertools.product(range(grid.world_size), repeat=2):
        for _ in range(int(torch.randint(3, (), generator=random))):
            dtype = dtypes[int(torch.randint(4, (), generator=random))]
            message = torch.randint(100, (int(torch.randint(1, 9, (), generator=random)),), generator=random).to(dtype)
            if source == target:
                continue
            if source == grid.rank:
                sends.append((target, message))
            if target == grid.rank:
                receives.append((source, torch.empty_like(message)))
                expected.append(message)
    grid.exchange(sends, receives).wait()
    return all(torch.equal(buffer, message) for (_, buffer), message in zip(receives, expected, strict=True))


@pytest.mark.parametrize("shape", ["2x2", "2x4", "4x2", "1x4", "2x1"])
def test_two_groups_carry_any_messages(shape: str):
    for seed in range(4):
        assert all(run_ranks(partial(mail, size=SHAPES[shape], seed=seed), num_ranks(shape)))


def lost(group: ThreadLinks) -> None:
    plan = cpflex.make_plan(cpflex.causal(), 64, group, ulysses_size=2)
    with (
        pytest.raises(ConnectionError, match=f"group rank {group.rank}, at place {group.rank % 2} of 2 ranks .*: gone"),
        resolve(plan.handle).in_words(),
    ):
        raise ConnectionError("gone")


def test_a_connection_that_is_lost_is_told_with_the_rank_of_the_whole_group():
    run_ranks(lost, 4)

"""Two levels: what crosses between nodes, counted by brute force; and attention on four processes as two nodes of two."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist

import cpflex
import fuzz
from cases import NODES_OF_TWO, Problem
from cpflex.ring.agreement import RankMismatch
from oracle import assert_within_budget
from patience import patience
from processes import RankProcesses
from runs import assemble, attend_on_rank
from test_fp32_bar import Bar, check_on_processes

SCHEDULES = {"relay": cpflex.relay(2), "striped": cpflex.relay(2, stripe=True), "small first": cpflex.relay((1, 4))}
TILES = 6
"""Of a shard, in two chunks."""

MASKS = {
    "causal": cpflex.causal(),
    "documents": cpflex.causal() & (lambda b, h, q, k: q // 900 == k // 900),
    "window": cpflex.causal() & cpflex.sliding_window(300),
    "first tokens and window": cpflex.causal()
    & (cpflex.sliding_window(200) | cpflex.prefix_lm(1) & (lambda b, h, q, k: k < 130)),
}


def nodes_of(size: int) -> cpflex.Topology:
    return dataclasses.replace(NODES_OF_TWO, gpus_per_node=size)


def plans_of(mask: str, schedule: str, world_size: int, size: int) -> list[cpflex.Plan]:
    how = {"layout": cpflex.zigzag, "schedule": SCHEDULES[schedule], "topology": nodes_of(size)}
    seq_len = world_size * TILES * 128
    return [cpflex.make_plan(MASKS[mask], seq_len, rank=r, world_size=world_size, **how) for r in range(world_size)]


def needed_by_nodes(mask: str, plan: cpflex.Plan, size: int) -> set[tuple[int, int]]:
    """(tile of the sequence, node) wherever a query of a node sees a key that another node holds; by the mask alone."""
    q, k = torch.arange(plan.seq_len)[:, None], torch.arange(plan.seq_len)[None, :]
    zero = torch.tensor(0)
    seen = MASKS[mask](zero, zero, q, k).expand(plan.seq_len, plan.seq_len)
    by_tile = seen.view(plan.seq_len // 128, 128, -1, 128).any(dim=3).any(dim=1).numpy()
    node = np.repeat(plan.layout.owner, plan.layout.chunk_len // 128) // size
    return {(t, n) for q, t in np.argwhere(by_tile).tolist() if (n := int(node[q])) != node[t]}


@pytest.mark.by_day(3)
@pytest.mark.parametrize(("world_size", "size"), [(4, 2), (8, 4), (8, 3), (5, 2)], ids=lambda n: str(n))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mask", MASKS)
def test_a_tile_crosses_to_a_node_once_if_any_rank_there_needs_it(mask: str, schedule: str, world_size: int, size: int):
    plans = plans_of(mask, schedule, world_size, size)
    crossed: Counter[tuple[int, int]] = Counter()
    held = [{0: tiles_of(plan, rank)} for rank, plan in enumerate(plans)]
    for index in range(len(plans[0].steps)):
        mail: dict[tuple[int, int], list[np.ndarray]] = {}
        for rank, plan in enumerate(plans):
            for t in plan.steps[index].exchange.sends:
                content = np.concatenate([held[rank][t.block][start // 128 : stop // 128] for start, stop in t.rows])
                mail.setdefault((rank, t.peer), []).append(content)
                if t.peer // size != rank // size:
                    crossed.update((int(tile), t.peer // size) for tile in content)
        for rank, plan in enumerate(plans):
            for t in plan.steps[index].exchange.receives:
                blocks, size_of_block = held[rank], t.rows[-1][1] // 128
                old = blocks.get(t.block, np.empty(0, dtype=np.int64))
                blocks[t.block] = np.append(old, np.full(max(0, size_of_block - len(old)), -1))
                places = np.concatenate([np.arange(start // 128, stop // 128) for start, stop in t.rows])
                if places.max() >= len(blocks[t.block]):
                    blocks[t.block] = np.append(blocks[t.block], np.full(places.max() + 1 - len(blocks[t.block]), -1))
                blocks[t.block][places] = mail[t.peer, rank].pop(0)
    assert crossed == Counter(needed_by_nodes(mask, plans[0], size))
    assert sum(plan.stats["cross_tokens"] for plan in plans) == 128 * len(crossed)


def tiles_of(plan: cpflex.Plan, rank: int) -> np.ndarray:
    """Of a rank's shard, in local order, as numbers of the sequence's tiles."""
    return plan.layout.positions(rank)[::128] // 128


def test_direct_sends_a_row_across_once_for_each_rank_and_relay_once_for_the_node():
    across = {}
    for name, schedule in {"direct": cpflex.direct, "relay": cpflex.relay(1)}.items():
        how = {"layout": cpflex.zigzag, "schedule": schedule, "topology": nodes_of(4)}
        plans = [cpflex.make_plan(cpflex.full(), 8 * 256, rank=rank, world_size=8, **how) for rank in range(8)]
        across[name] = [plan.stats["cross_tokens"] for plan in plans]
    assert across == {"direct": [4 * 256] * 8, "relay": [256] * 8}


def test_explain_says_what_crosses():
    plan = plans_of("causal", "relay", 8, 3)[0]
    said = "3 nodes of 3 ranks; rank 0 sends 768 K/V rows to other nodes"
    assert plan.stats["cross_tokens"] == 768
    assert said in " ".join(plan.explain().split())
    assert "nodes  " not in plans_of("causal", "relay", 8, 8)[0].explain()


def test_striping_makes_the_nics_of_a_node_carry_alike():
    """Only one rank's keys are seen by the other node."""
    seq_len = 8 * 16 * 128

    def mask(b, h, q, k):
        return (k < seq_len // 8) | (q == k)

    carried = {}
    for stripe in (False, True):
        how = {"layout": cpflex.contiguous, "schedule": cpflex.relay(2, stripe=stripe), "topology": nodes_of(4)}
        plans = [cpflex.make_plan(mask, seq_len, rank=rank, world_size=8, **how) for rank in range(8)]
        carried[stripe] = [plan.stats["cross_tokens"] for plan in plans]
    assert carried[False] == [2048, 0, 0, 0, 0, 0, 0, 0]
    assert carried[True] == [512, 512, 512, 512, 0, 0, 0, 0]


def test_what_ranks_receive_is_known_to_all_and_never_too_few():
    for schedule in SCHEDULES:
        for mask in MASKS:
            plans = plans_of(mask, schedule, 8, 3)
            exact = [plan.stats["recv_tokens"][plan.rank] for plan in plans]
            for plan in plans:
                assert all(map(np.less_equal, exact, plan.kinds["mask"].recv_tokens)), (schedule, mask)
            assert sum(exact) == sum(plan.stats["sent_tokens"] for plan in plans)


def test_without_a_topology_there_are_no_nodes():
    with pytest.raises(ValueError, match=r"schedule relay:2 must know which ranks share a node - pass topology="):
        cpflex.make_plan(cpflex.causal(), 300, rank=0, world_size=4, schedule=cpflex.relay(2))
    assert "cross_tokens" not in cpflex.make_plan(cpflex.causal(), 300, rank=0, world_size=4).stats


def test_on_one_node_needs_come_straight():
    plan = cpflex.make_plan(
        cpflex.causal(), 2000, rank=3, world_size=4, schedule=cpflex.relay((1, 4)), topology=nodes_of(8)
    )
    assert plan.stats["schedule"] == "even:1/4"
    assert plan.stats["reason"] == "relay:1/4 was asked for; all ranks are on one node"
    plan.check()


SAMPLE = [
    Problem("causal", "relative_bias", 1000, "gqa", "d16dv24", "bf16", "zigzag", "relay:2"),
    Problem("doc_sliding_causal", "none", 1000, "mqa", "d24", "fp32", "contiguous", "striped:1/2"),
    Problem("eviction", "key_bias", 321, "mha", "d16", "fp32", "balanced", "striped:1/2"),
    Problem("window_per_head", "temperature", 300, "gqa", "d16", "fp32", "striped", "relay:2"),
    Problem("nothing", "none", 5, "mha", "d16", "fp32", "contiguous", "relay:2"),
]


@pytest.mark.parametrize("problem", SAMPLE, ids=str)
def test_two_nodes_of_two_processes_compute_what_one_dense_attention_does(
    problem: Problem, four_processes: RankProcesses
):
    results = four_processes.run(attend_on_rank, problem)
    assert_within_budget(assemble(results), problem.dense(torch.float32), problem.dense())


@pytest.mark.parametrize("bar", [Bar("causal", 64, 4, "relay:2"), Bar("documents", 64, 4, "striped:1/2")], ids=str)
def test_two_nodes_of_two_processes_meet_the_bar(bar: Bar, request: pytest.FixtureRequest):
    check_on_processes(bar, request)


@pytest.mark.by_day(2)
@pytest.mark.parametrize("schedule", ["relay:2", "striped:1/2"])
def test_random_attentions_on_two_nodes_of_two_processes_equal_the_oracle(schedule: str, four_processes: RankProcesses):
    def check(case: fuzz.Case) -> fuzz.Errors:
        case = dataclasses.replace(case, schedule=schedule, stored=False)
        return fuzz.compare(case, four_processes.run(fuzz.attend_on_rank, case))

    for rectangles in (False, True):
        report = fuzz.run(8, check, fuzz.cases((4,), rectangles))
        assert not report.failures, report.failures[0].error


def redrawn_in_a_document(group: dist.ProcessGroup, problem: Problem, change: bool) -> dict:
    tensors = {name: x.clone() for name, x in problem.tensors.items()}
    if change:
        for x in tensors.values():
            x[:, :, 200:300] = 7.5
    return attend_on_rank(group, problem, tensors)


class Halves(Problem):
    @property
    def mask_mod(self):
        ids = (torch.arange(512) >= 200).long() + (torch.arange(512) >= 300)
        return cpflex.document(ids)


@pytest.mark.parametrize("schedule", ["relay:2", "striped:1/2"])
def test_no_document_hears_of_another_across_nodes(schedule: str, four_processes: RankProcesses):
    problem = Halves(seq_len=512, layout="striped", schedule=schedule)
    before, after = (
        assemble(four_processes.run(redrawn_in_a_document, problem, change)).named() for change in (False, True)
    )
    outside = (torch.arange(512) < 200) | (torch.arange(512) >= 300)
    for name, x in before.items():
        assert torch.equal(x[:, :, outside], after[name][:, :, outside]), name
        assert not torch.equal(x, after[name])


def with_another_topology(group: dist.ProcessGroup, culprit: int) -> None:
    size = 1 if group.rank() == culprit else 2
    attend_on_rank(group, Problem(schedule="relay:2"), topology=nodes_of(size))


def test_ranks_with_other_topologies_all_raise(four_processes: RankProcesses):
    for outcome in four_processes.outcomes(with_another_topology, 2, timeout=20):
        assert isinstance(outcome.error, RankMismatch), outcome.traceback
        assert "machine" in str(outcome.error)
        assert outcome.seconds < patience(10)

"""The transport: bytes as planned, the next step in flight while one computes, the same bits run after run."""

from __future__ import annotations

import operator
import random
import time
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import cpflex
from cases import Problem
from cpflex.kernels import Call
from cpflex.links.processes import ProcessLinks
from cpflex.ring.backward import backward
from cpflex.ring.forward import forward
from cpflex.ring.named import named_schedule
from cpflex.ring.schedule import most_rows
from cpflex.ring.transport import Pair, Transport
from cpflex.testing import ThreadLinks, run_ranks
from oracle import Attention
from patience import patience
from processes import RankProcesses
from runs import assemble, attend_on_rank

PROBLEMS = [
    Problem("full", "none", 321, "mha", "d16", "fp32", "zigzag", "ring", 4),
    Problem("causal", "none", 1000, "gqa", "d16dv24", "bf16", "zigzag", "ring", 3),
    Problem("doc_sliding_causal", "none", 1000, "mqa", "d24", "bf16", "contiguous", "direct", 5),
    Problem("global_sliding", "relative_bias", 1000, "gqa", "d16dv24", "fp32", "striped", "direct", 4),
    Problem("sliding17", "none", 321, "mha", "d16", "fp32", "contiguous", "auto", 2),
    Problem("full", "none", 127, "mha", "d16", "fp16", "contiguous", "direct", 2),
    Problem("sliding1", "none", 300, "mha", "d16", "fp32", "contiguous", "ring", 4),
    Problem("full", "none", 300, "mha", "d16", "fp32", "contiguous", "ring", 1),
    Problem("causal", "none", 1000, "gqa", "d16dv24", "bf16", "zigzag", "ring:both", 4),
    Problem("global_sliding", "none", 1000, "gqa", "d16dv24", "fp32", "striped", "even:3", 4),
    Problem("causal", "relative_bias", 1000, "gqa", "d16dv24", "bf16", "striped", "relay:2", 5),
    Problem("doc_causal", "none", 1000, "mqa", "d24", "fp32", "contiguous", "striped:1/2", 4),
]


SENDS, GRAD_SENDS = operator.attrgetter("sends"), operator.attrgetter("grad_sends")


def bytes_sent(group: ThreadLinks | CountingLinks, problem: Problem, backward: bool) -> tuple[int, int]:
    """(counted, planned)"""
    plan = problem.plan(group)
    local = {
        name: plan.shard(x, dim=2, pad_value=0.0).requires_grad_(backward and name in "qkv")
        for name, x in problem.tensors.items()
    }
    out = cpflex.flex_attention(
        *(local[x] for x in "qkv"), problem.score_mod(problem.captured()), plan, enable_gqa=True
    )
    (batch, heads, _, k_dim), v_dim = local["k"].shape, local["v"].shape[-1]
    row = batch * heads * (k_dim + v_dim)
    steps = [step.exchange for step in plan.steps]
    steps += steps[-1].after
    sent = [[t.num_rows for e in steps for t in found(e) if t.peer != group.rank] for found in (SENDS, GRAD_SENDS)]
    kv_bytes = sum(sent[0]) * row * local["k"].element_size()
    grad_bytes = sum(sent[1]) * row * 4  # dK/dV travel in fp32
    if backward:
        torch.autograd.grad(out, local["k"], local["grad_out"])
        return group.bytes_sent, 2 * kv_bytes + grad_bytes
    assert plan.stats["sent_tokens"] * row * local["k"].element_size() == kv_bytes
    return group.bytes_sent, kv_bytes


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "and backward"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_bytes_sent_are_those_of_the_plan(problem: Problem, backward: bool):
    for counted, planned in run_ranks(partial(bytes_sent, problem=problem, backward=backward), problem.world_size):
        assert counted == planned


class CountingLinks(ProcessLinks):
    bytes_sent = 0

    def exchange(self, sends, receives):
        self.bytes_sent += sum(tensor.numel() * tensor.element_size() for _, tensor in sends)
        return super().exchange(sends, receives)


def bytes_sent_by_processes(group: dist.ProcessGroup, problem: Problem, backward: bool) -> tuple[int, int]:
    return bytes_sent(CountingLinks(group), problem, backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "and backward"])
@pytest.mark.parametrize("schedule", ["ring", "direct", "auto"])
@pytest.mark.parametrize("processes", [2, 4], indirect=True)
def test_bytes_sent_by_processes_are_those_of_the_plan(processes: RankProcesses, schedule: str, backward: bool):
    problem = Problem("doc_sliding_causal", "none", 1000, "gqa", "d16dv24", "bf16", "striped", schedule)
    for counted, planned in processes.run(bytes_sent_by_processes, problem, backward):
        assert counted == planned > 0


def test_what_a_rank_receives_in_forward_is_what_the_plan_says():
    for problem in PROBLEMS:
        plans = [problem.plan(None, rank=r, world_size=problem.world_size) for r in range(problem.world_size)]
        assert sum(p.stats["sent_tokens"] for p in plans) == sum(p.stats["recv_tokens"][p.rank] for p in plans)


class Logged:
    """Links that note when transfers are posted and waited for."""

    def __init__(self, links: ThreadLinks, log: list[str]) -> None:
        self.links = links
        self.rank, self.world_size = links.rank, links.world_size
        self.log = log
        self.posted = 0

    def exchange(self, sends, receives) -> Any:
        self.posted += 1
        name = f"{self.posted}"
        self.log.append(f"post {name}")
        work = self.links.exchange(sends, receives)

        class Waited:
            def wait(inner) -> None:
                self.log.append(f"wait {name}")
                work.wait()

        return Waited()


def events(group: ThreadLinks, problem: Problem, backward: bool) -> list[str]:
    log: list[str] = []
    plan = problem.plan(group)
    kv = Pair(*(plan.shard(problem.tensors[name], dim=2, pad_value=0.0) for name in "kv"))
    transport = Transport(Logged(group, log), plan.steps, kv)
    for index, _, block in transport.circulate():
        log.append(f"compute {index}")
        if backward:
            transport.give_back(index, Pair(*(x.float() for x in block)))
            log.append(f"gave {index}")
    if backward:
        transport.home()
    return log


def test_the_next_step_is_in_flight_while_one_computes():
    problem = Problem("full", seq_len=128, layout="contiguous", schedule="ring", world_size=4)
    for log in run_ranks(partial(events, problem=problem, backward=False), 4):
        assert log == [
            "post 1",
            "compute 0",
            "wait 1",
            "post 2",
            "compute 1",
            "wait 2",
            "post 3",
            "compute 2",
            "wait 3",
            "compute 3",
        ]


@pytest.mark.parametrize("schedule", ["ring", "direct"])
def test_in_backward_the_next_step_and_the_last_gradients_are_in_flight_while_one_computes(schedule: str):
    problem = Problem("full", seq_len=512, layout="contiguous", schedule=schedule, world_size=4)
    for log in run_ranks(partial(events, problem=problem, backward=True), 4):
        for step in range(3):
            before = log[: log.index(f"compute {step}")]
            # of K/V step + 1, and of gradients one for each step before, but for the first, whose gradients stay
            assert sum(event.startswith("post") for event in before) == step + 1 + max(0, step - 1)
        for step in range(2, 4):
            # the gradients posted after step - 1 are not waited for before step has been computed
            posted = [event for event in log[: log.index(f"gave {step - 1}")] if event.startswith("post")][-1]
            assert f"wait {posted.split()[1]}" not in log[: log.index(f"compute {step}")]


class Weighed(Transport):
    """A transport that counts the bytes of other ranks' K and V in memory: buffers of messages, and blocks made of them."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.own = {x.untyped_storage().data_ptr() for x in self.shard}
        self.alive: dict[int, int] = {}
        self.peak = 0

    def _start(self, step, sends, receives, like) -> Any:
        arrival = super()._start(step, sends, receives, like)
        if like is self.shard:  # not gradients
            self._weigh(arrival.buffers)
        return arrival

    def _join(self, messages) -> Pair:
        block = super()._join(messages)
        self._weigh(block)
        return block

    def _weigh(self, tensors) -> None:
        for storage in {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}.values():
            if storage.data_ptr() not in self.own and storage.data_ptr() not in self.alive:
                self.alive[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage.data_ptr())
        self.peak = max(self.peak, sum(self.alive.values()))


SEQ_LEN = 8 * 3 * 128
FOREIGN = {
    "full": cpflex.full(),
    "causal": cpflex.causal(),
    "documents": cpflex.document(torch.arange(SEQ_LEN) // 700),
    "every third tile": lambda b, h, q, k: k // 128 % 3 == 0,  # direct: blocks of three parts, a shard together
    "dilated": lambda b, h, q, k: (k <= q) & ((q - k) % 5 == 0),
}


def most_foreign_kv(group: ThreadLinks, mask: str, layout: Any, schedule: Any) -> tuple[float, float, int]:
    """(in forward, in backward, steps) of a rank, in shards, through the loops themselves."""
    plan = cpflex.make_plan(FOREIGN[mask], SEQ_LEN, group, layout=layout, schedule=schedule)
    q, k, v = (torch.randn(1, 1, plan.local_len, dim) for dim in (16, 16, 24))
    call = Call(plan.kinds["mask"].mask, 0.25)
    there = Weighed(group, plan.steps, Pair(k, v))
    out, lse, _ = forward(q, v.shape[-1], call, there)
    back = Weighed(group, plan.steps, Pair(k, v))
    backward(torch.ones_like(out), torch.zeros_like(lse), q, out, lse, call, back)
    assert not there.alive, "and nothing is kept"
    assert not back.alive
    shard = k.nbytes + v.nbytes
    return there.peak / shard, back.peak / shard, len(plan.steps)


@pytest.mark.by_day(3)
@pytest.mark.parametrize("schedule", [cpflex.ring, cpflex.direct], ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", [cpflex.contiguous, cpflex.balanced], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mask", FOREIGN)
def test_two_shards_of_other_ranks_keys_and_values_are_in_memory_at_most(mask: str, layout: Any, schedule: Any):
    for there, back, num_steps in run_ranks(partial(most_foreign_kv, mask=mask, layout=layout, schedule=schedule), 8):
        assert max(there, back) <= 2.0
        if num_steps > 2 and mask in ("full", "every third tile"):
            assert min(there, back) == 2.0, "one computed, one on its way"


HELD = ["ring:both", "even:3", "gather", "relay:1", "relay:1/2", "striped:2"]


def held_and_planned(group: ThreadLinks, mask: str, schedule: str) -> tuple[float, float]:
    """Rows of other ranks in memory at once: the most that were weighed, and the most that a plan says."""
    how = {
        "layout": cpflex.contiguous,
        "schedule": named_schedule(schedule),
        "topology": cpflex.Topology(3, 370.0, 47.0),
    }
    plan = cpflex.make_plan(FOREIGN[mask], SEQ_LEN, group, **how)
    k, v = (torch.randn(1, 1, plan.local_len, dim) for dim in (16, 24))
    transport = Weighed(group, plan.steps, Pair(k, v))
    for index, _, block in transport.circulate():
        transport.give_back(index, Pair(*map(torch.zeros_like, block)))
        del block
    transport.home()
    return transport.peak / (4 * (16 + 24)), most_rows([step.exchange for step in plan.steps])


@pytest.mark.parametrize("schedule", HELD)
@pytest.mark.parametrize("mask", ["full", "documents", "dilated"])
def test_no_more_of_other_ranks_is_in_memory_than_the_plan_says(mask: str, schedule: str):
    ranks = run_ranks(partial(held_and_planned, mask=mask, schedule=schedule), 8)
    assert all(held <= planned for held, planned in ranks)
    if mask == "full":
        assert any(held == planned for held, planned in ranks), ranks


def attend_with_delays(group: ThreadLinks, problem: Problem, seed: int) -> dict[str, Any]:
    exchange, delays = group.exchange, random.Random(seed * 100 + group.rank)

    def late(sends, receives):
        time.sleep(delays.random() * 0.004)
        return exchange(sends, receives)

    group.exchange = late
    return attend_on_rank(group, problem)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.world_size > 2], ids=str)
def test_the_same_bits_come_out_whoever_is_late(problem: Problem):
    runs = [
        assemble(run_ranks(partial(attend_with_delays, problem=problem, seed=seed), problem.world_size)).named()
        for seed in range(3)
    ]
    for run in runs[1:]:
        for name, tensor in run.items():
            assert torch.equal(tensor, runs[0][name]), name


def returned(group: ThreadLinks, schedule: Any, world_size: int) -> Tensor:
    """dK of a rank's own shard, where the part that rank r computes for any row is a number of its own."""
    how = {"layout": cpflex.contiguous, "schedule": schedule, "topology": cpflex.Topology(2, 370.0, 47.0)}
    plan = cpflex.make_plan(cpflex.full(), 128 * world_size, group, **how)
    shard = torch.zeros(1, 1, plan.local_len, 1)
    transport = Transport(group, plan.steps, Pair(shard, shard))
    for index, _, block in transport.circulate():
        part = torch.full_like(block.k, PARTS[group.rank])
        transport.give_back(index, Pair(part, part.clone()))
    return transport.home().k


PARTS = [1.0, 1e8, -1e8, 3.0]
"""Their sum depends on the order."""


@pytest.mark.parametrize(
    ("schedule", "order"), [(cpflex.ring, (1, 2, 3)), (cpflex.direct, (1, 2, 3))], ids=["ring", "direct"]
)
def test_gradients_are_summed_in_a_fixed_order(schedule: Any, order: tuple[int, ...]):
    """Direct: the rank's own, then rank + 1's, rank + 2's ... Ring: rank + 1's, rank + 2's ..., last its own."""
    for rank, total in enumerate(run_ranks(partial(returned, schedule=schedule, world_size=4), 4)):
        parts = [torch.tensor(PARTS[(rank + distance) % 4]) for distance in order]
        own = torch.tensor(PARTS[rank])
        expected = sum(parts[1:], parts[0]) + own if schedule is cpflex.ring else sum(parts, own)
        assert (total == expected).all(), (rank, total.unique(), expected)


@pytest.mark.parametrize("stripe", [False, True], ids=["relay", "striped"])
def test_on_two_levels_gradients_are_summed_where_they_are_passed_on_then_at_home(stripe: bool):
    """Nodes of two: at home the rank's own and the mate's, then those of the other node together."""
    schedule = cpflex.relay(1, stripe=stripe)
    for rank, total in enumerate(run_ranks(partial(returned, schedule=schedule, world_size=4), 4)):
        own, mate, relay, other = (torch.tensor(PARTS[rank ^ r]) for r in range(4))
        assert (total == (own + mate) + (relay + other)).all(), (rank, total.unique())


def gradient_dtypes(group: ThreadLinks, problem: Problem) -> set[torch.dtype]:
    """Of the messages of backward."""
    found: set[torch.dtype] = set()
    exchange = group.exchange

    def noted(sends, receives):
        found.update(x.dtype for _, x in sends)
        return exchange(sends, receives)

    group.exchange = noted
    attend_on_rank(group, problem)
    return found


@pytest.mark.parametrize("schedule", ["ring", "direct"])
def test_kv_travel_in_their_own_dtype_and_their_gradients_in_fp32(schedule: str):
    problem = Problem("full", seq_len=128, dtype="bf16", schedule=schedule, world_size=2)
    assert run_ranks(partial(gradient_dtypes, problem=problem), 2) == [{torch.bfloat16, torch.float32}] * 2


def test_bf16_gradients_do_not_lose_precision_with_the_number_of_ranks():
    """A bf16 sum over eight ranks would be several times worse than one rank's rounding."""
    problem = Problem("full", seq_len=256, dtype="bf16", schedule="ring", layout="contiguous")
    exact = problem.dense()

    def error(world_size: int) -> float:
        whole: Attention = assemble(run_ranks(partial(attend_on_rank, problem=problem), world_size))
        return max((getattr(whole, x).double() - getattr(exact, x)).abs().mean().item() for x in ("dk", "dv"))

    assert error(8) <= 1.05 * error(1)


def fail_before_step(group: ThreadLinks, rank: int) -> None:
    problem = Problem("full", seq_len=128, world_size=3)
    if group.rank == rank:
        raise KeyError("a mistake")
    attend_on_rank(group, problem)


def test_a_rank_that_fails_stops_the_others():
    began = time.monotonic()
    with pytest.raises(KeyError, match="a mistake"):
        run_ranks(partial(fail_before_step, rank=1), 3)
    assert time.monotonic() - began < patience(10)


def never_answers(group: ThreadLinks) -> None:
    problem = Problem("full", seq_len=128, layout="contiguous", schedule="ring")
    plan = problem.plan(group)
    kv = Pair(problem.tensors["k"], problem.tensors["v"])
    if group.rank == 0:
        for _ in Transport(group, plan.steps, Pair(*(plan.shard(x, 2) for x in kv))).circulate():
            pass
    else:
        time.sleep(1.0)


def test_a_peer_that_does_not_answer_is_named_with_the_step():
    with pytest.raises(TimeoutError, match=r"group rank 0: K/V of step 1 from group ranks \[1\] did not arrive"):
        run_ranks(never_answers, 2, timeout=0.3)

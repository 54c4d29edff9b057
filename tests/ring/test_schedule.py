"""Schedules: both ends of every message agree, in size and in order, and nobody waits for ever."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

import cpflex
from cases import Problem
from cpflex.links.protocol import Message
from cpflex.ring.schedule import Transfer
from cpflex.ring.transport import Pair, Transport

WORLDS = range(1, 17)
MASKS = ("full", "causal", "sliding17", "doc_causal", "global_sliding", "nothing", "shared_question")
SCHEDULES = ("ring", "ring:both", "direct", "even:3", "even:1/4", "gather", "auto")


def plans_of(mask: str, schedule: str, world_size: int) -> list[cpflex.Plan]:
    layout = ("contiguous", "zigzag", "striped")[world_size % 3]
    problem = Problem(mask, seq_len=60 * world_size + 77, layout=layout, schedule=schedule, world_size=world_size)
    return [problem.plan(None, rank=rank, world_size=world_size) for rank in range(world_size)]


CASES = [
    (world_size, schedule, MASKS[(3 * world_size + place) % len(MASKS)])
    for world_size in WORLDS
    for place, schedule in enumerate(SCHEDULES)
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def plans(request: pytest.FixtureRequest) -> list[cpflex.Plan]:
    world_size, schedule, mask = request.param
    return plans_of(mask, schedule, world_size)


def table(plans: list[cpflex.Plan], kind: str) -> dict[tuple[int, int, int], list[int]]:
    """(step, rank, peer) -> rows of the messages between them, in order, as the named end sees it."""
    messages: dict[tuple[int, int, int], list[int]] = {}
    for rank, plan in enumerate(plans):
        for index, step in enumerate(plan.steps):
            transfers: tuple[Transfer, ...] = getattr(step.exchange, kind)
            for t in transfers:
                messages.setdefault((index, rank, t.peer), []).append(t.num_rows)
    return messages


@pytest.mark.parametrize(("out", "into"), [("sends", "receives"), ("grad_sends", "grad_receives")])
def test_what_is_sent_is_what_is_received(plans: list[cpflex.Plan], out: str, into: str):
    sent, received = table(plans, out), table(plans, into)
    assert sent == {(step, peer, rank): rows for (step, rank, peer), rows in received.items()}
    assert all(rank != peer for _, rank, peer in sent), "nobody sends to itself"
    assert all(rows > 0 for messages in sent.values() for rows in messages)


def test_all_ranks_make_the_same_number_of_steps(plans: list[cpflex.Plan]):
    assert len({len(plan.steps) for plan in plans}) == 1


def test_gradients_go_home_to_the_rows_that_were_lent(plans: list[cpflex.Plan]):
    """Every row of every block that a rank computes with arrives once, and its gradient leaves once."""
    for rank, plan in enumerate(plans):
        for step in plan.steps[1:]:
            lent = sum(stop - start for _, rows in step.exchange.sources for start, stop in rows)
            assert lent == sum(t.num_rows for t in step.exchange.receives) == len(step.tile_mask.kv_positions)
            assert lent == sum(t.num_rows for t in step.exchange.grad_sends)
            rows = [row for t in step.exchange.receives for start, stop in t.rows for row in range(start, stop)]
            assert rows == list(range(lent)), "what arrives is put together in the order in which it is listed"
        first = plan.steps[0].exchange
        assert first.sources == ((rank, ((0, plan.local_len),)),)
        assert first.sends == first.receives == first.grad_sends == first.grad_receives == ()


@dataclass
class Recorder:
    """Links that note what would be sent and received, and deliver zeros."""

    rank: int
    world_size: int
    batches: list[list[tuple[str, int, int]]] = field(default_factory=list)

    def exchange(self, sends: list[Message], receives: list[Message]) -> Recorder:
        self.batches.append(
            [("send", peer, x.numel()) for peer, x in sends] + [("receive", peer, x.numel()) for peer, x in receives]
        )
        for _, buffer in receives:
            buffer.zero_()
        return self

    def wait(self) -> None:
        return


def posted(plan: cpflex.Plan, backward: bool) -> list[list[tuple[str, int, int]]]:
    """Batches of messages in the order in which the rank posts them."""
    links = Recorder(plan.rank, plan.world_size)
    shard = torch.zeros(1, 1, plan.local_len, 1)
    transport = Transport(links, plan.steps, Pair(shard, shard))
    for index, step, _ in transport.circulate():
        if backward:
            grad = torch.zeros(1, 1, len(step.tile_mask.kv_positions), 1)
            transport.give_back(index, Pair(grad, grad.clone()))
    if backward:
        transport.home()
    return [batch for batch in links.batches if batch]


def simulate(programs: list[list[list[tuple[str, int, int]]]]) -> None:
    """A rank begins a batch when its last one is done, as on a stream; a message is done when both ends are at it."""
    at = [0] * len(programs)
    open_ = [list(program[0]) if program else [] for program in programs]
    while any(open_):
        progress = False
        for rank, batch in enumerate(open_):
            for kind, peer, size in list(batch):
                if kind != "send":
                    continue
                expected = [message for message in open_[peer] if message[:2] == ("receive", rank)]
                if expected:
                    assert expected[0][2] == size, (
                        f"rank {rank} sends {size} numbers, rank {peer} expects {expected[0]}"
                    )
                    batch.remove((kind, peer, size))
                    open_[peer].remove(expected[0])
                    progress = True
        for rank, program in enumerate(programs):
            while not open_[rank] and at[rank] < len(program):
                at[rank] += 1
                open_[rank] = list(program[at[rank]]) if at[rank] < len(program) else []
                progress = True
        assert progress, f"a deadlock: {open_}"
    assert at == [len(program) for program in programs]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_in_order_transfers_never_wait_for_one_another_in_a_circle(plans: list[cpflex.Plan], backward: bool):
    simulate([posted(plan, backward) for plan in plans])


def test_the_simulator_finds_deadlocks_and_mismatches():
    one, other = [("send", 1, 8)], [("receive", 1, 8)]
    back, forth = [("receive", 0, 8)], [("send", 0, 8)]
    simulate([[one, other], [back, forth]])
    with pytest.raises(AssertionError, match="deadlock"):
        simulate([[one, other], [forth, back]])
    with pytest.raises(AssertionError, match="expects"):
        simulate([[[("send", 1, 9)]], [back]])
    with pytest.raises(AssertionError, match="deadlock"):
        simulate([[one], []])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_ring_makes_as_many_hops_as_any_rank_needs(world_size: int):
    def num_steps(mask, layout=cpflex.contiguous) -> int:
        plan = cpflex.make_plan(
            mask, 256 * world_size, rank=0, world_size=world_size, layout=layout, schedule=cpflex.ring
        )
        return len(plan.steps)

    assert num_steps(cpflex.full()) == num_steps(cpflex.causal()) == world_size
    assert num_steps(cpflex.causal() & cpflex.sliding_window(100)) == 2
    assert num_steps(cpflex.causal() & cpflex.sliding_window(1)) == 1
    assert num_steps(lambda b, h, q, k: q < 0) == 1
    assert num_steps(cpflex.document(cu_seqlens=range(0, 256 * world_size + 1, 256))) == 1


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_direct_sends_no_row_that_is_not_needed(world_size: int):
    mask = cpflex.causal() & cpflex.sliding_window(100)
    plans = [
        cpflex.make_plan(
            mask, 256 * world_size, rank=r, world_size=world_size, layout=cpflex.contiguous, schedule=cpflex.direct
        )
        for r in range(world_size)
    ]
    assert [plan.stats["recv_tokens"][plan.rank] for plan in plans] == [0] + [128] * (world_size - 1)
    assert [plan.stats["sent_tokens"] for plan in plans] == [128] * (world_size - 1) + [0]


def test_direct_receives_at_most_one_shard_a_step():
    for plan in plans_of("full", "direct", 8):
        assert all(sum(t.num_rows for t in step.exchange.receives) <= plan.local_len for step in plan.steps)


def test_auto_takes_direct_where_little_is_needed_and_the_ring_where_much_is():
    def chosen(mask) -> str:
        return cpflex.make_plan(mask, 4096, rank=0, world_size=8, layout=cpflex.contiguous).stats["schedule"]

    assert chosen(cpflex.full()) == "ring"
    assert chosen(cpflex.causal() & cpflex.sliding_window(100)) == "direct"


def test_a_schedule_says_why_it_was_chosen():
    reasons = {
        schedule.__name__: cpflex.make_plan(cpflex.full(), 4096, rank=0, world_size=4, schedule=schedule).stats[
            "reason"
        ]
        for schedule in (cpflex.ring, cpflex.direct, cpflex.auto)
    }
    assert "asked for" in reasons["ring"]
    assert "asked for" in reasons["direct"]
    assert "rows on average" in reasons["auto"]

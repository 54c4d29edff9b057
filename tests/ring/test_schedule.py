"""Schedules: both ends of every message agree, in size and in order, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import cpflex
from cases import Problem
from cpflex.links.protocol import Message
from cpflex.ring.named import named_schedule
from cpflex.ring.schedule import Exchange, Rows, Transfer
from cpflex.ring.transport import Pair, Transport

Mail = dict[tuple[int, int], list[Any]]

WORLDS = range(1, 17)
MASKS = ("full", "causal", "sliding17", "doc_causal", "global_sliding", "nothing", "shared_question")
SCHEDULES = ("ring", "direct", "auto")
MORE_SCHEDULES = ("ring:both", "even:3", "even:1/4", "gather")
ON_TWO_LEVELS = ("relay:2", "striped:1/2")


def plans_of(mask: str, schedule: str, world_size: int, gpus_per_node: int = 0) -> list[cpflex.Plan]:
    layout = ("contiguous", "zigzag", "striped")[world_size % 3]
    problem = Problem(mask, seq_len=60 * world_size + 77, layout=layout, schedule=schedule, world_size=world_size)
    options = {"topology": cpflex.Topology(gpus_per_node, 370.0, 47.0)} if gpus_per_node else {}
    return [problem.plan(None, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def mask_at(place: int) -> str:
    return MASKS[place % len(MASKS)]


CASES = [
    (mask_at(3 * world_size + place), schedule, world_size)
    for world_size in WORLDS
    for place, schedule in enumerate(SCHEDULES)
]
MORE_CASES = [
    (mask_at(3 * world_size + place), schedule, world_size)
    for world_size in range(1, 9)
    for place, schedule in enumerate(MORE_SCHEDULES)
]
MORE_CASES += [
    (mask_at(world_size + 2 * gpus_per_node + 3 * place), schedule, world_size, gpus_per_node)
    for world_size in range(2, 9)
    for gpus_per_node in range(1, 5)
    for place, schedule in enumerate(ON_TWO_LEVELS)
]
"""Nodes of 1 to 4 ranks, the last one often smaller."""

CASES += [pytest.param(case, marks=pytest.mark.by_day(8)) for case in MORE_CASES]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def plans(request: pytest.FixtureRequest) -> list[cpflex.Plan]:
    return plans_of(*request.param)


def table(plans: list[cpflex.Plan], kind: str) -> dict[tuple[int, int, int], list[int]]:
    """(step, rank, peer) -> rows of the messages between them, in order, as the named end sees it."""
    messages: dict[tuple[int, int, int], list[int]] = {}
    for rank, plan in enumerate(plans):
        for index, exchange in enumerate(exchanges_of(plan)):
            transfers: tuple[Transfer, ...] = getattr(exchange, kind)
            for t in transfers:
                messages.setdefault((index, rank, t.peer), []).append(t.num_rows)
    return messages


def exchanges_of(plan: cpflex.Plan) -> list[Exchange]:
    """Of all steps, and of gradients after the last."""
    exchanges = [step.exchange for step in plan.steps]
    return [*exchanges, *exchanges[-1].after]


@pytest.mark.parametrize(("out", "into"), [("sends", "receives"), ("grad_sends", "grad_receives")])
def test_what_is_sent_is_what_is_received(plans: list[cpflex.Plan], out: str, into: str):
    sent, received = table(plans, out), table(plans, into)
    assert sent == {(step, peer, rank): rows for (step, rank, peer), rows in received.items()}
    assert all(rows > 0 for messages in sent.values() for rows in messages)
    if plans[0].stats["schedule"].split(":")[0] not in ("relay", "striped"):
        assert all(rank != peer for _, rank, peer in sent), "nobody sends to itself"


def test_all_ranks_make_the_same_number_of_steps(plans: list[cpflex.Plan]):
    assert len({len(plan.steps) for plan in plans}) == 1
    assert len({len(exchanges_of(plan)) for plan in plans}) == 1


def test_blocks_are_what_they_are_said_to_be_and_every_gradient_goes_home_once(plans: list[cpflex.Plan]):
    """All messages carried out on numbers of rows, and on counts of who has contributed to their gradients."""
    world_size, local_len = len(plans), plans[0].local_len
    held = [{0: rank * local_len + np.arange(local_len)} for rank in range(world_size)]
    for index in range(len(plans[0].steps)):
        mail = collect(plans, index, "sends", lambda rank, t: taken(held[rank][t.block], t.rows))
        for rank, plan in enumerate(plans):
            exchange = plan.steps[index].exchange
            for t in exchange.receives:
                fill(held[rank], t.block, t.rows, mail[t.peer, rank].pop(0))
            said = [taken(owner * local_len + np.arange(local_len), rows) for owner, rows in exchange.sources]
            held[rank].setdefault(index, np.empty(0, dtype=np.int64))
            assert held[rank][index].tolist() == np.concatenate([[], *said]).tolist()
            assert len(held[rank][index]) == len(plan.steps[index].tile_mask.kv_positions)
        assert not any(mail.values())
    assert all((block >= 0).all() for blocks in held for block in blocks.values()), "blocks are filled"

    parts = [{0: own_part(rank, world_size, local_len)} for rank in range(world_size)]
    for index in range(1, len(exchanges_of(plans[0]))):
        for rank, plan in enumerate(plans):
            if index < len(plan.steps):
                added = own_part(rank, world_size, len(held[rank][index]))
                parts[rank][index] = parts[rank].get(index, 0) + added

        def leaving(rank: int, t: Transfer) -> tuple[np.ndarray, np.ndarray]:
            return taken(held[rank][t.block], t.rows), taken(parts[rank][t.block], t.rows)

        mail = collect(plans, index, "grad_sends", leaving)
        for rank, plan in enumerate(plans):
            exchange = exchanges_of(plan)[index]
            for block in {index, *(t.block for t in exchange.grad_sends)}:
                parts[rank].pop(block, None)
            for t in exchange.grad_receives:
                rows, part = mail[t.peer, rank].pop(0)
                assert rows.tolist() == taken(held[rank][t.block], t.rows).tolist(), "gradients of the rows sent"
                total = parts[rank].setdefault(t.block, np.zeros((len(held[rank][t.block]), world_size), np.int64))
                for (start, stop), piece in zip(t.rows, pieces(part, t.rows), strict=True):
                    total[start:stop] += piece
    used = np.zeros((world_size * local_len, world_size), dtype=np.int64)
    for rank, plan in enumerate(plans):
        for index in range(len(plan.steps)):
            np.add.at(used, (held[rank][index], rank), 1)
    assert used.max(initial=0) <= 1, "no row visits a rank twice"
    for rank in range(world_size):
        assert list(parts[rank]) == [0], "nothing is left on its way"
        assert (parts[rank][0] == used[rank * local_len : (rank + 1) * local_len]).all()


def collect(plans: list[cpflex.Plan], index: int, kind: str, content: Callable[[int, Transfer], Any]) -> Mail:
    """(source, destination) -> what is sent, in order."""
    mail: Mail = {}
    for rank, plan in enumerate(plans):
        for t in getattr(exchanges_of(plan)[index], kind):
            mail.setdefault((rank, t.peer), []).append(content(rank, t))
    return mail


def taken(block: np.ndarray, rows: Rows) -> np.ndarray:
    return np.concatenate([block[:0], *(block[start:stop] for start, stop in rows)])


def pieces(part: np.ndarray, rows: Rows) -> list[np.ndarray]:
    return np.split(part, np.cumsum([stop - start for start, stop in rows])[:-1])


def fill(blocks: dict[int, np.ndarray], index: int, rows: Rows, content: np.ndarray) -> None:
    size = max(stop for _, stop in rows)
    block = blocks.get(index, np.empty(0, dtype=np.int64))
    block = np.append(block, np.full(max(0, size - len(block)), -1))
    for (start, stop), piece in zip(rows, pieces(content, rows), strict=True):
        assert (block[start:stop] == -1).all(), "a row arrives once"
        block[start:stop] = piece
    blocks[index] = block


def own_part(rank: int, world_size: int, num_rows: int) -> np.ndarray:
    part = np.zeros((num_rows, world_size), dtype=np.int64)
    part[:, rank] = 1
    return part


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


@pytest.mark.parametrize(
    "schedule",
    [cpflex.ring, cpflex.ring_both, cpflex.direct, cpflex.gather, cpflex.even(3), cpflex.even((2, 5, 5))]
    + [cpflex.relay(1), cpflex.relay((1, 4)), cpflex.relay(2, stripe=True)],
    ids=lambda schedule: schedule.__name__,
)
def test_a_schedule_is_found_by_its_name(schedule: Any):
    machine = {"topology": cpflex.Topology(2, 370.0, 47.0)}
    plan = cpflex.make_plan(cpflex.causal(), 1500, rank=2, world_size=4, schedule=schedule, **machine)
    name = plan.stats["schedule"]
    found = named_schedule(name)
    assert found is not None
    assert cpflex.make_plan(cpflex.causal(), 1500, rank=2, world_size=4, schedule=found, **machine).stats == plan.stats
    assert cpflex.Plan.from_bytes(plan.to_bytes()).stats == plan.stats


@pytest.mark.parametrize("name", ["", "auto", "even", "even:", "even:0", "even:1/1", "even:-1", "even:1//2", "relay:x"])
def test_other_names_are_of_no_schedule(name: str):
    assert named_schedule(name) is None


@pytest.mark.parametrize("stages", [0, -1, (), (1, 0), (1.5,), [1, 2], True, "2", None], ids=repr)
@pytest.mark.parametrize("schedule", [cpflex.even, cpflex.relay], ids=lambda f: f.__name__)
def test_stages_are_numbers_of_at_least_one(schedule: Any, stages: Any):
    with pytest.raises(ValueError, match=r"stages must be a number of at least 1, or a tuple"):
        schedule(stages)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_both_ways_round_there_are_half_as_many_steps(world_size: int):
    def num_steps(mask) -> int:
        plan = cpflex.make_plan(
            mask, 256 * world_size, rank=0, world_size=world_size, layout=cpflex.contiguous, schedule=cpflex.ring_both
        )
        return len(plan.steps)

    assert num_steps(cpflex.full()) == num_steps(cpflex.causal()) == 1 + world_size // 2
    assert num_steps(cpflex.causal() & cpflex.sliding_window(100)) == 2
    assert num_steps(cpflex.sliding_window(100, 100)) == 2
    assert num_steps(lambda b, h, q, k: q < 0) == 1


@pytest.mark.parametrize(("parts", "shares"), [(4, (1, 1, 1, 1)), ((1, 4, 4), (1, 4, 4)), (1, (1,))])
def test_even_stages_have_their_shares(parts: Any, shares: tuple[int, ...]):
    """Of every pair, to within a tile; together, of what a rank needs, too."""
    world_size, tiles = 8, 18
    for rank in range(world_size):
        plan = cpflex.make_plan(
            cpflex.full(), 128 * tiles * world_size, rank=rank, world_size=world_size,
            layout=cpflex.contiguous, schedule=cpflex.even(parts),
        )  # fmt: skip
        assert len(plan.steps) == 1 + len(shares)
        for step, share in zip(plan.steps[1:], shares, strict=True):
            rows = [t.num_rows / 128 for t in step.exchange.receives]
            assert all(abs(r - tiles * share / sum(shares)) < 1 for r in rows)
            assert abs(sum(rows) / len(rows) - tiles * share / sum(shares)) <= 0.5


def test_needs_of_one_tile_do_not_all_fall_into_one_stage():
    mask = cpflex.document(torch.arange(16 * 128) % 128 // 127 * 5)  # every tile sees every other
    plan = cpflex.make_plan(mask, 2048, rank=3, world_size=16, layout=cpflex.contiguous, schedule=cpflex.even(3))
    assert [len(step.exchange.receives) for step in plan.steps] == [0, 5, 5, 5]


def test_gather_is_one_remote_step():
    plan = plans_of("causal", "gather", 8)[7]
    assert len(plan.steps) == 2
    assert plan.stats["recv_tokens"][7] == plans_of("causal", "direct", 8)[7].stats["recv_tokens"][7]

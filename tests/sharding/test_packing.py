"""pack: laws of an arrangement, figures against brute force, and what short documents cost."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import cpflex
from cpflex import topology
from cpflex.planning.document_work import DocumentWork
from cpflex.planning.packing import Batch, candidates
from cpflex.sharding.dealing import Ranks, deal
from cpflex.sharding.layout import ChunkWork, Layout, aligned_chunk_len
from cpflex.sharding.nodes import estimated_ns
from cpflex.sharding.packed import Packed


def drawn(seed: int, count: int, low: int, high: int, *longer: int) -> list[int]:
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(low, high, count).tolist(), *longer]
    return [lengths[i] for i in rng.permutation(len(lengths))]


CASES = {  # lengths, ranks, options
    "short": (drawn(0, 40, 20, 200), 4, {}),
    "equal": ([150] * 109, 4, {}),
    "all_long": (drawn(4, 100, 30, 300, 1400, 1150, 1150, 800), 8, {}),
    "long_and_short": (drawn(1, 60, 30, 200, 3000, 1100), 8, {}),
    "windowed": (drawn(1, 60, 30, 200, 3000, 1100), 8, {"window": 200}),
    "too_long_for_two_per_rank": ([313] * 7, 4, {}),
    "fixed_shape": (drawn(2, 50, 30, 200, 1000), 4, {"local_len": 2048}),
    "one_document": ([2001], 4, {}),
    "fewer_tokens_than_ranks": ([1, 1, 2], 8, {}),
    "one_rank": (drawn(3, 10, 1, 90), 1, {}),
    "no_slack": (drawn(5, 60, 40, 200, 2000) + [32 * 16 * 8 - sum(drawn(5, 60, 40, 200, 2000)) % (32 * 16 * 8)], 8, {}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest):
    lengths, world_size, options = CASES[request.param]
    return lengths, cpflex.pack(lengths, world_size, **options)


def test_each_document_is_there_once_and_whole(case):
    lengths, packed = case
    assert sorted(d for d in packed.order if d >= 0) == list(range(len(lengths)))
    assert all(packed.lengths[place] == lengths[d] for place, d in enumerate(packed.order) if d >= 0)
    assert packed.cu_seqlens.tolist() == [0, *np.cumsum(packed.lengths)]
    assert sum(packed.lengths) == packed.seq_len == packed.local_len * packed.table.world_size
    assert max((n for d, n in zip(packed.order, packed.lengths, strict=True) if d < 0), default=0) <= 128


def test_little_is_padded(case):
    lengths, packed = case
    least = -(-sum(lengths) // (16 * packed.table.world_size)) * 16
    if packed.seq_len != 4 * 2048:
        assert packed.local_len <= max(least * 65 // 64, least + 16 * len(packed.table.chunks[0]))


@pytest.mark.parametrize("most", [0.2, 1.0, 1.6, float("inf")])
@pytest.mark.parametrize("name", CASES)
def test_documents_that_are_not_cut_are_whole_but_for_one_at_a_border(name: str, most: float):
    lengths, world_size, options = CASES[name]
    chunk_len = -(-sum(lengths) // (world_size * 4 * 16)) * 16
    ranks = Ranks(np.array(lengths), options.get("window"), world_size, 4, chunk_len, 2)
    found = deal(ranks, most)
    assert sorted(d for d in found.order if d >= 0) == list(range(len(lengths)))
    assert sum(found.lengths) == world_size * 4 * chunk_len
    table = Layout(sum(found.lengths), chunk_len, tuple(found.chunks), "packed")
    holders = Packed(tuple(found.order), tuple(found.lengths), table).holders
    shared = [d for d, on in enumerate(holders) if len(on) > 1 and d not in ranks.heavy(most)]
    assert len(shared) < world_size + 1


def test_cut_documents_are_on_few_neighbours_within_a_node_and_work_is_even():
    lengths = np.array([*drawn(0, 400, 100, 900), 6000, 5000])
    ranks = Ranks(lengths, None, 16, 16, aligned_chunk_len(int(lengths.sum()), 256), 8)
    found = deal(ranks, 1.0)
    table = Layout(sum(found.lengths), ranks.chunk_len, tuple(found.chunks), "packed")
    packed = Packed(tuple(found.order), tuple(found.lengths), table)
    assert ranks.heavy(1.0) == [400, 401]
    for d in (400, 401):
        on = packed.holders[d]
        assert ranks.work[d] / ranks.mean_work <= len(on) <= 8
        by_node = sorted(sum(rank // 8 == node for rank in on) for node in (0, 1))
        assert by_node[0] <= (d == 401)  # which begins in the last chunk of the other one
    assert max(packed.work) <= 1.25 * sum(packed.work) / 16  # a chunk is a seventh of a document


def test_figures_are_those_of_the_mask(case):
    _, packed = case
    ids, at = packed.doc_ids.numpy(), np.arange(packed.seq_len)
    segment = np.repeat(np.arange(len(packed.lengths)), packed.lengths)
    owner = np.empty(packed.seq_len, dtype=np.int64)
    for rank in range(packed.table.world_size):
        owner[packed.table.positions(rank)] = rank
    for rank, held in enumerate(packed.table.positions(r) for r in range(packed.table.world_size)):
        seen = (at[None] <= held[:, None]) & (segment[held][:, None] == segment[None])
        if packed.window is not None:
            seen &= at[None] > held[:, None] - packed.window
        assert packed.work[rank] == seen.sum()
        assert packed.received[rank] == (seen.any(axis=0) & (owner != rank)).sum()
    for d, on in enumerate(packed.holders):
        assert set(on) == set(owner[ids == d].tolist())


def random_batch(seed: int) -> tuple[list[int], int, dict]:
    rng = np.random.default_rng(seed)
    world_size = int(rng.choice([4, 8, 12, 16]))
    lengths = rng.lognormal(7, rng.uniform(0.5, 1.6), int(rng.integers(20, 200))).astype(int) + 1
    options = {"window": [None, 300][seed % 2]}
    if seed % 3:
        options["topology"] = replace(topology.Topology.named("h100-ib"), gpus_per_node=[4, 8][seed % 2])
    return lengths.tolist(), world_size, options


def as_planned(mask, seq_len: int, world_size: int, links: topology.Topology | None = None) -> tuple[ChunkWork, Layout]:
    """What `make_plan` lets a layout ask about the mask, and what `balanced` makes of it."""
    seen = []

    def layout(seq_len: int, world_size: int, work: ChunkWork | None) -> Layout:
        seen.append((work, cpflex.balanced(seq_len, world_size, work)))
        return seen[-1][1]

    cpflex.make_plan(mask, seq_len, rank=0, world_size=world_size, layout=layout, topology=links)
    return seen[0]


@pytest.mark.by_day(4)
@pytest.mark.parametrize("seed", range(24))
def test_a_batch_is_never_slower_than_as_it_comes_by_the_estimate(seed: int):
    lengths, world_size, options = random_batch(seed)
    machine = topology.Machine.of(options.get("topology"))
    batch = Batch(np.array(lengths), world_size, options["window"], None, machine)
    packed = cpflex.pack(lengths, world_size, **options)
    cu_seqlens = [0, *np.cumsum(lengths).tolist()]
    mask = cpflex.causal() & cpflex.document(cu_seqlens=cu_seqlens)
    mask = mask & cpflex.sliding_window(options["window"]) if options["window"] else mask
    work, table = as_planned(mask, sum(lengths), world_size, options.get("topology"))
    as_it_comes = estimated_ns(table, work(table.chunk_len, table.num_chunks), work.weights, batch.links)
    assert batch.estimated_ns(packed) <= 1.001 * as_it_comes  # pads compute a little
    assert batch.estimated_ns(packed) == min(map(batch.estimated_ns, candidates(batch)))


@pytest.mark.by_day(4)
@pytest.mark.parametrize("seed", range(12))
def test_a_batch_is_not_slower_than_in_fixed_groups_by_the_estimate(seed: int):
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(6, 1.0, 1500).astype(int) + 1
    links = replace(topology.Topology.named("h100-ib"), gpus_per_node=8)
    machine = topology.Machine.of(links) if seed % 2 else None
    groups: list[list[int]] = [[] for _ in range(4)]
    for length in lengths.tolist():
        min(groups, key=sum).append(length)
    slowest = 0
    for group in groups:
        one = Batch(np.array(group), 8, machine=machine)
        slowest = max(slowest, one.estimated_ns(next(candidates(one))))
    batch = Batch(lengths, 32, machine=machine)
    assert batch.estimated_ns(cpflex.pack(lengths, 32, topology=links if machine else None)) <= slowest


@pytest.mark.parametrize("window", [None, 1, 77, 1000])
@pytest.mark.parametrize(("count", "high"), [(30, 50), (20, 400), (9, 3000), (1, 900)])
def test_work_of_documents_is_that_of_their_mask(count: int, high: int, window: int | None):
    lengths = drawn(count, count, 1, high)
    seq_len = sum(lengths)
    mask = cpflex.causal() & cpflex.document(cu_seqlens=[0, *np.cumsum(lengths).tolist()])
    mask = mask if window is None else mask & cpflex.sliding_window(window)
    expected, _ = as_planned(mask, seq_len, 1)
    for num_chunks in (1, 6, 32):
        sizes = aligned_chunk_len(seq_len, num_chunks), num_chunks
        found, wanted = DocumentWork(lengths, window)(*sizes)["documents"], expected(*sizes)["mask"]
        for name in ("work", "sees", "block_chunk", "block_len"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)


def needed(mask, seq_len: int, world_size: int, layout) -> np.ndarray:
    stats = cpflex.make_plan(mask, seq_len, rank=0, world_size=world_size, layout=layout).stats
    return np.array(stats["needed_tokens"])


def test_short_documents_do_not_travel_while_balanced_spreads_them():
    lengths = drawn(6, 300, 100, 3000)
    packed = cpflex.pack(lengths, 16)
    mask = cpflex.causal() & cpflex.document(cu_seqlens=packed.cu_seqlens)
    assert packed.received == (0,) * 16
    assert not needed(mask, packed.seq_len, 16, packed.layout).any()
    as_they_come = cpflex.causal() & cpflex.document(cu_seqlens=[0, *np.cumsum(lengths).tolist()])
    assert (needed(as_they_come, sum(lengths), 16, cpflex.balanced) > 0).sum() >= 12


@pytest.mark.parametrize("longer", [(60_000, 40_000), (90_000,)])
def test_long_documents_cost_less_than_as_they_come_where_the_network_is_slow(longer: tuple[int, ...]):
    lengths = np.array(drawn(7, 150, 500, 9000, *longer))
    batch = Batch(lengths, 32)
    assert batch.estimated_ns(cpflex.pack(lengths.tolist(), 32)) < 0.8 * batch.estimated_ns(next(candidates(batch)))


def test_all_hosts_pack_alike_and_a_packed_batch_travels():
    lengths, world_size, _ = CASES["long_and_short"]
    one, other = cpflex.pack(lengths, world_size), cpflex.pack(torch.tensor(lengths), world_size)
    assert one == other == pickle.loads(pickle.dumps(one))


def test_a_plan_of_it_is_checked_like_any_other():
    lengths, world_size, _ = CASES["long_and_short"]
    packed = cpflex.pack(lengths, world_size)
    mask = cpflex.causal() & cpflex.document(cu_seqlens=packed.cu_seqlens)
    plan = cpflex.make_plan(mask, packed.seq_len, rank=2, world_size=world_size, layout=packed.layout)
    assert plan.layout == packed.table
    assert cpflex.Plan.from_bytes(plan.to_bytes()).fingerprint == plan.fingerprint
    with pytest.raises(ValueError, match=r"packed to \d+ tokens for 8 ranks; got seq_len=640 for 8"):
        cpflex.make_plan(cpflex.causal(), 640, rank=0, world_size=8, layout=packed.layout)


def test_tokens_are_arranged_and_split_again(case):
    lengths, packed = case
    documents = [torch.arange(n)[:, None] + torch.tensor([1000 * d, 0]) for d, n in enumerate(lengths)]
    x = packed.arrange(documents, pad_value=-1)
    assert torch.equal(x[packed.doc_ids < 0], torch.full(((packed.doc_ids < 0).sum(), 2), -1))
    is_token = packed.doc_ids >= 0
    assert torch.equal(x[is_token][:, 1], packed.position_ids[is_token])
    assert torch.equal(x[is_token][:, 0], (1000 * packed.doc_ids + packed.position_ids)[is_token])
    for found, document in zip(packed.split(x), documents, strict=True):
        assert torch.equal(found, document)


def test_other_documents_than_were_packed_are_refused():
    packed = cpflex.pack([3, 5], 1)
    with pytest.raises(ValueError, match=r"lengths that were packed, \[3, 5\]; got \[5, 3\]"):
        packed.arrange([torch.zeros(5), torch.zeros(3)], pad_value=0)
    with pytest.raises(ValueError, match="the packed sequence's 16 tokens"):
        packed.split(torch.zeros(8))


@pytest.mark.parametrize(
    ("lengths", "world_size", "options", "said"),
    [
        ([], 2, {}, "at least one integer of at least 1 each"),
        ([3, 0], 2, {}, "at least one integer of at least 1 each"),
        ([1.5], 2, {}, "at least one integer of at least 1 each"),
        ([3], 0, {}, "world_size must be an integer of at least 1; got 0"),
        ([3], 2, {"window": 0}, "window must be an integer of at least 1; got 0"),
        (
            [100],
            2,
            {"local_len": 40},
            "local_len must be a multiple of 16, for 100 tokens on 2 ranks at least 64; got 40",
        ),
        ([100], 2, {"local_len": 48}, "at least 64; got 48"),
        ([2**30, 2**30], 2, {}, r"a sequence has less than 2\*\*31 tokens"),
    ],
)
def test_what_cannot_be_packed_is_refused(lengths, world_size: int, options: dict, said: str):
    with pytest.raises(ValueError, match=said):
        cpflex.pack(lengths, world_size, **options)


def test_the_batch_is_told_in_words():
    text = cpflex.pack(drawn(1, 60, 30, 200, 3000, 1100), 8).explain()
    assert "62 documents of " in text
    assert "3,000 tokens: " in text
    assert "x the mean at most" in text

"""pack: laws of an arrangement, figures against brute force, and what short documents cost."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import cpflex
from cpflex.sharding.dealing import PAIRS_PER_TOKEN


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


def test_a_short_document_is_shared_only_across_a_border_of_regions(case):
    lengths, packed = case
    if packed.doc_ids.min() >= 0:
        return  # without any pad there may be no such arrangement
    mean = sum(packed.work) / packed.table.world_size
    shared = [d for d, on in enumerate(packed.holders) if len(on) > 1]
    short = [d for d in shared if lengths[d] <= packed.local_len / 2 and lengths[d] ** 2 / 2 <= mean / 20]
    assert len(short) < packed.table.world_size
    assert all(len(packed.holders[d]) == 2 for d in short)


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


@pytest.mark.parametrize("name", ["short", "long_and_short", "windowed", "no_slack", "all_long"])
def test_work_is_even_or_waits_for_rows(name: str):
    lengths, world_size, options = CASES[name]
    packed = cpflex.pack([8 * length for length in lengths], world_size, **options)
    assert max(packed.work) <= max(1.06 * sum(packed.work) / world_size, PAIRS_PER_TOKEN * max(packed.received))


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


@pytest.mark.parametrize("longer", [(6000, 4000), (9000,)])
def test_no_rank_is_as_busy_as_the_busiest_of_balanced(longer: tuple[int, ...]):
    lengths = drawn(7, 150, 50, 900, *longer)
    packed = cpflex.pack(lengths, 8)
    busiest = []
    for cu, seq_len, layout in (
        (packed.cu_seqlens, packed.seq_len, packed.layout),
        ([0, *np.cumsum(lengths).tolist()], sum(lengths), cpflex.balanced),
    ):
        mask = cpflex.causal() & cpflex.document(cu_seqlens=cu)
        stats = cpflex.make_plan(mask, seq_len, rank=0, world_size=8, layout=layout).stats
        busiest.append((max(stats["work"]), max(stats["needed_tokens"])))
    (work, rows), (others_work, others_rows) = busiest
    assert work < 0.9 * others_work
    assert rows < others_rows


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

"""Where ranks have different tokens: the same results whether queries or keys travel, and the cheaper of the two."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from serving import ALL_HEADS, MASKS, SCORES, Service

import cpflex
from cpflex.paging import together, traffic
from cpflex.paging.together import opening_bytes
from cpflex.paging.travel import Costs, bytes_of_a_message, cheaper
from cpflex.testing import run_ranks
from processes import RankProcesses


def mixed(costs: Costs) -> list[bool]:
    """Of every other sequence keys travel."""
    return [place % 2 == 0 for place in range(len(costs.keys_bytes))]


TRAVEL = [cpflex.queries, cpflex.keys, mixed, None]
ROWS = [cpflex.by_token, cpflex.by_sequence]
FORMS = list(itertools.product(TRAVEL, ROWS))


def name_of(x: Any) -> str:
    return getattr(x, "__name__", str(x))


def serve(group: Any, mask: str, score: str, travel: Any, rows: Any, splits: int | None = None) -> list[torch.Tensor]:
    """Chunks beside single tokens, a fork, single tokens to the end; each step is checked against the dense one."""
    traced, service = cpflex.mask_mod(MASKS[mask], num_heads=ALL_HEADS), Service(group, seed=5)
    for seq in "abc":
        service.reserve(seq, 60)
    plan, outs = None, []
    for new in ({"a": 23, "b": 1, "c": 3}, {"a": 6, "b": 1, "c": 3}, *[{"b": 2, "a": 1}] * 3):
        if plan is None or not plan.fits(new):
            plan = cpflex.make_decode_plan(traced, service.pages, new, 4, rows, plan, splits=splits, travel=travel)
        outs += service.step(plan, MASKS[mask], SCORES[score])
    service.fork("a", "d")
    service.reserve("d", 9)
    new = {"d": 9, "c": 1, "a": 1, "b": 1}
    plan = cpflex.make_decode_plan(traced, service.pages, new, 9, rows, splits=splits, travel=travel)
    return outs + service.step(plan, MASKS[mask], SCORES[score])


@pytest.mark.by_day(8)
@pytest.mark.parametrize(("mask", "form"), list(itertools.product(MASKS, FORMS)), ids=lambda x: x if isinstance(x, str) else "-".join(map(name_of, x)))  # fmt: skip
def test_queries_or_keys_that_travel_equal_dense_attention(mask: str, form: Any, monkeypatch: pytest.MonkeyPatch):
    place = list(MASKS).index(mask) + FORMS.index(form)
    monkeypatch.setattr(traffic, "ROWS_AT_ONCE", (8, 1 << 15)[place % 2])
    score = list(SCORES)[place % len(SCORES)]
    run_ranks(lambda group: serve(group, mask, score, *form, splits=1 + place % 3), 2 + place % 3)


CHUNKS = ([1] * 37, [37], [16, 1, 20], [9, 28])


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("travel", TRAVEL, ids=name_of)
def test_token_by_token_equals_chunks_and_the_whole_prompt(travel: Any, world_size: int):
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, 37, dim, generator=draw) for heads, dim in ((4, 8), (2, 8), (2, 12)))
    mask = MASKS["sinks and window"]

    def prefilled(group: Any, chunks: Sequence[int], travel: Any) -> list[torch.Tensor]:
        service, begin, outs = Service(group), 0, []
        service.reserve("a", 37)
        for count in chunks:
            plan = cpflex.make_decode_plan(mask, service.pages, {"a": count}, rows=cpflex.by_token, travel=travel)
            rows = slice(begin, begin := begin + count)
            outs += service.step(plan, mask, SCORES["alibi"], new=(q[:, :, rows], k[:, :, rows], v[:, :, rows]))
        return outs

    whole = prefilled(None, [37], None)[0]
    for chunks in CHUNKS if world_size == 2 else CHUNKS[2:]:
        ranks = run_ranks(lambda group, chunks=chunks: prefilled(group, chunks, travel), world_size)
        found = torch.cat([torch.cat(outs, dim=2) for outs in zip(*ranks, strict=True)], dim=2)
        torch.testing.assert_close(found, whole, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("travel", [cpflex.keys, mixed], ids=name_of)
def test_the_same_bits_every_run(travel: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(traffic, "ROWS_AT_ONCE", 12)
    one, two = (run_ranks(lambda group: serve(group, "causal", "alibi", travel, cpflex.by_token, 2), 3) for _ in "12")
    assert all(torch.equal(x, y) for a, b in zip(one, two, strict=True) for x, y in zip(a, b, strict=True))


# -- bytes

NEW, KEPT, PAGE, DIMS, KV_HEADS = {"a": 30, "b": 1, "c": 9}, {"a": 21, "b": 50, "c": 0}, 4, (8, 12), 2
ROW_BYTES = {"query": ALL_HEADS * (4 * DIMS[0] + 4 * DIMS[1] + 4), "key": KV_HEADS * 4 * sum(DIMS)}


def brute_force(mask: str, rows: Any, world_size: int) -> tuple[list[int], list[int]]:
    """Bytes by sequence if its queries travel, and if keys do: token by token, with the mask itself."""
    counts = rows(tuple(NEW.values()), world_size).counts
    home = np.repeat(np.arange(world_size), counts)
    by_queries, by_keys, token = [], [], 0
    for place, (seq, new) in enumerate(NEW.items()):
        length = KEPT[seq] + new
        owner = (np.arange(-(-length // PAGE)) + place) % world_size  # of pages, by the turn of the sequence
        homes = home[token : token + new]
        q, k = torch.arange(KEPT[seq], length), torch.arange(length)
        shown = MASKS[mask](torch.tensor(place), torch.tensor(0), q[:, None], k).numpy()
        given = sum(owner[(KEPT[seq] + i) // PAGE] != homes[i] for i in range(new))
        asked = sum(
            shown[:, [key for key in range(length) if owner[key // PAGE] == rank]].any() * (homes != rank).sum()
            for rank in range(world_size)
        )
        sent = 0
        for rank in range(world_size):
            seen = shown[homes == rank].any(axis=0)
            for key in range(length):
                comes = owner[key // PAGE] != rank and seen[key // PAGE * PAGE : (key // PAGE + 1) * PAGE].any()
                is_new = key >= KEPT[seq]
                if is_new and homes[key - KEPT[seq]] != rank:
                    sent += comes or owner[key // PAGE] == rank
                elif not is_new:
                    sent += comes
        by_queries.append(asked * ROW_BYTES["query"] + given * ROW_BYTES["key"])
        by_keys.append(sent * ROW_BYTES["key"])
        token += new
    return by_queries, by_keys


def moved(group: Any, mask: str, rows: Any, travel: Any) -> tuple[Costs, int, int]:
    """What the plan says, and bytes and exchanges of a step of this rank; headers left out."""
    service = Service(group, dims=DIMS, num_kv_heads=KV_HEADS)
    for seq, length in KEPT.items():
        service.reserve(seq, length + NEW[seq])
    if first := {seq: length for seq, length in KEPT.items() if length}:
        service.step(cpflex.make_decode_plan(MASKS[mask], service.pages, first, rows=cpflex.everyone), MASKS[mask])
    plan = cpflex.make_decode_plan(
        MASKS[mask], service.pages, NEW, horizon=1, rows=rows, travel=travel, num_heads=ALL_HEADS
    )
    before, headers = (group.bytes_sent, group.num_exchanges), opening_bytes(group) * (group.world_size - 1)
    service.step(plan, MASKS[mask])
    return plan.traffic.costs, group.bytes_sent - before[0] - headers, group.num_exchanges - before[1] - 1


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("rows", ROWS, ids=name_of)
@pytest.mark.parametrize("mask", ["causal", "window", "sinks and window", "nothing before 20"])
def test_bytes_are_those_that_brute_force_and_the_ranks_count(
    mask: str, rows: Any, world_size: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(together, "LONGEST_OPENING", 0)  # headers go ahead: openings are padded
    by_queries, by_keys = brute_force(mask, rows, world_size)
    cheapest = [k < q for q, k in zip(by_queries, by_keys, strict=True)]
    for travel, chosen in ((cpflex.queries, [False] * 3), (cpflex.keys, [True] * 3), (mixed, [True, False, True]), (None, cheapest)):  # fmt: skip
        found = run_ranks(lambda group, travel=travel: moved(group, mask, rows, travel), world_size)
        for costs, _, num_exchanges in found:
            assert (list(costs.queries_bytes), list(costs.keys_bytes)) == (by_queries, by_keys)
            assert num_exchanges == costs.num_messages(chosen) == (1 if all(chosen) else 2)
        expected = sum(k if is_key else q for q, k, is_key in zip(by_queries, by_keys, chosen, strict=True))
        assert sum(sent for _, sent, _ in found) == expected == found[0][0].total(chosen)


def test_a_page_that_forks_share_comes_once():
    def program(group: Any) -> int:
        service = Service(group)
        service.reserve("a", 40)
        service.step(cpflex.make_decode_plan(MASKS["causal"], service.pages, {"a": 24}), MASKS["causal"])
        for seq in "bcd":
            service.fork("a", seq)
            service.reserve(seq, 4)
        plan = cpflex.make_decode_plan(
            MASKS["causal"], service.pages, dict.fromkeys("bcd", 4), rows=cpflex.by_token, travel=cpflex.keys
        )
        service.step(plan, MASKS["causal"])
        return plan.traffic.most_pages(group.rank)

    # of 6 shared pages half; new ones lie on rank 0, and rank 1 has tokens of two sequences
    assert run_ranks(program, 2) == [3, 3 + 2]


def test_memory_of_fetched_rows_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(traffic, "ROWS_AT_ONCE", 16)

    def program(group: Any) -> tuple[int, int, int]:
        service = Service(group)
        service.reserve("a", 100)
        service.step(cpflex.make_decode_plan(MASKS["causal"], service.pages, {"a": 90}), MASKS["causal"])
        plan = cpflex.make_decode_plan(
            MASKS["causal"], service.pages, {"a": 10}, rows=cpflex.by_token, travel=cpflex.keys
        )
        before = group.num_exchanges
        service.step(plan, MASKS["causal"])
        rows = [x[0].shape[2] for kind, x in plan.steps.made.items() if kind[0] == "fetched"]
        return plan.traffic.num_waves, *rows, group.num_exchanges - before  # the header in the first

    assert run_ranks(program, 2) == [(4, 16, 4)] * 2


# -- the choice


def choice(new: dict[str, int], kept: dict[str, int], world_size: int = 4, **options: Any) -> tuple[list[bool], Costs]:
    """Of the sequences of a plan that is looked at from rank 1; heads as in the study of costs: 64 and 8 of 128."""
    pages = cpflex.Pages(8192, 64, rank=1, world_size=world_size)
    for seq, count in new.items():
        pages.reserve(seq, kept[seq] + count)
        pages.fill(seq, kept[seq])
    options = {"rows": cpflex.by_token, "heads": cpflex.Heads(64, 8, 128)} | options
    plan = cpflex.make_decode_plan(options.pop("mask", cpflex.causal()), pages, new, **options)
    return plan.traffic.keys.tolist(), plan.traffic.costs


def test_keys_travel_if_the_chunk_is_over_a_twelfth_of_the_keys_that_it_needs():
    crossover = 64 * (2 * 128 + 4 * 128 + 4) / (8 * 2 * 256)
    assert 12 < crossover < 12.1
    for chunk in (512, 2048):
        for ratio in (1, 6, 11, 13, 30):
            chosen, costs = choice({"a": chunk}, {"a": chunk * ratio})
            assert chosen == [ratio < crossover], ratio
            found = costs.queries_bytes[0] / costs.keys_bytes[0]
            assert found == pytest.approx(crossover / (ratio + 0.625), rel=0.1)  # a rank sees 5/8 of the chunk


def test_a_chunk_and_single_tokens_in_one_call_choose_for_themselves():
    new, kept = {"long": 2048, "chat": 1, "talk": 1}, {"long": 4096, "chat": 9000, "talk": 200}
    assert choice(new, kept)[0] == [True, False, False]


def test_a_window_lets_keys_travel_where_all_keys_would_be_too_many():
    window = cpflex.causal() & cpflex.sliding_window(1024)
    assert choice({"a": 1024}, {"a": 100_000})[0] == [False]
    assert choice({"a": 1024}, {"a": 100_000}, mask=window)[0] == [True]


def test_layers_of_several_kinds_choose_for_themselves():
    pages = cpflex.Pages(8192, 64, rank=0, world_size=4)
    pages.reserve("a", 101_024)
    pages.fill("a", 100_000)
    masks = {"full": cpflex.causal(), "sliding": cpflex.causal() & cpflex.sliding_window(1024)}
    plan = cpflex.make_decode_plan(masks, pages, {"a": 1024}, rows=cpflex.by_token, heads=cpflex.Heads(64, 8, 128))
    assert [plan[kind].traffic.keys.tolist() for kind in masks] == [[False], [True]]


def test_every_rank_chooses_alike():
    new, kept = {"a": 700, "b": 1, "c": 64}, {"a": 800, "b": 5000, "c": 770}
    plans = []
    for rank in range(4):
        pages = cpflex.Pages(8192, 64, rank=rank, world_size=4)
        for seq, count in new.items():
            pages.reserve(seq, kept[seq] + count)
            pages.fill(seq, kept[seq])
        plans.append(cpflex.make_decode_plan(cpflex.causal(), pages, new, rows=cpflex.by_token))
    assert len({(plan.traffic.in_words, plan.steps.fingerprint, plan.traffic.costs) for plan in plans}) == 1


def test_a_topology_weighs_messages_against_bytes():
    """Few bytes: one message is less than two, whatever moves; many: bytes decide."""
    slow, fast = (cpflex.Topology(8, 400.0, 50.0, intra_latency_us=latency) for latency in (1000.0, 0.0))
    new, kept = {"long": 2048, "chat": 1}, {"long": 2048, "chat": 9000}
    assert choice(new, kept)[0] == choice(new, kept, topology=fast)[0] == [True, False]
    assert choice(new, kept, topology=slow)[0] == [True, True]
    assert bytes_of_a_message(None, 4) == 0.0
    assert bytes_of_a_message(slow, 4) == 4 * 400e9 * 1001e-6


@pytest.mark.parametrize(
    ("queries_bytes", "keys_bytes", "waves", "message", "expected"),
    [
        ((10, 10), (9, 11), 1, 0, (True, False)),
        ((10, 10), (10, 10), 1, 0, (False, False)),
        ((10, 10), (9, 11), 1, 1.5, (True, True)),
        ((10, 10), (9, 11), 4, 1.5, (False, False)),
        ((10, 10), (1, 1), 4, 1.5, (True, True)),
        ((), (), 1, 0, ()),
    ],
)
def test_the_cheaper_of_the_two(queries_bytes, keys_bytes, waves: int, message: float, expected: tuple[bool, ...]):
    assert cheaper(Costs(queries_bytes, keys_bytes, waves, message)) == expected


def test_heads_are_those_of_the_pools_or_of_the_usual_model():
    found = []
    for make in (
        lambda pages: None,
        lambda pages: pages.pool(8, 128, dtype=torch.bfloat16),
        lambda pages: pages.pool(8, 128),
    ):
        pages = cpflex.Pages(64, 4, rank=0, world_size=2)
        pages.reserve("a", 100)
        pages.fill("a", 50)
        make(pages)
        plan = cpflex.make_decode_plan(cpflex.causal(), pages, {"a": 8}, rows=cpflex.by_token)
        found.append(plan.traffic.costs.keys_bytes[0])
    assert found[0] == found[1] and found[2] == 2 * found[0]


# -- processes


def served(group: dist.ProcessGroup, travel: Any) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traffic, "ROWS_AT_ONCE", 16)
        return serve(group, "sinks and window", "softcap", travel, cpflex.by_token)


@pytest.mark.by_day(2)
@pytest.mark.parametrize("processes", [2, 4], indirect=True)
@pytest.mark.parametrize("travel", [cpflex.keys, mixed], ids=name_of)
def test_processes_compute_what_threads_do(travel: Any, processes: RankProcesses, monkeypatch: pytest.MonkeyPatch):
    found = processes.run(served, travel)
    monkeypatch.setattr(traffic, "ROWS_AT_ONCE", 16)
    threads = run_ranks(
        lambda group: serve(group, "sinks and window", "softcap", travel, cpflex.by_token), processes.world_size
    )
    for ours, theirs in zip(found, threads, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def unlike(group: Any) -> str:
    """What a rank is told whose plan lets keys travel, or queries, after a step in which all do alike."""
    rank = group.rank if isinstance(group.rank, int) else group.rank()
    service = Service(group)
    service.reserve("a", 30)
    options = {"rows": cpflex.by_token, "travel": cpflex.keys}
    service.step(cpflex.make_decode_plan(cpflex.causal(), service.pages, {"a": 9}, **options), MASKS["causal"])
    options["travel"] = cpflex.keys if rank == 1 else cpflex.queries
    try:
        service.step(cpflex.make_decode_plan(cpflex.causal(), service.pages, {"a": 5}, **options), MASKS["causal"])
    except cpflex.RankMismatch as error:
        return str(error)
    return ""


def test_ranks_that_let_other_things_travel_are_told(two_processes: RankProcesses):
    for said in (*run_ranks(unlike, 3), *two_processes.run(unlike)):
        assert "the ranks disagree about what travels" in said
        assert "keys of 0 and queries of 1 sequences" in said and "keys of 1 and queries of 0 sequences" in said


def test_another_attention_of_the_same_step_finds_the_keys_where_they_lie():
    """New keys are with their owners then, and come from there."""

    def program(group: Any) -> bool:
        service = Service(group)
        service.reserve("a", 40)
        service.step(cpflex.make_decode_plan(cpflex.causal(), service.pages, {"a": 17}), MASKS["causal"])
        plan = cpflex.make_decode_plan(
            cpflex.causal(), service.pages, {"a": 11}, rows=cpflex.by_token, travel=cpflex.keys
        )
        q, k, v = (service.drawn(heads, 11, dim) for heads, dim in ((4, 8), (2, 8), (2, 12)))
        (first,) = service.step(plan, MASKS["causal"], new=(q, k, v), advance=False)
        for x in plan.steps.made.values():
            if isinstance(x, tuple) and all(isinstance(one, torch.Tensor) for one in x):
                for one in x:
                    one.fill_(float("nan"))  # what was fetched before
        pool = service.pools[0]
        again = cpflex.flex_attention(service.mine(q, plan), pool.k, pool.v, None, plan, enable_gqa=True)
        return torch.equal(first, again)

    assert run_ranks(program, 3) == [True] * 3

"""Laws of decoding: it equals the dense attention whatever the chunks, pages, ranks, rows and splits."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from serving import ALL_HEADS, MASKS, SCORES, Service

import cpflex
from cpflex.kernels import attend_pages
from cpflex.testing import run_ranks

ROWS = [cpflex.everyone, cpflex.by_sequence, cpflex.by_token, cpflex.by_head]


def serve(group: Any, mask: str, score: str, rows: Any, splits: int | None = None, dtype: torch.dtype = torch.float32):
    """A prompt in chunks beside single tokens and speculations, a fork, and single tokens to the end."""
    traced = cpflex.mask_mod(MASKS[mask], num_heads=ALL_HEADS)
    service = Service(group, dtype=dtype, seed=5)
    for seq in "abc":
        service.reserve(seq, 60)
    plan, travel = None, cpflex.queries if rows in (cpflex.by_sequence, cpflex.by_token) else None
    for new in ({"a": 23, "b": 1, "c": 3}, {"a": 6, "b": 1, "c": 3}, *[{"b": 2, "a": 1}] * 3):
        if plan is None or not plan.fits(new):
            plan = cpflex.make_decode_plan(traced, service.pages, new, 4, rows, plan, splits=splits, travel=travel)
        service.step(plan, MASKS[mask], SCORES[score])
    service.fork("a", "d")
    service.reserve("d", 9)
    new = dict.fromkeys("dcab", 1)
    plan = cpflex.make_decode_plan(traced, service.pages, new, 9, rows, splits=splits, travel=travel)
    outs = [service.step(plan, MASKS[mask], SCORES[score])[0] for _ in range(9)]
    assert plan.why_over == "its 9 steps are done"
    return outs


@pytest.mark.by_day(6)
@pytest.mark.parametrize(
    ("mask", "rows"), list(itertools.product(MASKS, ROWS)), ids=lambda x: getattr(x, "__name__", x)
)
def test_many_sequences_in_one_call_equal_dense_attention(mask: str, rows: Any):
    place = list(MASKS).index(mask)
    score = list(SCORES)[(place + ROWS.index(rows)) % len(SCORES)]
    for world_size in (1, (2, 4)[place % 2] if rows is cpflex.by_head else 3):
        run_ranks(lambda group: serve(group, mask, score, rows, splits=1 + place % 3), world_size)


def test_bf16_equals_dense_attention_within_its_budget():
    run_ranks(lambda group: serve(group, "sinks and window", "softcap", cpflex.everyone, dtype=torch.bfloat16), 2)


@pytest.mark.parametrize("rows", ROWS)
def test_the_same_bits_every_run(rows: Any):
    one, two = (run_ranks(lambda group: serve(group, "window", "alibi", rows, splits=4), 2) for _ in range(2))
    assert all(torch.equal(x, y) for a, b in zip(one, two, strict=True) for x, y in zip(a, b, strict=True))


def test_who_has_the_rows_does_not_change_a_bit():
    by_rank = [run_ranks(lambda group, rows=rows: serve(group, "causal", "none", rows), 2) for rows in ROWS]
    for step in range(9):
        everyone, by_sequence, by_token, by_head = ([outs[step] for outs in ranks] for ranks in by_rank)
        assert torch.equal(everyone[0], everyone[1])
        assert torch.equal(torch.cat(by_sequence, dim=2), everyone[0])
        assert torch.equal(torch.cat(by_token, dim=2), everyone[0])
        assert torch.equal(torch.cat(by_head, dim=1), everyone[0])


CHUNKS = {"token by token": [1] * 40, "whole": [40], "chunks": [7, 16, 1, 9, 7], "pages": [4] * 10}


@pytest.mark.parametrize("mask", ["causal", "sinks and window", "dilated", "by head"])
def test_token_by_token_equals_chunks_and_the_whole_prompt(mask: str):
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, 40, dim, generator=draw) for heads, dim in ((4, 8), (2, 8), (2, 12)))
    traced, found = cpflex.mask_mod(MASKS[mask], num_heads=ALL_HEADS), {}
    for name, chunks in CHUNKS.items():
        service, begin, outs = Service(None), 0, []
        service.reserve("a", 40)
        for count in chunks:
            plan = cpflex.make_decode_plan(traced, service.pages, {"a": count})
            rows = slice(begin, begin := begin + count)
            outs += service.step(plan, MASKS[mask], None, new=(q[:, :, rows], k[:, :, rows], v[:, :, rows]))
        found[name] = torch.cat(outs, dim=2)
    for out in found.values():
        torch.testing.assert_close(out, found["whole"], atol=2e-6, rtol=1e-5)


def test_any_permutation_of_pages_gives_the_same_bits():
    """By turns of a sequence that is erased in between, pages of another come to lie anywhere."""
    found = []
    for order in ([], [5, 2, 9], [1, 12, 4, 3]):
        service = Service(None, num_pages=40)
        for number, tokens in enumerate(order):
            service.reserve(number, 4 * tokens)
        for number in range(0, len(order), 2):
            service.erase(number)
        service.reserve("a", 40)
        slots = service.pages.held("a").slot
        assert (np.diff(slots) == 1).all() == (not order)
        service.random.manual_seed(7)
        plan = cpflex.make_decode_plan(cpflex.causal(), service.pages, {"a": 10})
        found.append(torch.cat([service.step(plan, MASKS["causal"])[0] for _ in range(4)], dim=2))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("splits", [1, 3, 50])
@pytest.mark.parametrize("mask", MASKS)
def test_each_visible_page_is_walked_once_by_its_owner_and_no_other_is(mask: str, splits: int):
    new, limits = {"a": 1, "b": 70, "c": 5}, {}
    read: dict[tuple[int, int], list[int]] = {}
    for rank in range(3):
        pages = cpflex.Pages(80, 4, rank=rank, world_size=3)
        for seq, kept in (("a", 50), ("b", 3), ("c", 17)):
            pages.reserve(seq, 90)
            pages.fill(seq, kept)
        plan = cpflex.make_decode_plan(MASKS[mask], pages, new, 8, num_heads=ALL_HEADS, splits=splits)
        limits = dict(zip(new, plan.steps.limits, strict=True))
        for place, first, end, first_run, end_run, _ in plan.tables.items.tolist():
            held = pages.held(list(new)[place])
            for begin, stop, position in plan.tables.runs[first_run:end_run].tolist():
                for row in range(begin, stop, 4):
                    page = (position + row - begin) // 4
                    assert held.slot[page] == row // 4 and held.owner[page] == rank
                    for token in range(first, end):
                        read.setdefault((token, page), []).append(rank)
    assert all(len(ranks) == 1 for ranks in read.values()), "a page is walked twice"
    for place, (seq, count) in enumerate(new.items()):
        begin, start = sum(list(new.values())[:place]), {"a": 50, "b": 3, "c": 17}[seq]
        for token in range(count):
            for done in range(0, (limits[seq] - start) // count * count, count):
                q, k = torch.tensor(start + done + token), torch.arange(start + done + count)
                seen = torch.stack(
                    [MASKS[mask](torch.tensor(place), torch.tensor(h), q, k) for h in range(ALL_HEADS)]
                ).any(0)
                missing = {int(page) for page in k[seen] // 4} - {page for t, page in read if t == begin + token}
                assert not missing, f"{seq}: pages {missing} are not read"


def test_pages_that_no_step_of_the_horizon_sees_are_not_read():
    pages = cpflex.Pages(512, 64)
    pages.reserve("a", 512 * 64)
    pages.fill("a", 500 * 64)
    plan = cpflex.make_decode_plan(cpflex.causal() & cpflex.sliding_window(256), pages, {"a": 1}, horizon=64)
    assert len(plan.tables.runs) == 1 and plan.tables.runs[0].tolist() == [496 * 64, 501 * 64, 496 * 64]


def test_a_rank_without_visible_pages_has_no_items_to_walk():
    idle = []
    for rank in range(4):
        pages = cpflex.Pages(64, 64, rank=rank, world_size=4)
        pages.reserve("a", 4000)
        pages.fill("a", 3000)
        idle.append(cpflex.make_decode_plan(MASKS["window"], pages, {"a": 1}, horizon=8).tables.is_idle)
    assert idle == [True, True, False, True]


def test_a_rank_without_visible_pages_attends_to_nothing(monkeypatch: pytest.MonkeyPatch):
    attended: list[str] = []

    def noted(*arguments: Any) -> Any:
        attended.append(threading.current_thread().name)
        return attend_pages(*arguments)

    def program(group: Any) -> bool:
        service = Service(group)
        service.reserve("a", 60)
        service.step(cpflex.make_decode_plan(MASKS["causal"], service.pages, {"a": 40}), MASKS["causal"])
        plan = cpflex.make_decode_plan(MASKS["window"], service.pages, {"a": 1}, horizon=2)
        service.step(plan, MASKS["window"])
        return plan.tables.is_idle

    monkeypatch.setattr("cpflex.paging.reading.attend_pages", noted)
    idle = run_ranks(program, 4)
    assert True in idle and False in idle
    assert [attended.count(f"rank{rank}") for rank in range(4)] == [1 if is_idle else 2 for is_idle in idle]


def test_a_tree_of_speculated_tokens_is_a_mask_and_a_crop():
    """Two branches are verified in one call; the accepted one is kept, and equals what token by token gives."""
    parents, prompt = [-1, 0, 0, 1, 2], 11
    ancestors = torch.zeros(8, dtype=torch.int64)
    for place, parent in enumerate(parents):
        ancestors[place] = (1 << place) | (int(ancestors[parent]) if parent >= 0 else 0)
    base = torch.tensor(prompt)

    def tree(b, h, q, k):
        inside = (ancestors[(q - base).clamp(0, 7)] >> (k - base).clamp(0, 7)) & 1
        return (k < base) | ((k >= base) & (inside == 1))

    def program(group: Any) -> None:
        service = Service(group, seed=2)
        service.reserve("a", 40)
        service.step(cpflex.make_decode_plan(cpflex.causal(), service.pages, {"a": prompt}), MASKS["causal"])
        plan = cpflex.make_decode_plan(tree, service.pages, {"a": 5}, horizon=1)
        q, k, v = (service.drawn(heads, 5, dim) for heads, dim in ((4, 8), (2, 8), (2, 12)))
        (out,) = service.step(plan, tree, new=(q, k, v))
        service.crop("a", prompt)
        accepted = [0, 2, 4]
        service.reserve("a", 3)
        plan = cpflex.make_decode_plan(cpflex.causal(), service.pages, {"a": 3})
        (again,) = service.step(plan, MASKS["causal"], new=tuple(x[:, :, accepted] for x in (q, k, v)))
        torch.testing.assert_close(again, out[:, :, accepted], atol=2e-6, rtol=1e-5)

    run_ranks(program, 3)


def test_tokens_after_a_speculation_are_those_of_decoding_one_by_one():
    """What was accepted of a tree is kept at the place that it has in the sequence, by `assign` alone."""
    parents, accepted, prompt = [-1, 0, 0, 1, 2], [0, 2, 4], 11
    ancestors = torch.tensor([sum(1 << x for x in path(place, parents)) for place in range(5)])
    draw = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, heads, prompt + 5 + 4, dim, generator=draw) for heads, dim in ((4, 8), (2, 8), (2, 12)))
    kept = [*range(prompt), *(prompt + place for place in accepted), *range(prompt + 5, prompt + 9)]
    traced = cpflex.mask_mod(MASKS["sinks and window"])

    def tree(b, h, q, k):
        inside = (ancestors[(q - prompt).clamp(0, 4)] >> (k - prompt).clamp(0, 4)) & 1
        return (k < prompt) | ((k >= prompt) & (inside == 1))

    def begun(group: Any) -> Service:
        service = Service(group)
        service.reserve("a", 40)
        plan = cpflex.make_decode_plan(traced, service.pages, {"a": prompt})
        service.step(plan, MASKS["sinks and window"], new=tuple(x[:, :, :prompt] for x in (q, k, v)))  # type: ignore[arg-type]
        return service

    def last(service: Service, count: int) -> torch.Tensor:
        outs = []
        for at in kept[-count:]:
            plan = cpflex.make_decode_plan(traced, service.pages, {"a": 1}, horizon=1)
            new = tuple(x[:, :, at : at + 1] for x in (q, k, v))
            outs += service.step(plan, MASKS["sinks and window"], new=new)  # type: ignore[arg-type]
        return torch.cat(outs, dim=2)

    def speculated(group: Any) -> torch.Tensor:
        service = begun(group)
        plan = cpflex.make_decode_plan(tree, service.pages, {"a": 5}, horizon=1)
        service.step(plan, tree, new=tuple(x[:, :, prompt : prompt + 5] for x in (q, k, v)))  # type: ignore[arg-type]
        service.crop("a", prompt)
        service.reserve("a", 20)
        plan = cpflex.make_decode_plan(traced, service.pages, {"a": 3})
        pool, chosen = service.pools[0], kept[prompt : prompt + 3]
        pool.assign(k[:, :, chosen], v[:, :, chosen], plan)
        plan.advance()
        service.dense["a"] = [tuple(torch.cat([old, x[0, :, chosen]], 1) for old, x in zip(service.dense["a"][0], (k, v), strict=True))]  # type: ignore[list-item]  # fmt: skip
        return last(service, 4)

    one_by_one = last(begun(None), 7)[:, :, 3:]
    for found in run_ranks(speculated, 3):
        torch.testing.assert_close(found, one_by_one, atol=2e-6, rtol=1e-5)


def path(place: int, parents: list[int]) -> list[int]:
    """A token and those before it."""
    return [place] if parents[place] < 0 else [*path(parents[place], parents), place]


OWNERS = {
    "in turn": None,
    "the second alone": [1] * 10,
    "halves": [0] * 5 + [1] * 5,
    "uneven": [0, 0, 0, 1] * 2 + [0, 0],
}


@pytest.mark.parametrize("mask", ["causal", "window", "random"])
def test_whoever_owns_the_pages_a_step_gives_the_same(mask: str):
    """To the bit where one rank has them all, and adds nothing to what it has."""

    def outs(group: Any, owners: list[int] | None) -> torch.Tensor:
        service = Service(group)
        service.pages.reserve("a", 40, owners=owners)
        service.reserve("a", 40)
        plan = cpflex.make_decode_plan(MASKS[mask], service.pages, {"a": 10})
        return torch.cat([service.step(plan, MASKS[mask], SCORES["softcap"])[0] for _ in range(4)], dim=2)

    alone = outs(None, None)
    for name, owners in OWNERS.items():
        for found in run_ranks(lambda group, owners=owners: outs(group, owners), 2):
            torch.testing.assert_close(found, alone, atol=2e-6, rtol=1e-5)
            assert name != "the second alone" or torch.equal(found, alone)


def test_kinds_of_layers_share_pages_and_have_plans_of_their_own():
    masks = {"sliding": MASKS["window"], "full": MASKS["causal"]}

    def program(group: Any) -> None:
        service = Service(group, num_pools=2)
        for seq in "ab":
            service.reserve(seq, 40)
        plan = cpflex.make_decode_plan(masks, service.pages, {"a": 12, "b": 5})
        assert plan["full"].kind == "full" and plan.kinds == ("sliding", "full")
        for _ in range(3):
            service.step(plan, masks)
        assert service.evict(masks) == 0

    run_ranks(program, 2)


HEADER = 4 * 8
COUNTS = {  # exchanges of a step that is like the one before, and bytes of the first and the second of two ranks, 3 tokens
    cpflex.everyone: (1, 3 * ALL_HEADS * (12 + 1) * 4, 0),
    cpflex.by_sequence: (2, 2 * (ALL_HEADS * 8 + 2 * (8 + 12)) * 4, ALL_HEADS * (12 + 1) * 4),
    cpflex.by_token: (2, 2 * (ALL_HEADS * 8 + 2 * (8 + 12)) * 4, ALL_HEADS * (12 + 1) * 4),
    cpflex.by_head: (2, 3 * (ALL_HEADS // 2 * 8 + 8 + 12) * 4, 3 * ALL_HEADS // 2 * (12 + 1) * 4),
}


@pytest.mark.parametrize("rows", COUNTS)
def test_a_step_is_one_message_to_each_rank_or_two_and_its_header_rides_in_the_first(rows: Any):
    """Only where a step is unlike the one before does the header go ahead of its message."""

    def program(group: Any) -> list[tuple[int, int]]:
        service, found = Service(group, dims=(8, 12)), []
        for seq in "ab":
            service.reserve(seq, 40)
        travel = cpflex.queries if rows in (cpflex.by_sequence, cpflex.by_token) else None
        plan = cpflex.make_decode_plan(cpflex.causal(), service.pages, {"a": 2, "b": 1}, rows=rows, travel=travel)
        for _ in range(3):
            before = group.num_exchanges, group.bytes_sent
            service.step(plan, MASKS["causal"])
            found.append((group.num_exchanges - before[0], group.bytes_sent - before[1]))
        assert group.num_gathered == group.num_waits == 0
        return found

    num_exchanges, first, second = COUNTS[rows]
    found = run_ranks(program, 2)
    assert [[count for count, _ in steps] for steps in found] == [[num_exchanges + 1, num_exchanges, num_exchanges]] * 2
    # rank 0 has two of the three tokens, and sends home the partials of one; it keeps their keys in the first step
    divided = rows in (cpflex.by_sequence, cpflex.by_token)
    assert found[0][0][1] == HEADER + (first - 2 * 2 * (8 + 12) * 4 if divided else first) + second
    assert found[0][1:] == [(num_exchanges, HEADER + first + second)] * 2


def test_a_step_may_be_longer_or_shorter_than_the_one_before():
    """Chunks beside single tokens, layers of two sizes in turn: openings are padded, or alone; nothing else changes."""

    def program(group: Any) -> list[int]:
        counts = []
        wide, narrow = (Service(group, dims=dims, seed=3) for dims in ((8, 12), (4, 4)))
        for service in (wide, narrow):
            service.reserve("a", 150)
        for new in (1, 1, 40, 1, 1, 90, 1, 2, 1):
            for service in (wide, narrow):
                before = group.num_exchanges
                service.step(cpflex.make_decode_plan(MASKS["window"], service.pages, {"a": new}), MASKS["window"])
                counts.append(group.num_exchanges - before)
        return counts

    first, second = run_ranks(program, 2)
    assert first == second and set(first) == {1, 2} and first[2:4] == [1, 1]


def test_a_token_outside_the_window_changes_nothing_bit_by_bit():
    outs = []
    for changed in (False, True):
        service = Service(None)
        service.reserve("a", 60)
        service.reserve("b", 60)
        service.step(cpflex.make_decode_plan(MASKS["window"], service.pages, {"a": 30, "b": 9}), MASKS["window"])
        if changed:
            held = service.pages.held("a")
            rows = [int(held.slot[p // 4]) * 4 + p % 4 for p in (0, 5, 19, 21)]
            for x in (service.pools[0].k, service.pools[0].v):
                x[:, :, rows[:3]] = float("nan")
                x[:, :, rows[3]] = 1e4  # in a page of which other tokens are seen
        service.random.manual_seed(9)
        plan = cpflex.make_decode_plan(MASKS["window"], service.pages, {"b": 2, "a": 1}, horizon=2)
        q, k, v = (service.drawn(heads, 3, dim) for heads, dim in ((4, 8), (2, 8), (2, 12)))
        service.pools[0].assign(k, v, plan)
        pool = service.pools[0]
        outs.append(cpflex.flex_attention(q, pool.k, pool.v, None, plan, enable_gqa=True))
    assert torch.equal(*outs)


def test_pools_and_steps_in_inference_mode_and_under_autocast():
    def program(group: Any) -> None:
        with torch.inference_mode():
            service = Service(group)
            service.reserve("a", 20)
            plan = cpflex.make_decode_plan(cpflex.causal(), service.pages, {"a": 2})
            service.step(plan, MASKS["causal"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plan_q = service.drawn(ALL_HEADS, 2, 8)
            k, v = (service.drawn(2, 2, dim) for dim in (8, 12))
            pool = service.pools[0]
            pool.assign(k, v, plan)
            out = cpflex.flex_attention(plan_q, pool.k, pool.v, None, plan, enable_gqa=True)
        again = cpflex.flex_attention(plan_q, pool.k, pool.v, None, plan, enable_gqa=True)
        assert out.dtype == torch.float32 and torch.equal(out, again)

    run_ranks(program, 2)


def test_compiled_code_around_a_step_calls_it_as_it_is():
    service = Service(None)
    service.reserve("a", 20)
    plan = cpflex.make_decode_plan(cpflex.causal(), service.pages, {"a": 2})
    q, k, v = (service.drawn(heads, 2, dim) for heads, dim in ((4, 8), (2, 8), (2, 12)))
    pool = service.pools[0]
    pool.assign(k, v, plan)

    def layer(q):
        return cpflex.flex_attention(2 * q, pool.k, pool.v, None, plan, enable_gqa=True) + 1

    assert torch.equal(torch.compile(layer, backend="eager")(q), layer(q))


@pytest.mark.parametrize("offset", [0, 1], ids=["", "not aligned"])
def test_a_score_mod_reads_what_its_tensors_hold_at_each_step(offset: int):
    """What was decided for a plan is kept with it; neither numbers nor another tensor's memory are."""
    memory = torch.rand(2, ALL_HEADS + 1, generator=torch.Generator().manual_seed(4))
    tables = [row[offset : offset + ALL_HEADS] for row in memory]
    mods = [lambda s, b, h, q, k, table=table: s - table[h] * (q - k) for table in tables]
    service = Service(None)
    service.reserve("a", 40)
    plan = cpflex.make_decode_plan(cpflex.causal(), service.pages, {"a": 3})
    for place in (0, 1, 0, 1, 0):
        service.step(plan, MASKS["causal"], cpflex.score_mod(mods[place]))
        memory.mul_(-1.5)
        if place:
            tables[0].data = tables[0].clone()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_chunks_whose_queries_travel_equal_the_whole_prompt(world_size: int):
    """Each rank computes a part of every chunk; keys stay in their pages."""
    draw = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, heads, 75, dim, generator=draw) for heads, dim in ((4, 8), (2, 8), (2, 12)))

    def prefilled(group: Any, chunks: list[int]) -> tuple[list[torch.Tensor], list[int]]:
        service, begin, outs, counts = Service(group), 0, [], []
        service.reserve("a", 75)
        for count in chunks:
            plan = cpflex.make_decode_plan(MASKS["sinks and window"], service.pages, {"a": count}, rows=cpflex.by_token)
            rows = slice(begin, begin := begin + count)
            new = q[:, :, rows], k[:, :, rows], v[:, :, rows]
            counts.append(plan.num_tokens)
            outs += service.step(plan, MASKS["sinks and window"], SCORES["alibi"], new=new)
        return outs, counts

    whole = prefilled(None, [75])[0][0]
    ranks = run_ranks(lambda group: prefilled(group, [31, 1, 40, 3]), world_size)
    for _, counts in ranks:
        assert all(abs(count - chunk / world_size) < 1 for count, chunk in zip(counts, [31, 1, 40, 3], strict=True))
    found = torch.cat([torch.cat([outs[chunk] for outs, _ in ranks], dim=2) for chunk in range(4)], dim=2)
    torch.testing.assert_close(found, whole, atol=2e-6, rtol=1e-5)


def test_only_the_rank_that_has_the_last_token_samples_from_it():
    last = []
    for rank in range(3):
        pages = cpflex.Pages(40, 4, rank=rank, world_size=3)
        for seq in "ab":
            pages.reserve(seq, 20)
        plan = cpflex.make_decode_plan(cpflex.causal(), pages, {"a": 5, "b": 2}, rows=cpflex.by_token)
        last.append({seq: (plan.rows_of(seq), refused_or(plan.last_row, seq)) for seq in plan.sequences})
    assert last == [
        {"a": (slice(0, 3), "rank 0 does not have the last new token of 'a'; a later rank does")},
        {"a": (slice(0, 2), 1)},
        {"b": (slice(0, 2), 1)},
    ]


def refused_or(call: Callable[[str], int], seq: str) -> int | str:
    try:
        return call(seq)
    except ValueError as error:
        return str(error)

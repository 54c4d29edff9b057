"""Pages: bookkeeping of all ranks on each, that never loses a page, and refuses what it cannot do by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from serving import Service

import cpflex

SLIDING = cpflex.causal() & cpflex.sliding_window(8)


def pages_of(rank: int = 0, world_size: int = 3, num_pages: int = 8, page_size: int = 4) -> cpflex.Pages:
    return cpflex.Pages(num_pages, page_size, rank=rank, world_size=world_size)


def test_pages_take_turns_and_the_next_sequence_begins_at_the_next_rank():
    pages = pages_of()
    pages.reserve("a", 17)
    pages.reserve("b", 9)
    assert pages.held("a").owner.tolist() == [0, 1, 2, 0, 1]
    assert pages.held("b").owner.tolist() == [1, 2, 0]
    assert pages.held("a").slot.tolist() == [0, 0, 0, 1, 1]
    assert pages.num_free == (8 - 3, 8 - 3, 8 - 2)
    assert pages.capacity("a") == 20 and pages.length("a") == 0


def test_reserved_tokens_count_from_what_is_kept():
    pages = pages_of()
    pages.reserve("a", 4)
    pages.reserve("a", 4)
    assert pages.capacity("a") == 4
    pages.fill("a", 3)
    pages.reserve("a", 2)
    assert pages.capacity("a") == 8


def test_the_rank_that_is_out_of_pages_is_named_on_every_rank_and_nothing_changes():
    for rank in range(3):
        pages = pages_of(rank)
        pages.reserve("a", 4 * 22)  # 8, 7 and 7 pages
        before = pages.num_free, pages.history
        with pytest.raises(
            cpflex.OutOfPages, match="rank 0 is out of pages: 1 tokens of sequence 'c' need 1 of its 8, and 0"
        ):
            pages.reserve("c", 1, owners=[0])
        assert (pages.num_free, pages.history) == before and "c" not in pages


def test_a_fork_shares_whole_pages_and_copies_the_one_that_is_not_full():
    service = Service(None, num_pages=8)
    service.reserve("a", 16)
    plan = cpflex.make_decode_plan(cpflex.causal(), service.pages, {"a": 10})
    service.step(plan, cpflex.causal())
    service.fork("a", "b")
    a, b = service.pages.held("a"), service.pages.held("b")
    assert a.slot[:2].tolist() == b.slot.tolist()[:2] and a.slot[2] != b.slot[2] and len(b.slot) == 3
    rows = [int(x.slot[2]) * 4 for x in (a, b)]
    k = service.pools[0].k
    assert torch.equal(k[:, :, rows[0] : rows[0] + 2], k[:, :, rows[1] : rows[1] + 2])
    service.erase("a")
    assert service.pages.num_free == (8 - 3,)
    service.reserve("b", 6)
    service.step(cpflex.make_decode_plan(cpflex.causal(), service.pages, {"b": 5}), cpflex.causal())


def test_cropping_into_a_shared_page_copies_it():
    service = Service(None, num_pages=9)
    service.reserve("a", 16)
    service.step(cpflex.make_decode_plan(cpflex.causal(), service.pages, {"a": 16}), cpflex.causal())
    service.fork("a", "b")
    assert service.pages.num_free == (5,)
    service.crop("b", 6)
    a, b = service.pages.held("a"), service.pages.held("b")
    assert b.slot[0] == a.slot[0] and b.slot[1] != a.slot[1] and service.pages.num_free == (4,)
    for seq in ("b", "a"):
        service.reserve(seq, 4)
        service.step(cpflex.make_decode_plan(cpflex.causal(), service.pages, {seq: 4}), cpflex.causal())


@pytest.mark.parametrize("rank", [0, 2])
def test_a_page_is_given_back_when_the_last_of_its_holders_lets_it_go(rank: int):
    pages = pages_of(rank)
    pages.reserve("a", 12)
    pages.fill("a", 12)
    for child in "bc":
        pages.fork("a", child)
    for seq, free in (("a", 21), ("c", 21), ("b", 24)):
        pages.erase(seq)
        assert sum(pages.num_free) == free
    assert pages.sequences == ()


def test_evict_frees_what_a_window_has_left_and_keeps_sinks():
    pages = pages_of(world_size=1, num_pages=30)
    pages.reserve("a", 60)
    pages.fill("a", 40)
    sinks = cpflex.causal() & (cpflex.sliding_window(8) | (lambda b, h, q, k: k < 2))
    assert pages.evict({"sliding": SLIDING, "full": cpflex.causal()}) == 0
    assert pages.evict(sinks) == 7
    assert np.flatnonzero(pages.held("a").slot < 0).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert pages.evict(sinks) == 0
    assert pages.evict(SLIDING) == 1


def test_a_page_that_a_later_query_sees_is_kept():
    pages = pages_of(world_size=1, num_pages=30)
    pages.reserve("a", 60)
    pages.fill("a", 40)
    assert pages.evict(lambda b, h, q, k: (k <= q) & ((k >= 32) | (q >= 50))) == 0
    assert pages.evict(lambda b, h, q, k: (k <= q) & ((k >= 32) | (q < 40))) == 8


def test_evict_leaves_what_the_newest_plan_reads():
    service = Service(None, num_pages=30)
    service.reserve("a", 60)
    service.step(cpflex.make_decode_plan(SLIDING, service.pages, {"a": 30}), SLIDING)
    mask = cpflex.mask_mod(SLIDING)
    plan = cpflex.make_decode_plan(mask, service.pages, {"a": 1}, horizon=20)
    for step in range(20):
        service.step(plan, SLIDING)
        assert service.evict(mask) == (5 if step == 0 else 0)
    assert not plan.fits({"a": 1})
    cpflex.make_decode_plan(mask, service.pages, {"a": 1}, horizon=20)
    assert service.evict(mask) == 5


def test_a_plan_that_may_see_an_evicted_page_is_refused():
    pages = pages_of(world_size=1, num_pages=30)
    pages.reserve("a", 60)
    pages.fill("a", 40)
    pages.evict(SLIDING)
    cpflex.make_decode_plan(SLIDING, pages, {"a": 1})
    with pytest.raises(
        ValueError, match=r"may see the keys from position 0 on of sequence 'a', whose page was evicted"
    ):
        cpflex.make_decode_plan(cpflex.causal(), pages, {"a": 1})
    with pytest.raises(
        ValueError, match="sequence 'a' cannot be cropped to 30: the page of its last token was evicted"
    ):
        pages.crop("a", 30)
    pages.crop("a", 36)
    pages.reserve("a", 1)
    with pytest.raises(ValueError, match=r"may see the keys from position 28 on"):
        cpflex.make_decode_plan(SLIDING, pages, {"a": 1})


def test_calls_that_differ_have_another_history():
    one, other = pages_of(0), pages_of(1)
    for pages in (one, other):
        pages.reserve("a", 9)
    assert one.history == other.history
    other.reserve("a", 10)
    assert one.history != other.history


def test_pages_are_owned_by_the_ranks_that_are_named():
    pages = pages_of(1)
    pages.reserve("a", 20, owners=[2, 2, 1, 1, 0])
    assert pages.held("a").owner.tolist() == [2, 2, 1, 1, 0]
    pool = pages.pool(2, 8)
    k = torch.randn(1, 2, 6, 8)
    pool.store(k, k, "a", torch.tensor([8, 9, 10, 11, 13, 12]))
    assert torch.equal(pool.k[:, :, [0, 1, 2, 3, 5, 4]], k)
    with pytest.raises(ValueError, match="rank 1 does not own position 3 of sequence 'a'"):
        pool.store(k[:, :, :1], k[:, :, :1], "a", torch.tensor([3]))


REFUSED = {
    "a sequence that holds nothing": (lambda p: p.fork("x", "b"), ValueError, "sequence 'x' holds no pages"),
    "a child that is there": (lambda p: p.fork("a", "a"), ValueError, "sequence 'a' holds pages already"),
    "more pages than a rank has": (lambda p: p.reserve("b", 200), cpflex.OutOfPages, "rank 0 is out of pages: 200 tokens of sequence 'b' need 16 of its 8, and 7"),
    "more than is kept": (lambda p: p.crop("a", 7), ValueError, "keeps 6 tokens; it cannot be cropped to 7"),
    "a negative count": (lambda p: p.reserve("a", -1), ValueError, "num_tokens must be an integer of at least 0; got -1"),
    "a sequence of 2**31 tokens": (lambda p: p.reserve("a", 2**31), ValueError, "must be shorter than"),
    "more than is reserved": (lambda p: p.fill("a", 3), ValueError, "has pages for 8; got 3 more - reserve them first"),
    "owners of other pages": (lambda p: p.reserve("b", 9, owners=[0]), ValueError, "each of the 3 pages that are lacking"),
    "owners that are no ranks": (lambda p: p.reserve("b", 4, owners=[3]), ValueError, "a rank below 3"),
    "a mask by place and no order": (lambda p: p.evict(lambda b, h, q, k: k > q - b), ValueError, "pass seqs= in that order"),
    "a mask by head and no number": (lambda p: p.evict(lambda b, h, q, k: k > q - h), ValueError, "depends on h; pass num_heads="),
    "a pool of float64": (lambda p: p.pool(2, 8, dtype=torch.float64), NotImplementedError, "must be of float32, bfloat16 or float16"),
    "a pool of fp8": (lambda p: p.pool(2, 8, dtype=torch.float8_e4m3fn), NotImplementedError, "got torch.float8_e4m3fn"),
    "a pool of int8": (lambda p: p.pool(2, 8, dtype=torch.int8), NotImplementedError, "got torch.int8"),
    "heads of MLA": (lambda p: p.pool(1, 576, 512), NotImplementedError, "the latent heads of MLA are not supported"),
    "pools of 2**31 rows": (lambda p: cpflex.Pages(2**25, 64), ValueError, "fewer than 2\\*\\*31 rows"),
    "no pages": (lambda p: cpflex.Pages(0), ValueError, "num_pages must be an integer of at least 1; got 0"),
    "a rank beyond the others": (lambda p: pages_of(3), ValueError, "rank must be from 0 to world_size - 1; got rank=3"),
    "storing what is not reserved": (
        lambda p: p.pool(1, 8).store(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8), "a", torch.tensor([8])),
        ValueError, "sequence 'a' has pages for 8 tokens; got positions from 8 to 8",
    ),
    "storing into a shared page": (
        lambda p: (p.fork("a", "b"), p.pool(1, 8).store(*[torch.zeros(1, 1, 1, 8)] * 2, "b", torch.tensor([0]))),
        ValueError, "position 0 of sequence 'b' lies in a page that another sequence shares",
    ),
}  # fmt: skip


def refused_pages() -> cpflex.Pages:
    pages = pages_of()
    pages.reserve("a", 7)
    pages.fill("a", 6)
    return pages


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_on_pages_that_cannot_be_honoured_is_refused_by_name(name: str):
    call, kind, message = REFUSED[name]
    pages = refused_pages()
    with pytest.raises(kind, match=message):
        call(pages)

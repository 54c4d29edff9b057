"""Agreement: ranks that are about to compute different things all find out, and from the same words."""

from __future__ import annotations

import time

import pytest
import torch

import cpflex
from cpflex.links.protocol import Apart
from cpflex.ring.agreement import agree, checksum, in_words, number_of, refuse, words_of
from cpflex.testing import ThreadLinks, run_ranks
from patience import patience


def said_by(fn, world_size: int) -> list[str]:
    """What each rank raised; "" for none."""

    def guarded(group: ThreadLinks) -> str:
        try:
            fn(group)
        except cpflex.RankMismatch as error:
            return str(error)
        return ""

    return run_ranks(guarded, world_size, timeout=60)


def compare(group: ThreadLinks, facts: dict) -> None:
    words = words_of(facts)
    agree(group, "a plan", words, number_of(words), None)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ranks_that_agree_go_on(world_size: int):
    assert said_by(lambda group: compare(group, {"plan": "a", "scale": 0.5}), world_size) == [""] * world_size


def test_a_disagreement_is_raised_on_every_rank_and_names_the_ranks():
    said = said_by(lambda group: compare(group, {"plan": "a", "scale": 1.0 if group.rank == 2 else 0.5}), 4)
    assert said == ["the ranks disagree about scale: group ranks 0, 1, 3: 0.5; group rank 2: 1.0"] * 4


def test_the_first_fact_that_differs_is_named():
    said = said_by(lambda group: compare(group, {"plan": group.rank // 2, "scale": group.rank}), 4)
    assert said == ["the ranks disagree about plan: group ranks 0, 1: 0; group ranks 2, 3: 1"] * 4


def test_a_refusal_is_told_to_the_ranks_that_wait():
    def call(group: ThreadLinks) -> None:
        if group.rank == 1:
            refuse(group, "a plan", ValueError("query has 7 tokens"))
        else:
            compare(group, {"plan": "a"})

    said = said_by(call, 3)
    told = "nothing was exchanged: group rank 1 raised ValueError: query has 7 tokens"
    assert said == [told, "", told]


def test_a_refusal_is_logged_before_the_others_come(caplog: pytest.LogCaptureFixture):
    def call(group: ThreadLinks) -> None:
        if group.rank == 1:
            refuse(group, "a plan", ValueError("query has 7 tokens"))
        else:
            while "group rank 1 refuses a call: ValueError: query has 7 tokens" not in caplog.text:
                time.sleep(0.01)
            compare(group, {"plan": "a"})

    assert said_by(call, 2)[0].startswith("nothing was exchanged")


def test_every_refusal_is_told():
    def call(group: ThreadLinks) -> None:
        if group.rank:
            refuse(group, "a plan", ValueError(f"mistake {group.rank}"))
        else:
            compare(group, {"plan": "a"})

    assert said_by(call, 3)[0].endswith(
        "group rank 1 raised ValueError: mistake 1; group rank 2 raised ValueError: mistake 2"
    )


def test_a_rank_that_did_not_tell_its_number_is_named():
    def call(group: ThreadLinks) -> None:
        group.agreed[7] = {"plan": "a"}
        with in_words(group):
            raise Apart([7, 0, 7])

    assert said_by(call, 1) == ["the ranks disagree about plan: group ranks 0, 2: a; group rank 1: (it did not tell)"]


def test_calls_are_compared_by_one_number_each_and_words_travel_only_when_numbers_differ():
    """A new plan, new shapes, new documents: none of them costs more than a call that was made before."""

    def call(group: ThreadLinks) -> list[tuple[int, int]]:
        counts = []
        for dim, cut in ((16, 20), (16, 20), (8, 20), (16, 30)):
            plan = cpflex.make_plan(cpflex.causal() & cpflex.document(cu_seqlens=[0, cut, 64]), 64, group)
            q = torch.randn(1, 1, plan.local_len, dim, requires_grad=True)
            cpflex.flex_attention(q, q, q, block_mask=plan).sum().backward()
            counts.append((group.num_gathered, group.num_said))
        return counts

    assert run_ranks(call, 2) == [[(2, 0), (4, 0), (6, 0), (8, 0)]] * 2


def test_only_the_first_call_of_a_kind_waits_before_it_computes():
    def call(group: ThreadLinks) -> list[int]:
        waits = []
        for dim in (16, 16, 8, 16, 8):
            plan = cpflex.make_plan(cpflex.causal(), 64, group)
            q = torch.randn(1, 1, plan.local_len, dim, requires_grad=True)
            cpflex.flex_attention(q, q, q, block_mask=plan).sum().backward()
            waits.append(group.num_waits)
        plan.wait_for_agreement()
        cpflex.flex_attention(q, q, q, block_mask=plan).sum().backward()
        waits.append(group.num_waits)
        plan.wait_for_agreement(False)
        cpflex.flex_attention(q, q, q, block_mask=plan).sum().backward()
        return [*waits, group.num_waits]

    assert run_ranks(call, 3) == [[2, 2, 4, 4, 4, 6, 6]] * 3


def test_one_rank_may_wait_at_every_call_beside_others_that_do_not():
    def call(group: ThreadLinks) -> tuple[int, torch.Tensor]:
        plan = cpflex.make_plan(cpflex.causal(), 64, group, schedule=cpflex.ring)
        plan.wait_for_agreement(group.rank == 1)
        x = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            q = plan.shard(x, dim=2, pad_value=0.0)
            out = cpflex.flex_attention(q, q, q, block_mask=plan)
        return group.num_waits, plan.unshard(out, dim=2)

    found = run_ranks(call, 3)
    assert [waits for waits, _ in found] == [1, 3, 1]
    alone = cpflex.make_plan(cpflex.causal(), 64)
    x = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(0))
    for _, out in found:
        torch.testing.assert_close(out, cpflex.flex_attention(x, x, x, block_mask=alone))


def attend_in_dims(group: ThreadLinks, dims: list[int], cuts: list[int] | None = None) -> list[str]:
    """Calls of kinds that all ranks know: what each raised; "" for none."""
    mask = cpflex.causal() if cuts is None else cpflex.causal() & cpflex.document(cu_seqlens=cuts)
    plan = cpflex.make_plan(mask, 64, group, layout=cpflex.contiguous, schedule=cpflex.direct if cuts else cpflex.ring)
    said = []
    for dim in (16, 8, *dims):
        q = torch.randn(1, 1, plan.local_len, dim)
        try:
            cpflex.flex_attention(q, q, q, block_mask=plan)
            said.append("")
        except cpflex.RankMismatch as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(
    "cuts",
    [None, [0, 16, 48, 64], [0, 16, 32, 48, 64]],
    ids=["all have messages", "two have none", "none has any"],
)
def test_known_calls_with_messages_of_other_sizes_are_found_out_and_the_group_goes_on(cuts: list[int] | None):
    """The first messages are on their way when the ranks find out: nobody takes them for those of a later call."""

    def call(group: ThreadLinks) -> list[str]:
        return attend_in_dims(group, [8 if group.rank == 2 else 16, 16, 16 if group.rank == 0 else 8, 8], cuts)

    found = run_ranks(call, 4, timeout=patience(5))
    told = "the ranks disagree about query: group rank"
    for said in found:
        assert [text[: len(told)] for text in said] == ["", "", told, "", told, ""]
        assert said == found[0]


def call_in_order(group: ThreadLinks, kinds: list[str], backward: bool) -> None:
    """Twice in the right order, then in that of ``kinds``."""
    masks = {"full": cpflex.full(), "sliding": cpflex.sliding_window(9)}
    plan = cpflex.make_plan(masks, 64, group, schedule=cpflex.ring)
    q = torch.randn(1, 1, plan.local_len, 16, requires_grad=True)
    for order in (["full", "sliding"], ["full", "sliding"], kinds):
        outs = [cpflex.flex_attention(q, q, q, block_mask=plan[kind]) for kind in ([*order] if not backward else masks)]
        for out in reversed(outs if not backward else [outs[list(masks).index(kind)] for kind in order]):
            out.sum().backward()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_layers_called_in_another_order_are_found_out_on_every_rank(backward: bool):
    """Whole shards travel in either kind of layer: without the comparison each would attend to the other's keys."""

    def call(group: ThreadLinks) -> None:
        call_in_order(group, ["sliding", "full"] if group.rank == 1 else ["full", "sliding"], backward)

    said = said_by(call, 3)
    assert said[0].startswith("the ranks disagree about mask kind: group rank"), said
    assert len(set(said)) == 1


def test_a_mistake_in_a_later_call_is_told_to_the_ranks_that_wait():
    def call(group: ThreadLinks) -> None:
        plan = cpflex.make_plan(cpflex.causal(), 64, group)
        q = torch.randn(1, 1, plan.local_len, 16)
        cpflex.flex_attention(q, q, q, block_mask=plan)
        if group.rank == 1:
            with pytest.raises(ValueError, match="must have one head dim"):
                cpflex.flex_attention(q, q[..., :8], q, block_mask=plan)
        else:
            cpflex.flex_attention(q, q, q, block_mask=plan)

    said = said_by(call, 3)
    assert said[1] == ""
    assert "group rank 1 raised ValueError: query and key must have one head dim" in said[0] == said[2]


def test_one_rank_compares_with_nobody():
    plan = cpflex.make_plan(cpflex.causal(), 64)
    q = torch.randn(1, 1, 64, 16)
    cpflex.flex_attention(q, q, q, block_mask=plan)


# -- what all ranks must hold alike


def test_a_checksum_tells_tensors_apart():
    ids = torch.arange(1000)
    swapped, changed = ids.clone(), ids.clone()
    swapped[[3, 700]] = ids[[700, 3]]
    changed[999] += 1
    others = [
        swapped,
        changed,
        ids[:-1],
        ids[None],
        ids.int(),
        ids.float(),
        -ids,
        ids * 0,
        (ids * 0).bool(),
        ids.flip(0),
    ]
    others += [(ids / 7).to(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    found = [checksum(x) for x in (ids, *others)]
    assert len(set(found)) == len(found)
    assert checksum(ids.clone()) == checksum(torch.stack([ids, ids], dim=1)[:, 0]) == found[0]


def hold(group: ThreadLinks, name: str) -> None:
    plan = cpflex.make_plan({"full": cpflex.full(), "causal": cpflex.causal()}, 200, group)
    for step in range(3):
        ids, labels = torch.arange(200) + step, torch.arange(200) * 2
        plan.require_same(ids=ids, labels=labels)
    remembered = len(group.agreed)
    if group.rank == 1:
        (ids if name == "ids" else labels)[17] += 5
    try:
        plan.require_same(ids=ids, labels=labels)
        plan.shard(ids, dim=0, pad_value=0, require_same=True)
    finally:
        assert remembered == 0, "batches are not remembered"


@pytest.mark.parametrize("name", ["ids", "labels"])
def test_ranks_that_hold_other_tokens_are_found_out(name: str):
    said = said_by(lambda group: hold(group, name), 3)
    for text in said:
        assert text.startswith(f"the ranks disagree about {name}: group ranks 0, 2: (200,) int64 "), said
        assert "; group rank 1: (200,) int64 " in text


def test_a_plan_without_peers_compares_nothing():
    cpflex.make_plan(cpflex.full(), 200).require_same(ids=torch.arange(200))
    cpflex.make_plan(cpflex.full(), 200, rank=1, world_size=2).require_same(ids=torch.arange(200))

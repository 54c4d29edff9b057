"""A decode plan in words: the figures are those of its tables."""

from __future__ import annotations

from typing import Any

import cpflex

NEW, KEPT = {"long": 2048, "chat": 1, "talk": 1}, {"long": 4096, "chat": 9000, "talk": 200}
MASKS = {"full": cpflex.causal(), "sliding": cpflex.causal() & cpflex.sliding_window(512)}


def plan_of(new: dict[str, int], world_size: int = 4, **options: Any) -> cpflex.DecodePlan:
    pages = cpflex.Pages(8192, 64, rank=min(1, world_size - 1), world_size=world_size)
    for seq, count in new.items():
        pages.reserve(seq, KEPT[seq] + count)
        pages.fill(seq, KEPT[seq])
    return cpflex.make_decode_plan(MASKS, pages, new, heads=cpflex.Heads(64, 8, 128), **options)


def test_a_plan_says_what_travels_and_what_the_other_way_would_cost():
    plan = plan_of(NEW, rows=cpflex.by_token)
    said = plan.explain()
    assert "2,050 new tokens of 3 sequences on 4 ranks, by_token; rank 1 has 513; step 0 of 1" in said
    assert "keeps      3,840 + 3,826 + 3,840 + 3,840 = 15,346 tokens, in pages of 64" in said
    assert "64 and 8 heads of 128, 2 bytes" in said
    full, sliding = said.split("\nsliding: ")
    costs, mib = plan["full"].traffic.costs, 2**20
    assert "keys of 1 and queries of 2 sequences: 63.8 MiB in all; 2 messages to each other rank" in full
    queries, keys = costs.queries_bytes[0] / mib, costs.keys_bytes[0] / mib
    assert f"'long': keys, {keys:.1f} MiB; queries would be {queries:.1f} MiB" in full
    assert "'talk': queries, 148.8 KiB; keys would be 548.0 KiB" in full
    assert "reads      832 + 818 + 832 + 832 = 3,314 of these tokens" in sliding
    rows = plan["sliding"].traffic.most_pages(1) * 64
    assert f"room for {rows:,} tokens of other ranks at once, one layer at a time; 1 wave" in sliding
    assert all(len(line) <= 112 for line in said.splitlines())


def test_one_kind_says_nothing_of_another():
    said = plan_of(NEW, rows=cpflex.by_token)["sliding"].explain()
    assert "\nsliding: " in said and "\nfull: " not in said


def test_a_sliding_layer_whose_copy_is_read_sooner_than_a_message_comes_is_named():
    said = plan_of({"chat": 1}).explain()
    assert "a partial of each token, to all ranks: 387.0 KiB in all; 1 message to each other rank" in said
    notes = " ".join(said.split("\nnotes\n")[1].split())
    assert notes.startswith("- sliding: its queries see 553 tokens, 2.2 MiB a layer. With a copy of them on every rank")
    assert "0.6 us more to read, 10 us less to wait" in notes and "a model, not a measurement" in notes
    assert "full: its" not in notes
    assert "notes: none" in plan_of({"talk": 1}).explain()  # the window shows all that is kept
    assert "notes: none" in plan_of({"chat": 1}, rows=cpflex.by_token).explain()  # new keys would travel still


def test_one_rank_moves_nothing():
    said = plan_of({"chat": 1, "talk": 1}, world_size=1).explain()
    assert "on 1 rank" in said and "travels" not in said and "notes: none" in said


def test_many_sequences_and_ranks_are_summed_up():
    pages = cpflex.Pages(64, 4, rank=0, world_size=20)
    for seq in range(12):
        pages.reserve(seq, 60)
        pages.fill(seq, 40)
    plan = cpflex.make_decode_plan(cpflex.causal(), pages, dict.fromkeys(range(12), 2), rows=cpflex.by_sequence)
    said = plan.explain()
    assert "a rank, 504 in all, tokens" in said and "queries of all would be" in said and "0: " not in said


def test_an_ended_plan_says_why():
    plan = plan_of({"chat": 1}, horizon=1)
    plan.advance()
    assert plan.explain().endswith("no step is left: its 1 steps are done")

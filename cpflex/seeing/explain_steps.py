"""To see a decode plan in words: who keeps and reads what, what travels, and what the other way would cost."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from cpflex.paging.tables import blocks_of, kept_pages
from cpflex.paging.traffic import AllPages
from cpflex.paging.travel import bytes_of_rows
from cpflex.seeing.explain import MANY_RANKS, WIDTH
from cpflex.topology import Device, Topology

if TYPE_CHECKING:
    from cpflex.paging.decode_plan import DecodePlan
    from cpflex.paging.steps import Steps

MANY_SEQUENCES = 8
"""More than this are summed up."""


def explain(plan: DecodePlan) -> str:
    """Of the steps that are left. Bytes are those of its first step, in one layer of each shape."""
    steps = plan.steps
    title = f"{_count(steps.num_tokens, 'new token')} of {_count(len(steps.new), 'sequence')} on "
    title += f"{_count(plan.pages.world_size, 'rank')}, {steps.rows.name}; rank {plan.pages.rank} has {plan.num_tokens}"
    if plan.why_over:
        return f"{title}\nno step is left: {plan.why_over}"
    held = AllPages.of([plan.pages.held(seq) for seq in steps.sequences], steps.limits, plan.pages.page_size)
    lines = [f"{title}; step {steps.num_done} of {steps.num_steps}", "", *_fact("keeps", _kept(plan, held))]
    shapes = ", ".join(
        f"{one.query} and {one.kv} heads of {one.dim}"
        + (f" and {one.value_dim}" if one.value_dim not in (None, one.dim) else "")
        + f", {one.element_bytes} bytes"
        for one in steps.shapes
    )
    lines += _fact("counted", f"one layer of queries and keys with {shapes}; partials in fp32")
    notes = []
    for kind in plan.kinds if plan.kind is None else (plan.kind,):
        rows = _rows_read(plan, kind, held)
        lines += ["", f"{kind}: {steps.masks[kind].__name__}", *_fact("reads", _read(rows, held, steps))]
        if plan.pages.world_size > 1:
            lines += _travels(plan, kind)
            notes += _copies(plan, kind, int(rows.sum()))
    lines += ["", "notes" if notes else "notes: none"]
    for note in notes:
        lines += textwrap.wrap(note, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def _kept(plan: DecodePlan, held: AllPages) -> str:
    """Tokens of these sequences, with those of the step; a page that several share counts once."""
    pages, there = plan.pages, held.slot >= 0
    _, once = np.unique(held.owner * pages.num_pages + held.slot, return_index=True)
    rows = np.where(there, _filled(held, plan.steps), 0)[once]
    by_rank = np.bincount(held.owner[once], rows, pages.world_size)
    gone = int((~there).sum())
    evicted = f"; {_count(gone, 'page')} evicted" if gone else ""
    return f"{_ranks(by_rank)} tokens, in pages of {pages.page_size}{evicted}"


def _filled(held: AllPages, steps: Steps) -> np.ndarray:
    return held.rows_below(steps.lengths + steps.counts_of_new, steps.pages.page_size)


def _rows_read(plan: DecodePlan, kind: str, held: AllPages) -> np.ndarray:
    """Tokens that each rank keeps and a query may see, [P]; a page that several sequences share counts once."""
    steps, pages = plan.steps, plan.pages
    blocks = blocks_of(steps.lengths.tolist(), steps.new, steps.limits)
    helds = [pages.held(seq) for seq in steps.sequences]
    kept = kept_pages(steps.masks[kind], blocks, helds, pages.page_size, list(steps.sequences))
    at = held.at(blocks.place[kept.block], kept.page)
    _, once = np.unique(kept.owner.astype(np.int64) * pages.num_pages + kept.slot, return_index=True)
    return np.bincount(kept.owner[once], _filled(held, steps)[at[once]], pages.world_size)


def _read(rows: np.ndarray, held: AllPages, steps: Steps) -> str:
    return f"{_ranks(rows)} of these tokens, which its queries may see; the rest of the pages is proven hidden"


def _travels(plan: DecodePlan, kind: str) -> list[str]:
    steps, world_size = plan.steps, plan.pages.world_size
    query_bytes = sum(one.query * one.dim * one.element_bytes for one in steps.shapes)
    partial_bytes = bytes_of_rows(steps.shapes)[0] - query_bytes
    if steps.rows.counts is None:
        by_head = steps.rows.by_head
        moved = (
            steps.num_tokens
            * (world_size - 1)
            * (query_bytes + partial_bytes if by_head else world_size * partial_bytes)
        )
        what = (
            "queries of each head and partials home, without new keys"
            if by_head
            else "a partial of each token, to all ranks"
        )
        return _fact("travels", f"{what}: {_bytes(moved)} in all; {_count(1 + by_head, 'message')} to each other rank")
    traffic = steps.traffic[kind]
    costs, keys = traffic.costs, traffic.keys.tolist()
    total = costs.total(keys) - costs.message_bytes * costs.num_messages(keys)
    lines = _fact(
        "travels",
        f"{traffic.in_words.rpartition(',')[0]}: {_bytes(total)} in all; "
        f"{_count(traffic.num_messages, 'message')} to each other rank",
    )
    if len(keys) > MANY_SEQUENCES:
        all_queries, all_keys = sum(costs.queries_bytes), sum(costs.keys_bytes)
        return lines + _fact("", f"queries of all would be {_bytes(all_queries)}, keys of all {_bytes(all_keys)}")
    for seq, by_keys, q, k in zip(steps.sequences, keys, costs.queries_bytes, costs.keys_bytes, strict=True):
        chosen, other = (("keys", k), ("queries", q)) if by_keys else (("queries", q), ("keys", k))
        lines += _fact("", f"{seq!r}: {chosen[0]}, {_bytes(chosen[1])}; {other[0]} would be {_bytes(other[1])}")
    if traffic.num_waves:
        rows = traffic.most_pages(plan.pages.rank) * plan.pages.page_size
        waves = _count(traffic.num_waves, "wave")
        lines += _fact("memory", f"room for {rows:,} tokens of other ranks at once, one layer at a time; {waves}")
    return lines


def _copies(plan: DecodePlan, kind: str, num_read: int) -> list[str]:
    """Where a mask shows little of what is kept, and reading a copy takes less time than exchanging a message."""
    steps, world_size, device = plan.steps, plan.pages.world_size, Device()
    topology = steps.topology or Topology(world_size, 1.0, 1.0)
    is_near = topology.num_nodes(world_size) == 1
    message_us = topology.intra_latency_us if is_near else topology.inter_latency_us
    key_bytes = bytes_of_rows(steps.shapes)[1] / len(steps.shapes)
    more_us = num_read * (1 - 1 / world_size) * key_bytes / (1e3 * device.memory_gb_per_s)
    shows_most = 2 * num_read > int((steps.lengths + steps.counts_of_new).sum())
    if not steps.rows.is_everyone or shows_most or more_us >= message_us:
        return []
    return [
        f"{kind}: its queries see {num_read:,} tokens, {_bytes(num_read * key_bytes)} a layer. With a copy of them on "
        f"every rank these layers would exchange no message: {more_us:.1f} us more to read, {message_us:g} us less to "
        f"wait ({device.memory_gb_per_s:g} GB/s, {message_us:g} us a message; a model, not a measurement). Give them "
        "pages of their own, cpflex.Pages without a group"
    ]


def _ranks(rows: np.ndarray) -> str:
    if len(rows) > MANY_RANKS:
        return f"{rows.min():,.0f} to {rows.max():,.0f} a rank, {rows.sum():,.0f} in all,"
    return " + ".join(f"{count:,.0f}" for count in rows) + (f" = {rows.sum():,.0f}" if len(rows) > 1 else "")


def _fact(title: str, fact: str) -> list[str]:
    first = f"  {title:<9}  "
    return textwrap.wrap(fact, WIDTH, initial_indent=first, subsequent_indent=" " * len(first))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"

"""What explain() says equals what the plan holds, warnings come exactly when they should, and plot() draws it."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cpflex
from cpflex.masks import MaskFn
from cpflex.seeing.doubts import doubts
from cpflex.seeing.explain import FEW_COLORS, WIDTH
from cpflex.tile_mask import TILE

CU = [0, 100, 101, 700, 1500, 1501, 1900, 2000]
DOCUMENT = cpflex.document(cu_seqlens=CU)


@dataclass(frozen=True)
class Case:
    mask: MaskFn | dict[str, MaskFn]
    seq_len: int
    world_size: int
    rank: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def plan(self) -> cpflex.Plan:
        return cpflex.make_plan(self.mask, self.seq_len, rank=self.rank, world_size=self.world_size, **self.options)


def per_head(b, h, q, k):
    return (k <= q) & (q - k < torch.tensor([10, 300])[h])


HYBRID: dict[str, MaskFn] = {
    "full": cpflex.causal() & DOCUMENT,
    "sliding": cpflex.causal() & DOCUMENT & cpflex.sliding_window(50),
}
PLANS = {
    "one_rank": Case(cpflex.causal(), 1000, 1),
    "causal_ring": Case(cpflex.causal(), 4096, 4, 2, {"schedule": cpflex.ring}),
    "documents_direct": Case(cpflex.causal() & DOCUMENT, 2000, 4, 1, {"schedule": cpflex.direct}),
    "two_kinds": Case(HYBRID, 2000, 3, 2),
    "many_ranks": Case(HYBRID, 2000, 17, 16),
    "per_head": Case(per_head, 3000, 2, 1, {"num_heads": 2}),
    "striped": Case(cpflex.sliding_window(300, 300), 5000, 4, 3, {"layout": cpflex.striped}),
    "all_pads": Case(cpflex.causal(), 10, 8, 7, {"layout": cpflex.contiguous}),
    "nothing_visible": Case(lambda b, h, q, k: q < 0, 1000, 2),
    "one_token": Case(cpflex.causal(), 1, 1),
    "a_thousand_ranks": Case(
        cpflex.causal() & cpflex.sliding_window(4096), 1 << 18, 1024, 1000, {"layout": cpflex.zigzag}
    ),
}
each_plan = pytest.mark.parametrize("case", PLANS.values(), ids=PLANS)


def flowing(text: str) -> str:
    """Without line breaks and alignment."""
    return " ".join(text.split())


@each_plan
def test_explain_gives_the_figures_of_stats(case: Case):
    plan = case.plan()
    text = plan.explain()
    assert flowing(f"{plan.seq_len:,} tokens on {plan.world_size:,} rank") in flowing(text)
    for name in plan.kinds:
        stats = plan[name].stats
        section = flowing(re.split(r"\n\n", text[text.index(f"\n{name}: ") :])[0])
        said = [
            f"imbalance {stats['imbalance']:.3f}: ",
            f"tiles {stats['full_tiles']:,} FULL, {stats['partial_tiles']:,} PARTIAL ",
            f" PARTIAL ({stats['unproven_tiles']:,} unproven); ",
            f"{max(stats['work']):,} ",
            f"{stats['work'][plan.rank]:,} ",
        ]
        if plan.world_size > 1:
            said += [
                f"received {stats['recv_tokens'][plan.rank]:,} K/V rows by rank {plan.rank}, {stats['sent_tokens']:,} sent",
                f" of an all-gather ({stats['all_gather_tokens']:,} rows)",
                f"schedule {stats['schedule']}, ",
                flowing(stats["reason"]),
                f" {max(stats['needed_tokens']):,} ",
            ]
        for words in said:
            assert words in section


@each_plan
def test_explain_fits_a_screen(case: Case):
    lines = case.plan().explain().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) < 60
    assert all(line == line.rstrip() for line in lines)


def test_a_rank_of_pads_says_so():
    assert "rank 7     nothing but padding" in PLANS["all_pads"].plan().explain()


@pytest.mark.parametrize("schedule", [cpflex.ring, cpflex.direct], ids=["ring", "direct"])
@pytest.mark.parametrize("layout", [cpflex.contiguous, cpflex.striped, cpflex.balanced], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", HYBRID)
def test_the_least_possible_is_what_brute_force_counts(kind: str, layout: Any, schedule: Any):
    plan = cpflex.make_plan(HYBRID[kind], 2000, rank=2, world_size=4, layout=layout, schedule=schedule)
    zero = torch.tensor(0)
    queries = plan.positions[plan.positions < 2000]
    least = 0
    for owner in {0, 1, 3}:
        for chunk in plan.layout.chunks[owner]:
            begin, end = chunk * plan.layout.chunk_len, (chunk + 1) * plan.layout.chunk_len
            for start in range(begin, end, TILE):
                keys = torch.arange(start, min(start + TILE, end))
                visible = keys[keys < 2000]
                if HYBRID[kind](zero, zero, queries[:, None], visible).any():
                    least += len(keys)
    found = re.search(r"the least possible \(([\d,]+) rows", flowing(plan.explain()))
    assert found is not None
    assert int(found[1].replace(",", "")) == least


def test_receive_buffers_are_those_of_two_steps():
    plan = PLANS["causal_ring"].plan()
    assert f"receive buffers of {2 * plan.local_len:,} K/V rows at most (2.00 shards)" in plan.explain()


# -- warnings


def hidden_from_intervals(b, h, q, k):
    return (k <= q) & (torch.sin(q.float()) < 2)


def same_image(b, h, q, k):
    return q // 100 == k // 100


def sink(b, h, q, k):
    return k < 4


def windows_per_head(b, h, q, k):
    return q - k < torch.tensor([10, 300])[h]


CONTIGUOUS = {"layout": cpflex.contiguous}
DOCUMENTS_16K = cpflex.document(cu_seqlens=list(range(0, 16385, 2048)))
SINGLE_TOKENS = cpflex.document(torch.arange(2000))
WINDOW = cpflex.sliding_window(128)
FUTURE = "future keys are visible"

DOUBTS: dict[str, tuple[Case, list[str]]] = {
    # a window that was meant to be causal
    "causal": (Case(cpflex.causal(), 2000, 1), []),
    "window": (Case(WINDOW, 2000, 1), [FUTURE]),
    "window_longer_than_the_sequence": (Case(WINDOW, 112, 1), [FUTURE]),
    "window_as_a_lambda": (Case(lambda b, h, q, k: ~(q >= k + 100), 2000, 1), [FUTURE]),
    "window_per_head": (Case(windows_per_head, 2000, 1, 0, {"num_heads": 2}), [FUTURE]),
    "window_and_documents": (Case(WINDOW & DOCUMENT, 2000, 1), [FUTURE]),
    "window_and_sink": (Case(WINDOW | sink, 2000, 1), [FUTURE]),
    "window_or_causal_documents": (Case(WINDOW | (cpflex.causal() & DOCUMENT), 2000, 1), [FUTURE]),
    "window_and_documents_of_one_token": (Case(WINDOW & SINGLE_TOKENS, 2000, 1), []),
    "window_and_causal": (Case(cpflex.causal() & WINDOW, 2000, 1), []),
    "window_and_causal_and_sink": (Case((WINDOW | sink) & cpflex.causal(), 2000, 1), []),
    "window_and_causal_or_sink": (Case((WINDOW & cpflex.causal()) | sink, 2000, 1), []),
    "window_and_causal_or_same_image": (Case(WINDOW & (cpflex.causal() | same_image), 2000, 1), []),
    "window_and_block_causal": (Case(WINDOW & (lambda b, h, q, k: q // 64 >= k // 64), 2000, 1), []),
    "window_on_both_sides": (Case(cpflex.sliding_window(9, 400), 2000, 1), []),
    "window_by_distance": (Case(lambda b, h, q, k: (q - k).abs() < 100, 2000, 1), []),
    "full": (Case(cpflex.full(), 2000, 1), []),
    "documents": (Case(DOCUMENT, 2000, 1), []),
    "prefix_lm": (Case(cpflex.prefix_lm(500), 2000, 1), []),
    "the_future_on_purpose": (Case(~cpflex.causal(), 2000, 1), []),
    # padding
    "little_padding": (Case(cpflex.full(), 60, 4, 0, CONTIGUOUS), []),
    "much_padding": (Case(cpflex.full(), 52, 4, 0, CONTIGUOUS), ["padding is 19% of the 64 tokens"]),
    # work
    "unbalanced": (Case(cpflex.causal(), 4096, 4, 0, CONTIGUOUS), ["rank 3 has 1.73 x the mean work"]),
    "balanced": (Case(cpflex.causal(), 4096, 4), []),
    # traffic
    "scattered": (Case(DOCUMENTS_16K, 16384, 4, 0, {"layout": cpflex.striped}), ["the layout scatters"]),
    "together": (Case(DOCUMENTS_16K, 16384, 4), []),
    "ring_for_a_window": (
        Case(cpflex.causal() & WINDOW, 8192, 4, 1, CONTIGUOUS | {"schedule": cpflex.ring}),
        ["ring moves 2,048 K/V rows to each rank where 128 are needed"],
    ),
    "auto_for_a_window": (Case(cpflex.causal() & WINDOW, 8192, 4, 1, CONTIGUOUS), []),
    # rows that see nothing
    "blind_queries": (Case(lambda b, h, q, k: k <= q - 256, 1024, 1), ["at least 256 queries of rank 0 see no key"]),
    "blind_pads": (Case(cpflex.causal(), 1009, 1), []),
    # tiles
    "unproven": (Case(hidden_from_intervals, 4096, 1), ["tiles are unproven"]),
    "unproven_but_partial": (Case(cpflex.causal() & WINDOW, 1 << 16, 1), []),
    "per_head": (Case(per_head, 3000, 1, 0, {"num_heads": 2}), []),
}


@pytest.mark.parametrize(("case", "expected"), DOUBTS.values(), ids=DOUBTS)
def test_warnings_come_exactly_when_they_should(case: Case, expected: list[str]):
    plan = case.plan()
    found = doubts(plan)
    assert len(found) == len(expected), found
    for words, text in zip(expected, found, strict=True):
        assert words in text
        assert text in flowing(plan.explain())
    assert ("warnings: none" in plan.explain()) == (not found)


def test_warnings_of_several_kinds_name_theirs():
    plan = cpflex.make_plan({"good": cpflex.causal(), "bad": WINDOW}, 2000)
    assert [text.split(": ")[:2] for text in doubts(plan)] == [["bad", FUTURE]]


# -- the picture


@each_plan
def test_plot_draws_every_kind(case: Case, tmp_path: Path):
    from matplotlib.image import imread

    path = tmp_path / "plan.png"
    plan = case.plan()
    plan.plot(str(path))
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = imread(path).shape
    assert width == 1350
    assert height == 80 + 450 * len(plan.kinds)


def test_plot_shows_the_rows_of_every_rank_in_its_colour(tmp_path: Path):
    from matplotlib.image import imread

    path = tmp_path / "plan.png"
    cpflex.make_plan(cpflex.full(), 1024, rank=0, world_size=4, layout=cpflex.zigzag).plot(str(path))
    column = imread(path)[110:460, 250, :3]  # through the mask
    palette = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in FEW_COLORS])
    ranks = np.abs(column[:, None] - palette).sum(axis=2).argmin(axis=1)
    assert np.abs(column - palette[ranks]).max() < 0.01
    assert [rank for rank, _ in itertools.groupby(ranks.tolist())] == [0, 1, 2, 3, 2, 1, 0]


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"cpflex\[viz\]"):
        PLANS["one_rank"].plan().plot(str(tmp_path / "plan.png"))

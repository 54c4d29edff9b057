"""A picture of a simulated layer: what the kernels, the links inside the node and the NIC of two ranks do, and when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cpflex.planning.timing import Batch, Collective, Kernels, Timeline, message_costs
from cpflex.seeing.explain import FAINT, INK
from cpflex.topology import Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cpflex.seeing.simulate import Strategy

LANES = ("kernels", "inside", "NIC")
COLORS = {"kernels": "#4c72b0", "K/V": "#55a868", "dK/dV": "#dd8452", "heads": "#8172b3"}
"""What a bar shows."""


class Bar(NamedTuple):
    lane: str
    what: str
    start: float
    end: float


def bars(timeline: Timeline, rank: int) -> Iterator[Bar]:
    """What one rank does, in seconds. Messages inside the node and to others share a batch, but not a lane."""
    for step, span in zip(timeline.program, timeline.spans, strict=True):
        start, end = float(span.start[rank]), float(span.end[rank])
        if isinstance(step, Kernels):
            if end > start:
                yield Bar("kernels", "kernels", start, end)
        elif isinstance(step, Collective):
            yield Bar("NIC" if step.bytes_across else "inside", "heads", start, end)
        else:
            yield from _messages(step, span.start, rank, timeline.topology)


def _messages(step: Batch, start: np.ndarray, rank: int, topology: Topology) -> Iterator[Bar]:
    seconds, crosses = message_costs(step, len(start), topology)
    mine = (step.source == rank) | (step.target == rank)
    begin = np.maximum(start[step.source], start[step.target])
    for lane, which in (("inside", mine & ~crosses), ("NIC", mine & crosses)):
        if which.any():
            yield Bar(lane, step.carries, float(begin[which].min()), float((begin + seconds)[which].max()))


def plot_timeline(strategy: Strategy, title: str, path: str) -> None:
    """Draw each mask kind of a strategy, forward and backward: the rank whose kernels end last and a median one.
    The format follows the suffix of ``path``: ``.png``, ``.svg``, ``.pdf``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; it comes with the extra ``cpflex[viz]``.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.patches import Patch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plotting needs matplotlib: pip install 'cpflex[viz]'", name=error.name) from error

    rows = len(strategy.passes)
    figure = Figure(figsize=(13.5, 0.9 + 2.9 * rows), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold")
    panels = figure.subplots(rows, 2, squeeze=False)
    for (kind, passes), axes in zip(strategy.passes.items(), panels, strict=True):
        for ax, words, timeline in zip(axes, ("forward", "backward"), passes, strict=True):
            name = f"{kind}: {words}" if rows > 1 else words
            _draw(ax, timeline, name)
    handles = [Patch(color=color) for color in COLORS.values()]
    figure.legend(handles, list(COLORS), loc="outside lower center", ncols=len(COLORS), frameon=False, fontsize=9)
    figure.savefig(path)


def _draw(ax: Axes, timeline: Timeline, name: str) -> None:
    """Lanes of the slowest rank above those of the median one; milliseconds."""
    both = zip(timeline.program, timeline.spans, strict=True)
    computed = [span.end for step, span in both if isinstance(step, Kernels)]
    order = np.argsort(computed[-1], kind="stable")
    shown = {"slowest": int(order[-1]), "median": int(order[len(order) // 2])}
    labels, places, top = [], [], 2 * len(LANES) + 0.6
    for group, (words, rank) in enumerate(shown.items()):
        for index, lane in enumerate(LANES):
            places.append(top - group * (len(LANES) + 0.6) - index)
            labels.append(f"rank {rank} ({words})  {lane}" if index == 0 else lane)
        for bar in bars(timeline, rank):
            place = places[group * len(LANES) + LANES.index(bar.lane)]
            span = [(bar.start * 1e3, (bar.end - bar.start) * 1e3)]
            ax.broken_barh(span, (place - 0.38, 0.76), facecolor=COLORS[bar.what], edgecolor="white", linewidth=0.6)
    ax.axvline(timeline.makespan * 1e3, color=INK, linestyle="--", linewidth=1)
    busy = 100 * float(timeline.busy.mean()) / timeline.makespan
    title = f"{name}: {timeline.makespan * 1e3:.2f} ms, kernels of the mean rank {busy:.0f}% of it"
    ax.set_title(title, loc="left", color=INK, fontsize=10)
    ax.set_yticks(places, labels)
    ax.set_xlim(0, timeline.makespan * 1e3 * 1.01)
    ax.set_xlabel("ms", color=INK)
    ax.tick_params(colors=FAINT, labelsize=8)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color("#cccccc")

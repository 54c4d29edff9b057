"""To see a plan: in words (`explain`) and as a picture (`plot`)."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from colorsys import hls_to_rgb
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from cpflex.mods.intervals import EMPTY, FULL, PARTIAL
from cpflex.planning.needs import block_len_of, classifier, tiles_of, traffic_by_block
from cpflex.planning.predict import predict
from cpflex.ring.named import named_schedule
from cpflex.ring.schedule import most_rows
from cpflex.seeing.doubts import doubts, holder
from cpflex.sharding.joined import Joined, Keys

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cpflex.planning.mask_kind import MaskKind
    from cpflex.planning.plan import Plan

MANY_RANKS = 16
"""More ranks than this are summarised."""

WIDTH = 112
"""Characters of a line."""

PIXELS = 256
"""Squares on a side of the mask's picture."""


def explain(plan: Plan) -> str:
    """The plan in words: layout, work per rank, K/V received, tiles, schedule, memory, and warnings."""
    lines = [f"{_tokens(plan)} on {_count(plan.world_size, 'rank')}, seen from rank {plan.rank}", ""]
    if not (differ := len({kind.ulysses_size for kind in plan.kinds.values()}) > 1):
        lines += _grid(plan)
    lines += _layout(plan)
    for name in plan.kinds:
        lines += ["", *_kind(plan[name], name, with_grid=differ)]
    found = doubts(plan)
    lines += ["", "warnings" if found else "warnings: none"]
    for doubt in found:
        lines += textwrap.wrap(doubt, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def _tokens(plan: Plan) -> str:
    start = f", from position {plan.start:,}," if plan.start else ""
    return f"{plan.seq_len:,} tokens{start}"


def _grid(plan: Plan) -> list[str]:
    """Rows and columns of ranks, where heads are exchanged, for all mask kinds of the plan alike."""
    size, shards = plan.ulysses_size, plan.outer.world_size
    if size == 1:
        return []
    shard = plan.outer_rank
    row = ", ".join(map(str, range(shard * size, (shard + 1) * size)))
    fact = (
        f"{_count(shards, 'row')} of {size} ranks; ranks {row} exchange heads: each computes 1/{size} of them on shard "
        f"{shard}, {plan.outer.local_len:,} tokens; keys travel between shards"
    )
    return _facts([("grid", fact)], indent="")


def _layout(plan: Plan) -> list[str]:
    layout = plan.layout
    padded_len = layout.num_chunks * layout.chunk_len
    pads = padded_len - plan.seq_len
    padding = f"{pads:,} pads, {_percent(pads / padded_len)} of {padded_len:,}" if pads else "no padding"
    ranges = _ranges(plan)
    if len(ranges) > 8:
        ranges = [*ranges[:4], f"... {len(ranges) - 6} more ...", *ranges[-2:]]
    captured = [t for kind in plan.kinds.values() for t in kind.mask.captured]
    per_rank = f"{_count(len(layout.chunks[0]), 'chunk')} of {layout.chunk_len:,} tokens"
    return _facts(
        [
            ("layout", f"{layout.name}: {per_rank} per rank, {layout.local_len:,} tokens in all; {padding}"),
            (f"rank {plan.rank}", "positions " + ", ".join(ranges) if ranges else "nothing but padding"),
            ("captured", f"{_bytes(_total_bytes(captured))} of tensors that the masks read, on every rank"),
        ],
        indent="",
    )


def _ranges(plan: Plan) -> list[str]:
    """The rank's positions as ranges, both ends included, pads left out."""
    positions = plan.positions.numpy()
    positions = positions[positions < plan.layout.end]
    pieces = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    return [f"{piece[0]:,}-{piece[-1]:,}" for piece in pieces if len(piece)]


def _kind(plan: Plan, name: str, *, with_grid: bool) -> list[str]:
    kind, stats = plan.kinds[name], plan.stats
    masks = [step.tile_mask for step in kind.steps]
    keys = kind.keys or plan.outer
    num_tiles = (len(masks[0].q_starts) - 1) * tiles_of(keys).num_tiles * plan.outer.world_size
    num_full, num_partial = stats["full_tiles"], stats["partial_tiles"]
    empty = _percent(1 - (num_full + num_partial) * plan.outer.world_size / num_tiles)
    buffered = most_rows([step.exchange for step in kind.steps])
    unproven = f"{stats['unproven_tiles']:,} unproven"
    facts = [
        ("imbalance", f"{stats['imbalance']:.3f}: most work over mean work"),
        ("tiles", f"{num_full:,} FULL, {num_partial:,} PARTIAL ({unproven}); {empty} are EMPTY"),
        (
            "memory",
            f"receive buffers of {buffered:,} K/V rows at most ({buffered / keys.local_len:.2f} shards), "
            f"index tables of {_bytes(_total_bytes(masks))}",
        ),
    ]
    if kind.keys is not None:
        facts[:0] = [("keys", _keys(keys))]
    if plan.outer.world_size > 1 and keys.world_size > 1:
        steps = _count(len(masks) - 1, "remote step")
        facts[-2:-2] = [
            ("received", _received(plan, stats, _least_rows(kind))),
            ("schedule", f"{stats['schedule']}, {steps}: {stats['reason']}"),
            *_nodes(plan, kind, stats),
            *_predicted(plan, kind),
        ]
    table = [f"  {line}".rstrip() for line in _ranks_table(plan, stats)]
    grid = [f"  {line}" for line in _grid(plan)] if with_grid else []
    return [f"{name}: {kind.mask.name}", *grid, *table, *_facts(facts)]


def _keys(keys: Keys) -> str:
    """Those of another sequence, or of earlier chunks."""
    if isinstance(keys, Joined):
        *earlier, own = (part.seq_len for part in keys.parts)
        chunks = f"{_count(len(earlier), 'earlier chunk')}, from position {keys.start:,}"
        return f"{sum(earlier):,} of {chunks}, and the {own:,} tokens of this one"
    if keys.world_size == 1:
        return f"{keys.seq_len:,} of another sequence, all on every rank: nothing travels"
    chunks = f"{_count(len(keys.chunks[0]), 'chunk')} of {keys.chunk_len:,} tokens per rank"
    return f"{keys.seq_len:,} of another sequence, {keys.name}: {chunks}"


def _nodes(plan: Plan, kind: MaskKind, stats: dict[str, Any]) -> list[tuple[str, str]]:
    """What crosses between nodes, where they are known and several."""
    if kind.machine is None or kind.machine.topology.num_nodes(plan.outer.world_size) == 1:
        return []
    topology, noun = kind.machine.topology, holder(plan)
    nodes = f"{topology.num_nodes(plan.outer.world_size)} nodes of {_count(topology.gpus_per_node, noun)}"
    return [("nodes", f"{nodes}; {noun} {plan.outer_rank} sends {stats['cross_tokens']:,} K/V rows to other nodes")]


def _predicted(plan: Plan, kind: MaskKind) -> list[tuple[str, str]]:
    """What the schedule would take, if the machine is known and the schedule is one of cpflex's."""
    if kind.machine is None or named_schedule(kind.schedule) is None:
        return []
    layout, (batch_size, num_heads) = plan.outer, kind.sizes
    classify = classifier(kind.mask, batch_size or 1, num_heads or 1)
    tables = traffic_by_block(classify, layout, kind.keys)
    found = predict(kind.schedule, tables, kind.machine)
    forward, backward = (f"{1e3 * one.makespan:.2f} ms" for one in (found.forward, found.backward))
    waits = (
        f"the mean rank waits {found.exposed_us / 1e3:.2f} ms, its NIC is busy {_percent(found.nic_use)} of the time"
    )
    heads = ", without the exchange of heads" if plan.ulysses_size > 1 else ""
    return [
        ("predicted", f"forward {forward}, backward {backward} a layer{heads}; {waits}; a model, not a measurement")
    ]


def _received(plan: Plan, stats: dict[str, Any], least: int) -> str:
    received, all_gather = stats["recv_tokens"][plan.outer_rank], stats["all_gather_tokens"]
    share = f"{_percent(received / all_gather)} of an all-gather ({all_gather:,} rows)"
    moved = f"{received:,} K/V rows by {holder(plan)} {plan.outer_rank}, {stats['sent_tokens']:,} sent; {share}"
    if not received:
        return moved
    ratio = f"{received / least:.2f} x" if least else "its queries need none:"
    return f"{moved}; {ratio} the least possible ({least:,} rows, of tiles that its queries see)"


def _ranks_table(plan: Plan, stats: dict[str, Any]) -> list[str]:
    """Work and needs of each rank, or of their extremes when there are many."""
    work, needed = np.array(stats["work"]), np.array(stats["needed_tokens"])
    all_gather, num_shards, noun = stats["all_gather_tokens"], plan.outer.world_size, holder(plan)

    def row(title: str, pairs: float, rows: float) -> list[str]:
        share = _percent(rows / max(all_gather, 1))
        return [title, f"{pairs:,.0f}", f"{pairs / max(work.mean(), 1):.3f}", f"{rows:,.0f}", share]

    rows = [["", "work, pairs", "/ mean", "K/V rows needed", "of all-gather"]]
    shown = range(num_shards) if num_shards <= MANY_RANKS else [plan.outer_rank]
    rows += [
        row(f"{noun} {r}" + (" (this one)" if r == plan.outer_rank else ""), float(work[r]), float(needed[r]))
        for r in shown
    ]
    extremes = {"min": np.min, "mean": np.mean, "max": np.max}
    if num_shards <= MANY_RANKS:
        del extremes["min"]
    if num_shards > 1:
        rows += [row(title, float(f(work)), float(f(needed))) for title, f in extremes.items()]
    else:
        rows = [cells[:2] for cells in rows]
    if num_shards > MANY_RANKS:
        rows += [[f"worst {noun}", f"{noun} {work.argmax()}", "", f"{noun} {needed.argmax()}", ""]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        title.ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        for title, *cells in rows
    ]
    if num_shards > 1:
        keys = plan.kinds[next(iter(plan.kinds))].keys or plan.outer
        tiles = tiles_of(keys)
        block = int(tiles.in_blocks(block_len_of(tiles))[0].length.max())
        table.append(f"(work by tiles, rows by blocks of {block:,} tokens, never too few)")
    return table


def _least_rows(kind: MaskKind) -> int:
    """K/V rows of other ranks in tiles that this rank's queries see."""
    total = 0
    for mask in (step.tile_mask for step in kind.steps[1:]):
        seen = (mask.full_by_kv.offsets.diff() + mask.partial_by_kv.offsets.diff()) > 0
        total += int(mask.kv_starts.diff()[seen].sum())
    return total


def _total_bytes(parts: Iterable[Any]) -> int:
    """Of the tensors in dataclasses, shared ones counted once."""
    tensors: dict[int, Tensor] = {}
    stack = list(parts)
    while stack:
        part = stack.pop()
        if isinstance(part, Tensor):
            tensors[part.data_ptr()] = part
        elif dataclasses.is_dataclass(part):
            stack += [getattr(part, field.name) for field in dataclasses.fields(part)]
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _facts(facts: Sequence[tuple[str, str]], indent: str = "  ") -> list[str]:
    lines = []
    for title, fact in facts:
        first = f"{indent}{title:<9}  "
        lines += textwrap.wrap(fact, WIDTH, initial_indent=first, subsequent_indent=" " * len(first))
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _bytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


# -- the picture


PIXELS = 256
"""Squares on a side of the mask's picture."""

THIN = 0.02
"""A mask with fewer of its squares not EMPTY is also shown enlarged, in an empty corner."""

OFF_THE_SCALE = 0.04
"""Needs below this share of an all-gather are drawn on a scale of their own."""

FEW_COLORS = (
    "#4c72b0",
    "#dd8452",
    "#55a868",
    "#c44e52",
    "#8172b3",
    "#937860",
    "#da8bc3",
    "#8c8c8c",
    "#ccb974",
    "#64b5cd",
)
INK, FAINT = "#333333", "#8a8a8a"


def plot(plan: Plan, path: str) -> None:
    """Draw each mask kind, coloured by the rank (or shard) that owns the query, beside its work and K/V needs per rank.

    FULL squares are solid, PARTIAL ones lighter, EMPTY ones white; the strips show who holds the queries (left) and
    the keys (top). Squares are larger than tiles: at most `PIXELS` on a side; a thin mask is shown enlarged as well.
    The format follows the suffix of ``path``: ``.png``, ``.svg``, ``.pdf``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; it comes with the extra ``cpflex[viz]``.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plotting needs matplotlib: pip install 'cpflex[viz]'", name=error.name) from error

    layout = plan.layout
    padding = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(13.5, 0.8 + 4.5 * len(plan.kinds)), dpi=100, layout=padding)
    title = f"{_tokens(plan)} on {_count(plan.world_size, 'rank')}"
    chunks = f"{_count(len(layout.chunks[0]), 'chunk')} of {layout.chunk_len:,} tokens per rank"
    figure.suptitle(f"{title}   ·   {layout.name}: {chunks}", color=INK, fontsize=13, fontweight="bold")
    panels = figure.subplots(len(plan.kinds), 3, squeeze=False, width_ratios=(1.15, 1, 1))
    for (name, kind), (mask, work, traffic) in zip(plan.kinds.items(), panels, strict=True):
        one = plan[name]
        colors = _rank_colors(one.outer.world_size)
        _draw_mask(mask, one, kind, name, colors)
        _draw_work(work, one.stats, colors)
        _draw_traffic(traffic, one, one.stats, colors)
    figure.savefig(path)


def _rank_colors(world_size: int) -> np.ndarray:
    """RGB in 0..1, [world_size, 3]."""
    if world_size <= len(FEW_COLORS):
        hexes = [FEW_COLORS[rank] for rank in range(world_size)]
        return np.array([[int(x[i : i + 2], 16) / 255 for i in (1, 3, 5)] for x in hexes])
    return np.array([hls_to_rgb(hue, 0.55, 0.6) for hue in np.linspace(0.62, -0.16, world_size) % 1])


def _draw_mask(ax: Axes, plan: Plan, kind: MaskKind, name: str, colors: np.ndarray) -> None:
    keys = kind.keys or plan.outer
    spans = [(one.start, one.end) for one in (plan.outer, keys)]
    verdicts, (owner, key_owner), (height, width) = _squares(plan, kind, *spans)
    _paint(ax, verdicts, colors[owner], (keys.start, width, height, plan.start))
    if kind.keys is not None:
        ax.set_aspect("auto")
    left, top = ax.inset_axes((-0.035, 0, 0.025, 1)), ax.inset_axes((0, 1.01, 1, 0.025))
    left.imshow(colors[owner][:, None], interpolation="nearest", aspect="auto")
    if keys.world_size == plan.outer.world_size:
        top.imshow(colors[key_owner][None], interpolation="nearest", aspect="auto")
    for strip in (left, top):
        strip.set_axis_off()
    middle = len(owner) // 2
    if kind.keys is None and (verdicts != EMPTY).mean() < THIN and not verdicts[:middle, middle:].any():
        _draw_enlarged(ax, plan, kind, colors)
    title = textwrap.shorten(f"{name}: {kind.mask.name}", 60, placeholder=" ...")
    ax.set_title(title, loc="left", color=INK, fontsize=10, pad=14)
    ax.set_xlabel("key position", color=INK)
    ax.set_ylabel("query position", color=INK, labelpad=14)
    ax.tick_params(colors=FAINT, labelsize=8)
    ax.tick_params(axis="y", pad=12, length=0)
    for set_ticks, span in zip((ax.set_yticks, ax.set_xticks), spans, strict=True):
        ticks = np.linspace(*span, 5)
        set_ticks(ticks, [_size(int(tick)) for tick in ticks])


def _draw_enlarged(ax: Axes, plan: Plan, kind: MaskKind, colors: np.ndarray) -> None:
    """The middle of the mask, as near as it takes to see something."""
    span = plan.seq_len // 16
    while True:
        begin = plan.start + (plan.seq_len - span) // 2
        verdicts, (owner, _), (edge, _) = _squares(plan, kind, (begin, begin + span), (begin, begin + span))
        if span <= 4 * PIXELS or (verdicts != EMPTY).mean() > THIN:
            break
        span //= 4
    zoom = ax.inset_axes((0.53, 0.53, 0.45, 0.45))
    _paint(zoom, verdicts, colors[owner], (begin, edge, edge, begin))
    zoom.set_xticks([])
    zoom.set_yticks([])
    zoom.text(0.97, 0.96, f"{span:,} tokens", transform=zoom.transAxes, ha="right", va="top", color=FAINT, fontsize=8)
    ax.indicate_inset_zoom(zoom, edgecolor=INK, linewidth=0.8, alpha=0.6)


def _squares(
    plan: Plan, kind: MaskKind, queries: tuple[int, int], keys: tuple[int, int]
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], tuple[int, int]]:
    """Verdicts [n, m] on the squares between two positions of each axis; along both, the rank that owns the middle of
    each, and where the last one ends.
    """
    bounds, owners, ends = [], [], []
    for (begin, end), layout in ((queries, plan.outer), (keys, kind.keys or plan.outer)):
        pixel_len = -(-(end - begin) // PIXELS)
        lo = np.arange(begin, end, pixel_len)
        hi = np.minimum(lo + pixel_len, end) - 1
        bounds.append((lo, hi))
        tiles = tiles_of(layout)
        owners.append(layout.owner[tiles.chunk[np.searchsorted(tiles.lo, (lo + hi) // 2, side="right") - 1]])
        ends.append(begin + len(lo) * pixel_len)
    classify = classifier(kind.mask, plan.batch_size or 1, plan.num_heads or 1)
    (q_lo, q_hi), (kv_lo, kv_hi) = bounds
    return classify(q_lo[:, None], q_hi[:, None], kv_lo, kv_hi), tuple(owners), tuple(ends)  # type: ignore[return-value]


def _paint(ax: Axes, verdicts: np.ndarray, colors: np.ndarray, extent: tuple[int, int, int, int]) -> None:
    """Squares in the colour of their row: solid, half, or white."""
    strength = np.select([verdicts == FULL, verdicts == PARTIAL], [1.0, 0.5], 0.0)[..., None]
    ax.imshow(1 - strength * (1 - colors[:, None]), extent=extent, interpolation="nearest", aspect="equal")
    for side in ax.spines.values():
        side.set_color("#cccccc")


def _draw_work(ax: Axes, stats: dict[str, Any], colors: np.ndarray) -> None:
    work = np.array(stats["work"], dtype=float)
    ax.set_title(f"work per rank: most / mean = {stats['imbalance']:.3f}", loc="left", color=INK, fontsize=10, pad=14)
    _draw_bars(ax, work / max(work.mean(), 1), colors)
    ax.axhline(1.0, color=INK, linestyle="--", linewidth=1)
    ax.set_ylabel("pairs computed, 1 = mean", color=INK)


def _draw_traffic(ax: Axes, plan: Plan, stats: dict[str, Any], colors: np.ndarray) -> None:
    all_gather = max(stats["all_gather_tokens"], 1)
    needed, received = np.array(stats["needed_tokens"]) / all_gather, stats["recv_tokens"][plan.outer_rank] / all_gather
    noun = holder(plan)
    alone = plan.outer.world_size == 1
    title = f"one {noun}, nothing travels" if alone else f"worst {_percent(needed.max())} of an all-gather"
    ax.set_title(f"K/V per rank: {title}", loc="left", color=INK, fontsize=10, pad=14)
    _draw_bars(ax, needed, colors)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    ax.set_ylabel("K/V rows needed of other ranks", color=INK)
    if alone:
        return
    label = f"received by {noun} {plan.outer_rank} ({stats['schedule']})"
    ax.plot([plan.outer_rank], [received], "D", color=INK, markersize=5, label=label)
    top = max(needed.max(), received)
    label = "all-gather"
    if 0 < top < OFF_THE_SCALE:
        label += f": {1 / top:,.0f} x the worst, above the frame"
    else:
        top = 1.0
    ax.axhline(1.0, color=INK, linestyle="--", linewidth=1, label=label)
    ax.set_ylim(0, 1.25 * top)
    ax.legend(loc="upper left", frameon=False, fontsize=9, labelcolor=INK)


def _draw_bars(ax: Axes, heights: np.ndarray, colors: np.ndarray) -> None:
    ranks = np.arange(len(heights))
    ax.bar(ranks, heights, width=0.8 if len(heights) <= 64 else 1.0, color=colors)
    ax.set_xlabel("rank", color=INK)
    ax.set_xlim(-0.7, len(heights) - 0.3)
    if len(heights) <= MANY_RANKS:
        ax.set_xticks(ranks)
    ax.tick_params(colors=FAINT, labelsize=8)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color("#cccccc")


def _size(number: int) -> str:
    """65536 -> 64k, where that is exact."""
    for unit, letter in ((1 << 20, "m"), (1 << 10, "k")):
        if number and number % unit == 0:
            return f"{number // unit}{letter}"
    return f"{number:,}"

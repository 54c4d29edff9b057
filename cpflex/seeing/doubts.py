"""Doubts: what in a plan looks like a mistake, or costs more than it should."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cpflex.mods.evaluate import evaluate
from cpflex.mods.graph import Arg, Graph, Node, Ref
from cpflex.sharding.joined import Joined
from cpflex.tile_mask import Runs

if TYPE_CHECKING:
    from cpflex.planning.mask_kind import MaskKind
    from cpflex.planning.plan import Plan

MUCH_PADDING = 0.10
"""Share of all tokens."""

HEAVY_IMBALANCE = 1.15
"""Most work over mean work."""

SPARSE_DENSITY, MUCH_TRAFFIC = 0.25, 0.75
"""A mask that shows less of all pairs is sparse; needing more of an all-gather is then a waste."""

MANY_UNPROVEN, MUCH_WASTE = 0.10, 0.25
"""Shares: of all tiles that are unproven, of PARTIAL tiles that need not be."""


def holder(plan: Plan) -> str:
    """What holds a part of the keys: a rank, or a row of ranks that exchange heads."""
    return "rank" if plan.ulysses_size == 1 else "shard"


def doubts(plan: Plan) -> list[str]:
    """Warnings, in words; none for a plan that is as it should be."""
    layout, found = plan.layout, []
    padded_len = layout.num_chunks * layout.chunk_len
    if (pads := padded_len - plan.seq_len) > MUCH_PADDING * padded_len:
        hint = f"fewer ranks or a seq_len nearer to {padded_len:,} would waste less"
        found.append(f"padding is {pads / padded_len:.0%} of the {padded_len:,} tokens that are computed on; {hint}")
    for name, kind in plan.kinds.items():
        prefix = f"{name}: " if len(plan.kinds) > 1 else ""
        found += [prefix + text for text in _doubts_of(plan[name], kind, plan[name].stats)]
    return found


def _doubts_of(plan: Plan, kind: MaskKind, stats: dict[str, Any]) -> list[str]:
    found = []
    if (
        (kind.keys is None or isinstance(kind.keys, Joined))
        and _leaves_future_open(kind.mask.graph)
        and _sees_ahead(plan, kind)
    ):
        found.append(
            "future keys are visible: the mask bounds how far back a query sees, not how far ahead - "
            "use causal() & sliding_window(w), or sliding_window(left, right) if that is meant"
        )
    if blind := _blind_queries(plan, kind):
        found.append(f"at least {blind:,} queries of {holder(plan)} {plan.outer_rank} see no key: their output is 0")
    work, needed = np.array(stats["work"]), np.array(stats["needed_tokens"])
    balancing = "" if plan.layout.name == "balanced" else " - pass layout=cpflex.balanced"
    if stats["imbalance"] > HEAVY_IMBALANCE:
        found.append(
            f"{holder(plan)} {work.argmax()} has {stats['imbalance']:.2f} x the mean work, and the others wait for it"
            f"{balancing}"
        )
    density = work.sum() / (plan.seq_len * plan.kv_seq_len)
    share = needed.mean() / max(stats["all_gather_tokens"], 1)
    if share > MUCH_TRAFFIC and density < SPARSE_DENSITY:
        found.append(
            f"the mask shows {density:.0%} of all pairs, but {holder(plan)}s need {share:.0%} of all K/V: "
            f"the layout scatters what belongs together{balancing}"
        )
    received, least = max(stats["recv_tokens"]), int(needed.max())
    if received > 2 * max(least, 1) and stats["schedule"].startswith("ring"):
        found.append(
            f"{stats['schedule']} moves {received:,} K/V rows to each {holder(plan)} where {least:,} are needed at "
            "most - pass schedule=cpflex.direct"
        )
    num_unproven, num_tiles = stats["unproven_tiles"], stats["full_tiles"] + stats["partial_tiles"]
    if num_unproven > MANY_UNPROVEN * num_tiles and (waste := _wasted_share(plan, kind)) > MUCH_WASTE:
        found.append(
            f"{num_unproven:,} of {num_tiles:,} tiles are unproven, and about {waste:.0%} of the PARTIAL ones are "
            "EMPTY or FULL in truth: the mask uses operations that intervals bound poorly"
        )
    return found


def _blind_queries(plan: Plan, kind: MaskKind) -> int:
    """Queries of this rank, or of its row, pads left out, in tiles where no key is seen; there may be more."""
    masks = [step.tile_mask for step in kind.steps]
    runs = torch.stack([mask.full.offsets.diff() + mask.partial.offsets.diff() for mask in masks]).sum(dim=0)
    in_blind_tile = torch.repeat_interleave(runs == 0, masks[0].q_starts.diff())
    positions = torch.from_numpy(plan.outer.positions(plan.outer_rank))
    return int((in_blind_tile & (positions < plan.outer.end)).sum())


def _wasted_share(plan: Plan, kind: MaskKind, sample_elements: int = 1 << 20) -> float:
    """Of a sample of this rank's PARTIAL tiles, those that are EMPTY or FULL when evaluated exactly."""
    num_b, num_h = plan.batch_size or 1, plan.num_heads or 1
    inputs = {"b": torch.arange(num_b).view(-1, 1, 1, 1), "h": torch.arange(num_h).view(-1, 1, 1)}
    masks = [step.tile_mask for step in kind.steps]
    sides = torch.cat([starts.diff() for mask in masks for starts in (mask.q_starts, mask.kv_starts)])
    tile_elements = int(sides.max()) ** 2 * num_b * num_h
    num_partial = sum(mask.partial.num_tiles for mask in masks)
    stride = -(-num_partial // max(1, sample_elements // tile_elements))
    wasted = []
    for mask in masks:
        rows, cols = _tiles(mask.partial)
        for row, col in zip(rows[::stride].tolist(), cols[::stride].tolist(), strict=True):
            inputs["q_idx"] = mask.q_positions[mask.q_starts[row] : mask.q_starts[row + 1]].long()[:, None]
            inputs["kv_idx"] = mask.kv_positions[mask.kv_starts[col] : mask.kv_starts[col + 1]].long()
            seen = evaluate(kind.mask.graph, kind.mask.captured, inputs)[0]
            wasted.append(bool(seen.all()) or not bool(seen.any()))
    return sum(wasted) / len(wasted)


def _tiles(runs: Runs) -> tuple[Tensor, Tensor]:
    """Row and column of each tile."""
    row = torch.arange(len(runs.offsets) - 1).repeat_interleave(runs.offsets.diff())
    run = torch.arange(len(row)).repeat_interleave(runs.count)
    before = runs.count.cumsum(0) - runs.count
    return row[run], runs.first[run] + torch.arange(len(run)) - before[run]


def _sees_ahead(plan: Plan, kind: MaskKind, samples: int = 1 << 16) -> bool:
    """Some query sees itself and the next token; looked for at evenly spaced positions, at b = h = 0."""
    q = torch.arange(plan.start, plan.outer.end - 1, max(1, plan.seq_len // samples))
    zero = torch.zeros_like(q)
    own, following = (
        evaluate(kind.mask.graph, kind.mask.captured, {"b": zero, "h": zero, "q_idx": q, "kv_idx": q + ahead})[0]
        for ahead in (0, 1)
    )
    return bool((own & following).any())


def _leaves_future_open(graph: Graph) -> bool:
    """Some alternative of the mask limits how far back queries see, by distance, and says nothing of how far ahead."""
    nodes, slopes = graph.nodes, _slopes(graph)

    def bounds(index: int, wanted: bool) -> set[str]:
        node = nodes[index]
        if node.op in ("not", "and", "or"):
            return set().union(*(bounds(i, wanted ^ (node.op == "not")) for i in _operands(node)))
        return _bounds_of(node, slopes, wanted)

    def open_ahead(index: int, wanted: bool) -> bool:
        terms = [term for term in _conjuncts(nodes, index, wanted) if bounds(*term)]
        if len(terms) == 1:
            ((alone, wanted),) = terms
            if nodes[alone].op in ("and", "or"):  # a disjunction, or it would have been taken apart
                return any(open_ahead(i, wanted) for i in _operands(nodes[alone]))
        return set().union(*(bounds(*term) for term in terms)) == {"back"}

    return open_ahead(graph.outputs[0].index, True)


def _conjuncts(nodes: Sequence[Node], index: int, wanted: bool) -> list[tuple[int, bool]]:
    """(node, value): the node is ``wanted`` exactly when all of these have their values."""
    node = nodes[index]
    if node.op == "not" or node.op == ("and" if wanted else "or"):
        return [t for i in _operands(node) for t in _conjuncts(nodes, i, wanted ^ (node.op == "not"))]
    return [(index, wanted)]


def _operands(node: Node) -> list[int]:
    return [arg.index for arg in node.args if isinstance(arg, Ref)]


Slope = tuple[int, int]


def _slopes(graph: Graph) -> list[Slope | None]:
    """How each node changes with (q_idx, kv_idx), block indices counting as positions; None if not by steps of one."""
    slopes: list[Slope | None] = []
    for node in graph.nodes:
        x = [_slope(arg, slopes) for arg in node.args]
        match node.op:
            case "input":
                slopes.append((int(node.args[0] == "q_idx"), int(node.args[0] == "kv_idx")))
            case "add" | "sub" if x[0] and x[1]:
                sign = 1 if node.op == "add" else -1
                slopes.append((x[0][0] + sign * x[1][0], x[0][1] + sign * x[1][1]))
            case "neg" if x[0]:
                slopes.append((-x[0][0], -x[0][1]))
            case "cast" | "floor_div" | "trunc_div" | "rshift" if x[-1] == (0, 0) or node.op == "cast":
                slopes.append(x[0])
            case _:
                slopes.append((0, 0) if all(s == (0, 0) for s in x) else None)
    return slopes


def _slope(arg: Arg, slopes: Sequence[Slope | None]) -> Slope | None:
    return slopes[arg.index] if isinstance(arg, Ref) else (0, 0)


def _bounds_of(node: Node, slopes: Sequence[Slope | None], wanted: bool) -> set[str]:
    """Which ends of q_idx - kv_idx a comparison bounds when it is ``wanted``: "back" above, "ahead" below."""
    if node.op not in ("lt", "le", "gt", "ge", "eq", "ne"):
        return set()
    x, y = (_slope(arg, slopes) for arg in node.args)
    if x is None or y is None:
        return set()
    slope = x[0] - y[0]
    if slope == 0 or x[1] - y[1] != -slope:
        return set()
    if node.op in ("eq", "ne"):
        return {"back", "ahead"} if wanted == (node.op == "eq") else set()
    is_upper = (node.op in ("lt", "le")) ^ (slope < 0) ^ (not wanted)
    return {"back"} if is_upper else {"ahead"}

"""What the model of `issue_slots` says about compiled FlexAttention, beside what was measured of it.

One number for each direction is chosen by it: the TFLOP/s of a loop that keeps the tensor cores busy. It stands between
what the figures with and without a causal mask ask for; the model knows nothing of what a causal mask costs beyond its
loops, waves and short programs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MEASURED = {
    ("forward", "full"): 476,
    ("forward", "causal"): 403,
    ("backward", "full"): 412,
    ("backward", "causal"): 384,
}
"""TFLOP/s on an H200 at D 128, of products that are needed: two forward, five backward."""
NEEDED = {"forward": 2, "backward": 5}
PASSES = {"forward": ("forward",), "backward": ("dq", "dkdv")}
NUM_TILES = 128
"""Of 128 tokens, in a sequence of 16k."""


def calibration(rows: Sequence[dict[str, Any]], at_bound_of_tile: float) -> list[dict[str, Any]]:
    """A line for each measured figure whose rows are there.

    Args:
        at_bound_of_tile: cycles of one product of a tile of 128 x 128 pairs and 128 dims, with busy tensor cores.
    """
    loops = {(row["which"], row["mods"]): row["loops"] for row in rows if _is_of_calibration(row)}
    points = []
    for direction, passes in PASSES.items():
        masks = [mods for mods in ("full", "causal") if all((which, mods) in loops for which in passes)]
        cycles = {mods: sum(cycles_of_tile(loops[which, mods], mods) for which in passes) for mods in masks}
        fractions = {mods: NEEDED[direction] * at_bound_of_tile / cycles[mods] for mods in masks}
        at_bound = math.prod(MEASURED[direction, mods] / fractions[mods] for mods in masks) ** (1 / max(1, len(masks)))
        for mods in masks:
            points.append(
                {
                    "direction": direction,
                    "mods": mods,
                    "model_fraction": round(fractions[mods], 3),
                    "tflops_at_bound": round(at_bound),
                    "model_tflops": round(at_bound * fractions[mods]),
                    "measured_tflops": MEASURED[direction, mods],
                }
            )
    return points


def _is_of_calibration(row: dict[str, Any]) -> bool:
    return (row["capability"], row["head_dim"], row["who"]) == (90, 128, "flex")


def cycles_of_tile(loops: Sequence[dict[str, Any]], mods: str) -> float:
    """That is needed. With a causal mask half of each tile on the diagonal is not, and costs a masked one."""
    full = loops[-1]["model_cycles"]
    if mods == "full":
        return full
    num_full = NUM_TILES * (NUM_TILES - 1) / 2
    return (NUM_TILES * loops[0]["model_cycles"] + num_full * full) / (NUM_TILES**2 / 2)

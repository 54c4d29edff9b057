"""The short table of docs/kernels.md, from results/machine_code.json: ``python benchmarks/machine_code_table.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "machine_code.json"
WHO = ("portable", "hopper", "flex", "fa3")
MODS = ("causal", "causal+softcap", "documents+window")
LINES = [
    *((90, which, 128, mods) for which in ("forward", "dq", "dkdv", "onepass") for mods in MODS),
    *((90, which, 64, "causal") for which in ("forward", "dq", "dkdv", "onepass")),
    *((80, which, dim, "causal") for dim in (128, 64) for which in ("forward", "dq", "dkdv")),
]


def short_table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown: instructions of each loop, and the model's shares of the peak; nothing where there is no kernel."""
    found = {(x["capability"], x["which"], x["head_dim"], x["mods"], x["who"]): x["loops"] for x in rows}
    header = ["sm", "kernel", "D", "mods", *WHO]
    lines = [header, ["---"] * len(header)]
    for key in LINES:
        cells = [_cell(found.get((*key, who))) for who in WHO]
        if any(cells):
            lines.append([*map(str, key), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(loops: Sequence[dict[str, Any]] | None) -> str:
    if loops is None:
        return ""
    counts = " / ".join(str(loop["instructions"]) for loop in loops)
    fractions = " / ".join(f"{loop['model_fraction']:.2f}" for loop in loops)
    return f"{counts}: {fractions}"


if __name__ == "__main__":
    record = json.loads(RESULTS.read_text())
    print(short_table(record["rows"]))
    for point in record["calibration"]:
        print(point)

"""Run one of the benchmarks: ``python launch/bench.py kernels [options]``; `benchmarks/` holds them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = ("kernels", "decode_kernel", "planner", "balance", "cpu_peers", "links", "pack")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        raise SystemExit(f"usage: bench.py {{{','.join(NAMES)}}} [options]")
    name, *options = sys.argv[1:]
    sys.argv = [f"bench.py {name}", *options]
    sys.path.insert(0, str(BENCHMARKS))  # benchmarks share modules, as when they are run by themselves
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")


if __name__ == "__main__":
    main()

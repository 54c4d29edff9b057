"""The Gluon kernels in as many interleavings as there is time for, recorded.

    python tests/kernels/interleavings.py                                 # 1,000 of each problem of the tests' tables
    python tests/kernels/interleavings.py --each 200 --only forward --seconds 600

An interleaving is a seed: of all launches of all ranks of a problem, compared as the tests do, bit by bit with the first
one of its round, with the twin and with the dense oracle. Each program of a launch takes turns of its own. Rounds go over all problems, so that what time allows is the same for each;
a run goes on after the seeds that an earlier one recorded of the same source, or begins anew.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import emulated  # noqa: E402
import test_hopper_backward  # noqa: E402
import test_hopper_forward  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from gluon_emulator import Emulated  # noqa: E402

import cpflex  # noqa: E402
from cases import Problem  # noqa: E402
from cpflex.kernels import hopper_backward, hopper_forward  # noqa: E402

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "hopper_interleavings.json"
ROUND = 50
"""Seeds of a problem before the next one's turn."""


class Table(NamedTuple):
    problems: Sequence[Problem]
    check: Callable[[Problem, Sequence[int]], None]
    kernel: Any
    """The module whose text is recorded by its hash."""


TABLES = {
    "forward": Table(test_hopper_forward.PROBLEMS, emulated.check, hopper_forward),
    "backward": Table(test_hopper_backward.PROBLEMS, emulated.check_backward, hopper_backward),
    "onepass": Table(
        test_hopper_backward.PROBLEMS, partial(emulated.check_backward, deterministic=False), hopper_backward
    ),
}


def source_of(table: Table) -> str:
    return hashlib.sha256(inspect.getsource(table.kernel).encode()).hexdigest()[:16]


def begun(path: Path, name: str) -> dict[str, Any]:
    """What was recorded of a table, if its kernel is the same still."""
    table, nothing = TABLES[name], {"each": 0, "problems": {}, "cpu_seconds": 0.0, "programs": 0, "failures": []}
    recorded = json.loads(path.read_text())["kernels"].get(name, {}) if path.exists() else {}
    same = recorded.get("source") == source_of(table)
    return (recorded if same else nothing) | {"source": source_of(table)}


def run_round(name: str, found: dict[str, Any], until: int, tell: Callable[[], None]) -> None:
    """Each problem up to seed ``until``; ``tell`` is called after each."""
    for problem in TABLES[name].problems:
        so_far = found["problems"].setdefault(str(problem), {"interleavings": 0, "programs": 0})
        first, began, ran = so_far["interleavings"], time.process_time(), Emulated.programs_run
        if first >= until:
            continue
        try:
            TABLES[name].check(problem, range(first, until))
        except AssertionError as fault:
            found["failures"].append({"problem": str(problem), "seeds": [first, until], "error": str(fault)[:2000]})
            print(f"{problem}: {str(fault)[:300]}", flush=True)
        so_far["interleavings"] = until
        so_far["programs"] += Emulated.programs_run - ran
        found["cpu_seconds"] = round(found["cpu_seconds"] + time.process_time() - began, 1)
        found["programs"] = sum(problem["programs"] for problem in found["problems"].values())
        if len(found["problems"]) == len(TABLES[name].problems):
            found["each"] = min(problem["interleavings"] for problem in found["problems"].values())
        tell()


def write(path: Path, each: int, kernels: dict[str, Any]) -> None:
    versions = {"cpflex": cpflex.__version__, "torch": torch.__version__, "triton": triton.__version__}
    record = {
        "command": f"python tests/kernels/interleavings.py --each {each}",
        "versions": versions | {"python": platform.python_version()},
        "seeds": "from 0 on; of each problem as many as it says",
        "kernels": kernels,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=1000, help="interleavings of a problem")
    parser.add_argument("--only", choices=TABLES, nargs="+", default=list(TABLES))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no round begins later")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote reads as NaN
    began = time.monotonic()
    kernels = {name: begun(options.record, name) for name in TABLES}

    def tell() -> None:
        write(options.record, options.each, {name: found for name, found in kernels.items() if found["problems"]})

    for name in options.only:
        for until in range(ROUND, options.each + ROUND, ROUND):
            if time.monotonic() - began > options.seconds:
                break
            run_round(name, kernels[name], min(until, options.each), tell)
            print(f"{name}: {kernels[name]['each']} of each of {len(kernels[name]['problems'])} problems", flush=True)
    return 1 if any(found["failures"] for found in kernels.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

"""What ptxas makes of the Gluon kernels, by each release of Triton that `tuning.GLUON` names: the figures that tests compare.

python tests/kernels/hopper_gates.py                                  # a table, of the Triton that is installed
python tests/kernels/hopper_gates.py --write                          # and as its figures, in benchmarks/results
pip install --no-deps --target DIR triton==3.9.0                      # those of another: only compiling needs it
PYTHONPATH=DIR:. python tests/kernels/hopper_gates.py --write
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import ahead_of_time  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from ahead_of_time import MASKS, MODS, SCORES, SEQ_LEN, Report, launches_compile  # noqa: E402

import cpflex  # noqa: E402
from cpflex.kernels import Call, empty, hopper_forward, tuning  # noqa: E402
from cpflex.mods.trace import trace_score_mod  # noqa: E402
from cpflex.ring.handles import resolve  # noqa: E402

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "hopper_gates.json"


class Case(NamedTuple):
    """What is compiled."""

    which: str
    head_dim: int
    v_dim: int
    mask: str
    score: str
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        dims = f"D{self.head_dim}" + (f"/{self.v_dim}" if self.v_dim != self.head_dim else "")
        return f"{self.which} {dims} {self.mask} {self.score}" + (" fp16" if self.dtype == "float16" else "")


def forward(case: Case) -> Report:
    """Of a last step that continues a state."""
    plan = cpflex.make_plan(MASKS[case.mask](), SEQ_LEN)
    mod, (step,), _ = resolve(plan.handle).on(torch.device("cpu"))
    score_mod = None if SCORES[case.score] is None else trace_score_mod(SCORES[case.score])
    call = Call(mod, 0.125, score_mod and score_mod.graph, score_mod.captured if score_mod else (), backend="gluon")
    sizes = (4, case.head_dim), (2, case.head_dim), (2, case.v_dim)
    q, k, v = (torch.zeros(2, heads, SEQ_LEN, dim, dtype=getattr(torch, case.dtype)) for heads, dim in sizes)
    with launches_compile(90) as variants:
        hopper_forward.attend_and_finish(q, k, v, step.tile_mask, call, empty(q, case.v_dim))
    (variant,) = variants
    return ahead_of_time.report(variant, 90)


PASSES = {"forward": forward}
CASES = [
    *(Case(which, *dims, *mods) for _, which, *dims in tuning.GLUON if which in PASSES for mods in MODS),
    Case("forward", 128, 128, "causal", "none", "float16"),
]


PINNED = (3, 7)
"""The release of constraints.txt, with which all cases are compiled."""


def cases_of(release: tuple[int, ...]) -> list[Case]:
    """With another release than the pinned one: each row, the widths with documents and ALiBi, one with softcap."""
    if release == PINNED:
        return CASES
    bf16 = [case for case in CASES if case.dtype == "bfloat16"]
    others = {"alibi": bf16, "softcap": [case for case in bf16 if case.head_dim == 128]}
    return [case for case in bf16 if case.score == "none" or (case in others[case.score] and case.head_dim != 96)]


def compiled(case: Case) -> Report:
    return PASSES[case.which](case)


def figures_of(report: Report) -> dict[str, Any]:
    return {
        "registers": report.registers,
        "stack_bytes": report.spilled_bytes,
        "spills_in_loops": report.spills_in_loops,
        "shared_bytes": report.shared_bytes,
        "products": report.tensor_core_ops,
        "copies": report.bulk_copies,
        "loops": report.instructions,
        "is_serialised": report.is_serialised,
    }


def recorded(path: Path = RECORD) -> dict[str, dict[str, Any]]:
    """By version of Triton, then by `Case`."""
    return json.loads(path.read_text())["triton"] if path.exists() else {}


def recorded_of(release: tuple[int, ...]) -> dict[str, Any]:
    """By `Case`; nothing of a release that was not recorded."""
    ours = [rows for version, rows in recorded().items() if tuple(map(int, version.split(".")[:2])) == release]
    return ours[-1] if ours else {}


def write(path: Path, rows: dict[str, Any]) -> None:
    release = tuning.triton_release()
    others = {v: of for v, of in recorded(path).items() if tuple(map(int, v.split(".")[:2])) != release}
    ordered = dict(sorted((others | {triton.__version__: rows}).items()))
    about = "of ptxas for sm_90, of two consumers: instructions of each loop with products, bytes of stack a thread"
    record = {"command": "python tests/kernels/hopper_gates.py --write", "figures": about, "triton": ordered}
    path.write_text(json.dumps(record, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", choices=PASSES, nargs="+", default=list(PASSES))
    options = parser.parse_args(arguments)
    release = tuning.triton_release()
    rows = recorded_of(release) if options.write else {}
    print(f"Triton {triton.__version__}\n{'':40}{ahead_of_time.HEADER}")
    for case in cases_of(release):
        if case.which in options.only:
            report = compiled(case)
            rows[str(case)] = figures_of(report)
            print(f"{case!s:40}{report}", flush=True)
            if options.write:
                write(RECORD, {str(case): rows[str(case)] for case in CASES if str(case) in rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

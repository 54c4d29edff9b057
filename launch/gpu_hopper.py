"""The Gluon kernels of sm_90, for `gpu_day.py`: proven at once, then timed beside cuDNN and compiled FlexAttention.

What decides is printed: the goals, as ratios within this run, and the rows of `tuning.GLUON` to change.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gpu_parts import Day, Records, module

GLUON = {"backend": "gluon"}


def rows_of_table(which: str) -> list[tuple[int, int]]:
    """Head dims of q and v."""
    from cpflex.kernels import tuning

    return [key[2:] for key in tuning.GLUON if key[1] == which]


def why_not(day: Day) -> str | None:
    import torch

    from cpflex.kernels import tuning

    try:
        tuning.require_gluon(torch.device("cuda", torch.cuda.current_device()))
    except NotImplementedError as refusal:
        return str(refusal)
    return None


# -- is it right?


def proof(day: Day) -> None:
    """Cases of `tests/gpu` that the kernels serve, against float64, and twice for the same bits. Small ones come first;
    one that never ends is told.
    """
    if reason := why_not(day):
        day.record(left_out=reason)
        return
    for case in day.each(proofs()[day.worker :: day.workers]):
        day.record(begins=str(case))
        with day.surviving(case):
            day.record(case=str(case), dims=case.dims, **proven(case, day))


def proofs() -> list[Any]:
    gpu = module("cases_gpu", "tests/gpu")
    dims = rows_of_table("forward")
    small = [gpu.Case("doc_causal", "softcap", 333, d, (4, 2), 1) for d in dims]
    small += [gpu.Case("causal", "none", 1, dims[0], (2, 1), 1), gpu.Case("some_see_nothing", "none", 777, dims[0])]
    others = [case for case in gpu.CASES if case.dims in dims and case.dtype != "fp32"]
    return small + sorted(others, key=lambda case: case.seq_len)


def proven(case: Any, day: Day) -> dict[str, Any]:
    """Errors and what is allowed, of out, lse and gradients; also of four ranks, whose state is carried."""
    import torch

    from cpflex.testing import run_ranks

    module("patience", "tests")  # of what the next one imports
    tests, verdicts = module("test_kernels_gpu", "tests/gpu"), module("verdicts", "tests/gpu")
    tensors = tests.tensors_of(case)
    found = {
        "one rank": tests.attend(case, tensors, options=GLUON),
        "again": tests.attend(case, tensors, options=GLUON),
        "one pass": tests.attend(case, tensors, options=GLUON | {"deterministic": False}),
    }
    if case.score == "none" and 300 < case.seq_len <= 5001:

        def rank(group: Any) -> dict[str, Any]:
            import cpflex

            sizes = {"batch_size": case.batch, "num_heads": case.heads[0]}
            plan = cpflex.make_plan(case.mask_mod("cpu"), case.seq_len, group, **sizes)
            local = tests.attend_shard(case, tensors, plan, options=GLUON)
            return {name: plan.unshard(x, dim=2) for name, x in local.items()}

        found["four ranks"] = run_ranks(rank, world_size=4)[0]
    if day.pretend:
        return {"errors": {}, "same_bits": None, "is_right": None}
    bits = all(torch.equal(x, found["again"][name]) for name, x in found.pop("one rank").items())
    errors = {ranks: verdicts.errors(case, tensors, results) for ranks, results in found.items()}
    fits = all(error <= allowed for of in errors.values() for error, allowed in of.values())
    return {"errors": errors, "same_bits": bits, "is_right": fits and bits}


def of_proof(found: Records) -> list[str]:
    ended = [x for x in found if "case" in x]
    begun = [x["begins"] for x in found if "begins" in x]
    wrong = [x["case"] for x in ended if x["is_right"] is False]
    lines = [f"{len(ended)} cases, {sum(x['is_right'] is True for x in ended)} right"]
    lines += [f"WRONG {case}" for case in wrong]
    lines += [f"NEVER ENDED, or failed: {case}" for case in begun if case not in {x["case"] for x in ended}]
    return lines + [f"not here: {x['left_out']}" for x in found if isinstance(x.get("left_out"), str)]


def proven_dims(found: Records) -> list[tuple[int, int]]:
    """Head dims all of whose cases were right: of those begun, and of those for which there was no time, none."""
    right = {x["case"] for x in found if x.get("is_right")}
    dims: dict[tuple[int, int], list[bool]] = {}
    for case in proofs():
        dims.setdefault(case.dims, []).append(str(case) in right)
    return [d for d, verdicts in dims.items() if all(verdicts)]


# -- is it faster?


class Timed(NamedTuple):
    """A row of `benchmarks/kernels.py`, and whether FlexAttention, which takes long to compile, is timed as well."""

    mask: str
    score: str
    head_dim: int
    seq_len: int
    with_flex: bool = False


TIMED = [
    *[Timed("full", "none", 128, 16384), Timed("causal", "none", 128, 16384)],
    *[Timed("full", "none", 64, 16384), Timed("causal", "none", 64, 16384)],
    *[Timed("doc_window", "none", 128, 16384), Timed("causal", "softcap", 128, 16384)],
    *[Timed("doc_window", "none", 64, 16384), Timed("causal", "softcap", 64, 16384)],
    *(Timed(mask, "none", dim, n) for n in (32768, 8192) for dim in (128, 64) for mask in ("full", "causal")),
    *(Timed(mask, "none", 256, 16384) for mask in ("full", "causal")),
    *(Timed(mask, "none", dim, 16384, True) for dim in (128, 64) for mask in ("causal", "full")),
    *(Timed("causal", "softcap", dim, 16384, True) for dim in (128, 64)),
]
"""The most telling first; those with FlexAttention again, last."""

PEERS = ("hopper", "kernel", "cudnn", "hopper_onepass")


def times(day: Day) -> None:
    """By `benchmarks/kernels.py`: the kernels alone, cuDNN, and FlexAttention."""
    import torch

    if reason := why_not(day):
        day.record(left_out=reason)
        return
    path = day.folder / "hopper.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    day.record(proven=proven_dims([json.loads(line) for line in lines]))
    bench = module("kernels", "benchmarks")
    day.record(setting=bench.setting())
    compilations = bench.Compilations()
    for timed in day.each(TIMED):
        row = bench.Row(*timed[:4])
        peers = [
            name for name in (*PEERS, *(["flex"] if timed.with_flex else [])) if not day.pretend or name in PEERS[:2]
        ]
        with day.surviving(row.name), only(bench, peers):
            day.record(**bench.measure(row, compilations) | visited(bench, row))
        torch.cuda.empty_cache()


@contextlib.contextmanager
def only(bench: Any, names: Sequence[str]) -> Iterator[None]:
    everybody = bench.PEERS
    bench.PEERS = {name: everybody[name] for name in names if name in everybody}
    try:
        yield
    finally:
        bench.PEERS = everybody


def visited(bench: Any, row: Any) -> dict[str, Any]:
    """Pairs of one head: those that are seen, and those of the blocks that the forward kernel computes."""
    import torch

    import cpflex
    from cpflex.kernels import tuning
    from cpflex.kernels.work import Blocks, work_tables
    from cpflex.ring.handles import resolve

    rows_are, rows, cols = tuning.GLUON[90, "forward", row.head_dim, row.head_dim].config.blocks
    blocks = Blocks(rows_are, rows, cols, consecutive=True)
    _, (step,), _ = resolve(cpflex.make_plan(bench.mask_mod_of(row), row.seq_len).handle).on(torch.device("cpu"))
    (table,) = work_tables([step.tile_mask], [blocks])
    (work,) = table.split(table.table)
    items = work.items.view(-1, 8)
    pairs = int((items[:, 4] + items[:, 7]).sum()) * blocks.rows * blocks.cols
    return {"seen_pairs": bench.visible_pairs(row), "visited_pairs": pairs}


# -- what follows

GOALS = {("forward", "hopper"): 1.0, ("backward", "hopper"): 0.8, ("backward", "hopper_onepass"): 0.95}
"""Of the speed of cuDNN."""
OF_DENSE = 0.9
"""Of the dense rate per visited tile: documents and window, softcap."""


def of_times(found: Records) -> list[str]:
    rows = [x for x in found if "row" in x]
    lines = [f"not here: {x['left_out']}" for x in found if isinstance(x.get("left_out"), str)]
    for x in rows:
        for stage in ("forward", "backward"):
            cells = "  ".join(f"{name} {'-' if v is None else f'{v:.0f}'}" for name, v in x[f"{stage}_tflops"].items())
            lines.append(f"{x['row']:20} {stage:9} TFLOP/s: {cells}")
    lines += [f"{x['row']}: {name} failed: {why}" for x in rows for name, why in x["failed"].items()]
    proven = [tuple(dims) for x in found for dims in x.get("proven", ())]
    return lines + goals(rows) + changes(rows, proven)


def goals(rows: Records) -> list[str]:
    """Each goal, by how much it was reached."""
    lines = []
    for x in rows:
        for (stage, name), goal in GOALS.items():
            if ratio := _ratio(x, stage, name, "cudnn"):
                lines.append(_told(f"{x['row']} {stage}: {name} {ratio:.2f} x cuDNN", ratio, goal))
        if x["mask"] == "doc_window" or x["score"] == "softcap":
            dense = [y for y in rows if (y["mask"], y["score"]) == ("full", "none") and y["head_dim"] == x["head_dim"]]
            rate, of_dense = (_rate(y) for y in (x, next((y for y in dense if y["seq_len"] == x["seq_len"]), {})))
            if rate and of_dense:
                ratio = rate / of_dense
                lines.append(
                    _told(f"{x['row']} forward: {ratio:.2f} of the dense rate per visited tile", ratio, OF_DENSE)
                )
    return lines


def changes(rows: Records, proven: Sequence[tuple[int, int]]) -> list[str]:
    """Rows of the table to make defaults: those proven here, and faster than portable kernels in all that was timed."""
    from cpflex.kernels import tuning

    lines = []
    for (architecture, which, *dims), row in tuning.GLUON.items():
        stage = "forward" if which == "forward" else "backward"
        name = "hopper_onepass" if which == "onepass" else "hopper"
        timed = [_ratio(x, stage, name, "kernel") for x in rows if (x["head_dim"],) * 2 == tuple(dims)]
        ratios = [ratio for ratio in timed if ratio]
        if row.is_default or not ratios:
            continue
        if tuple(dims) in proven and min(ratios) > 1:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            key = f'({architecture}, "{which}", {dims[0]}, {dims[1]})'
            lines.append(f"{mean:.2f} x portable; for tuning.GLUON: {key}: GluonRow({row.config}, is_default=True),")
        else:
            reason = f"{min(ratios):.2f} x portable at least" if tuple(dims) in proven else "not proven in this run"
            lines.append(f"{which} {dims[0]}, {dims[1]} stays asked for: {reason}")
    return lines


def _ratio(x: dict[str, Any], stage: str, name: str, other: str) -> float | None:
    """How many times as fast."""
    ms = x[f"{stage}_ms"]
    return ms[other] / ms[name] if ms.get(name) and ms.get(other) else None


def _rate(x: dict[str, Any]) -> float | None:
    """Visited pairs a millisecond of a head."""
    ms = x.get("forward_ms", {}).get("hopper")
    return x["visited_pairs"] * x["batch"] * x["heads"] / ms if ms else None


def _told(what: str, ratio: float, goal: float) -> str:
    return f"{what}; goal {goal}: {'reached' if ratio >= goal else 'MISSED'}"

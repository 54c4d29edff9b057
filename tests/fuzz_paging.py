"""Random programs of page operations on ranks as threads, against the same sequences as dense tensors; rows that hold no
kept token are NaN.

python tests/fuzz_paging.py --programs 5000 --seed 0 --record benchmarks/results/fuzz_paging.json
python tests/fuzz_paging.py --replay 1234
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent / "paging"))

from serving import LONGEST, MASKS, SCORES, Service

import cpflex
from cpflex.paging import tables, traffic
from cpflex.paging.travel import Costs
from cpflex.testing import run_ranks

ROWS = {
    "everyone": cpflex.everyone,
    "by_sequence": cpflex.by_sequence,
    "by_token": cpflex.by_token,
    "by_head": cpflex.by_head,
}


def mixed(costs: Costs) -> list[bool]:
    """Of some sequences keys travel, as their costs have it; the same on every rank."""
    return [(q + k) % 3 == 0 for q, k in zip(costs.queries_bytes, costs.keys_bytes, strict=True)]


TRAVEL = {"queries": cpflex.queries, "keys": cpflex.keys, "mixed": mixed, "cheaper": None}
OPERATIONS = ("reserve", *["append"] * 10, "fork", "crop", "erase", "evict", "evict")


@dataclass(frozen=True)
class Program:
    """One random program, all of it by its seed."""

    seed: int
    world_size: int = field(init=False)
    mask: str = field(init=False)
    score: str = field(init=False)
    other: str = field(init=False)
    rows: str = field(init=False)
    travel: str = field(init=False)
    rows_at_once: int = field(init=False)
    num_pages: int = field(init=False)
    page_size: int = field(init=False)
    horizon: int = field(init=False)
    splits: int | None = field(init=False)
    num_kv_heads: int = field(init=False)
    dtype: str = field(init=False)
    num_operations: int = field(init=False)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        rows = draw.choice(list(ROWS))
        chosen = {
            "world_size": draw.choice([1, 2, 4] if rows == "by_head" else [1, 2, 3, 4]),
            "mask": draw.choice(list(MASKS)),
            "score": draw.choice(list(SCORES)),
            "other": draw.choice(["", "", "", "window", "causal"]),
            "rows": rows,
            "travel": draw.choice(list(TRAVEL)) if rows in ("by_sequence", "by_token") else "",
            "rows_at_once": draw.choice([1, 16, traffic.ROWS_AT_ONCE]),
            "num_pages": draw.choice([8, 20, 40]),
            "page_size": draw.choice([1, 4, 4, 7]),
            "horizon": draw.choice([1, 3, 8, 64]),
            "splits": draw.choice([None, None, 2, 5]),
            "num_kv_heads": draw.choice([1, 2, 4]),
            "dtype": draw.choice(["float32", "float32", "float32", "bfloat16"]),
            "num_operations": draw.randint(8, 32),
        }
        for name, value in chosen.items():
            object.__setattr__(self, name, value)

    @property
    def masks(self) -> dict[str, Any]:
        """By kind; two where a model has two kinds of layers."""
        return {"mask": MASKS[self.mask], **({"other": MASKS[self.other]} if self.other else {})}

    def run(self) -> Counter[str]:
        """What was done, by name.

        Raises:
            AssertionError: an attention differs from the dense one, or pages are lost.
        """
        # small enough that sequences are many groups of pages, or one
        small = mock.patch.object(tables, "GROUP", (2, 64)[self.seed % 2])
        with small, mock.patch.object(traffic, "ROWS_AT_ONCE", self.rows_at_once):
            results = run_ranks(lambda group: Run(self, group).result(), self.world_size, timeout=120.0)
        assert all(found == results[0] for found in results), f"ranks did different things: {results}"
        return results[0]


class Run:
    """A program on one rank. Every rank draws the same operations."""

    def __init__(self, program: Program, group: Any) -> None:
        self.program, self.draw = program, random.Random(program.seed + 1)
        self.service = Service(
            group, program.num_pages, program.page_size, num_kv_heads=program.num_kv_heads,
            num_pools=len(program.masks), dtype=getattr(torch, program.dtype), seed=program.seed,
        )  # fmt: skip
        self.traced = {kind: cpflex.mask_mod(mask, num_heads=4) for kind, mask in program.masks.items()}
        self.by_place = any(one.mod.uses("b") for one in self.traced.values())
        self.done: Counter[str] = Counter()
        self.plan: Any = None
        self.num_begun = 0

    def result(self) -> Counter[str]:
        for number in range(self.program.num_operations):
            name = "reserve" if number < 2 else self.draw.choice(OPERATIONS)
            before = self.service.pages.num_free, self.service.pages.sequences
            try:
                getattr(self, name)()
            except cpflex.OutOfPages:
                assert (self.service.pages.num_free, self.service.pages.sequences) == before
                self.done["out of pages"] += 1
            self.count_pages()
        return self.done

    def any_sequence(self) -> str | None:
        known = self.service.pages.sequences
        return self.draw.choice(known) if known else None  # type: ignore[return-value]

    def reserve(self) -> None:
        old = self.any_sequence()
        seq = old if old is not None and self.draw.random() < 0.4 else f"s{self.num_begun}"
        length = self.service.pages.length(seq) if seq in self.service.pages else 0
        tokens = self.draw.randint(0, 60)
        if length + tokens > LONGEST - 10:
            return
        self.num_begun += 1
        self.service.reserve(seq, tokens)
        self.done["reserve"] += 1

    def fork(self) -> None:
        if parent := self.any_sequence():
            self.num_begun += 1
            self.service.fork(parent, f"s{self.num_begun - 1}")
            self.done["fork"] += 1

    def crop(self) -> None:
        if seq := self.any_sequence():
            length = self.draw.randint(0, self.service.pages.length(seq))
            try:
                self.service.crop(seq, length)
            except ValueError as error:
                assert "was evicted" in str(error)
                self.done["crop refused"] += 1
                return
            self.done["crop"] += 1

    def erase(self) -> None:
        if (seq := self.any_sequence()) and self.draw.random() < 0.5:
            self.service.erase(seq)
            self.done["erase"] += 1

    def evict(self) -> None:
        pages = self.service.pages
        if self.by_place:  # the places of the last plan alone are those of the next
            if self.plan is None or any(seq not in pages for seq in self.plan.steps.sequences):
                return
            freed = self.service.evict(self.traced, self.plan.steps.sequences)
        else:
            freed = self.service.evict(self.traced)
        self.done["evict"] += 1
        self.done["evicted pages"] += freed
        self.check_evicted()

    def append(self) -> None:
        pages, draw = self.service.pages, self.draw
        reuses = self.plan is not None and draw.random() < 0.6
        if reuses and self.plan.fits(dict(zip(self.plan.steps.sequences, self.plan.steps.new, strict=True))):
            self.done["step of an old plan"] += 1
        else:
            ready = [seq for seq in pages.sequences if pages.capacity(seq) > pages.length(seq)]
            if not ready:
                return
            draw.shuffle(ready)
            chosen = ready[: draw.randint(1, min(len(ready), 8))]
            new = {seq: draw.randint(1, min(8, pages.capacity(seq) - pages.length(seq))) for seq in chosen}
            into = self.plan if draw.random() < 0.3 else None
            options: dict[str, Any] = {"rows": ROWS[self.program.rows], "splits": self.program.splits, "into": into}
            options["travel"] = TRAVEL.get(self.program.travel)
            try:
                self.plan = cpflex.make_decode_plan(self.traced, pages, new, self.program.horizon, **options)
            except ValueError as error:  # cropped, or at another place, so that evicted pages may be seen
                assert "was evicted" in str(error)
                assert any(not self.all_kept(seq) for seq in new)
                self.done["plan refused"] += 1
                return
            self.done["plan"] += 1
        self.service.step(self.plan, self.program.masks, SCORES[self.program.score])
        self.done["step"] += 1
        for one in self.plan.steps.traffic.values():
            self.done["keys travelled"] += bool(one.keys.any())
            self.done["queries travelled"] += one.returns
            self.done["keys in several waves"] += one.num_waves > 1

    def all_kept(self, seq: str) -> bool:
        return bool((self.service.pages.held(seq).slot >= 0).all())

    def check_evicted(self) -> None:
        """No query from here on sees what is gone, as far as sequences may grow."""
        pages = self.service.pages
        if self.by_place:
            return  # proven for one place
        for seq in pages.sequences:
            held = pages.held(seq)
            if self.done["crop"] or self.done["fork"]:  # what was evicted before may be seen again, and is then refused
                return
            gone = np.flatnonzero(held.slot < 0)
            rows = (gone[:, None] * pages.page_size + np.arange(pages.page_size)).reshape(-1)
            queries = torch.arange(held.length, LONGEST)
            for mask in self.program.masks.values():
                for h in range(4):
                    seen = mask(torch.tensor(0), torch.tensor(h), queries[:, None], torch.from_numpy(rows))
                    assert not seen.any(), f"{seq}: an evicted page is seen"

    def count_pages(self) -> None:
        """Every page is free or held, as often as it is counted."""
        pages = self.service.pages
        holders = Counter(
            (owner, slot)
            for seq in pages.sequences
            for owner, slot in zip(pages.held(seq).owner.tolist(), pages.held(seq).slot.tolist(), strict=True)
            if slot >= 0
        )
        for rank in range(pages.world_size):
            assert pages.num_free[rank] + sum(owner == rank for owner, _ in holders) == pages.num_pages
        for (owner, slot), count in holders.items():
            assert pages.num_holders(np.array([owner]), np.array([slot]))[0] == count


@dataclass
class Report:
    """What many programs came to."""

    failures: list[tuple[int, str]] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    drawn: dict[str, Counter[str]] = field(default_factory=dict)


def run(seeds: range) -> Report:
    report = Report()
    for seed in seeds:
        program = Program(seed)
        for name in ("world_size", "mask", "score", "rows", "travel", "page_size", "dtype"):
            report.drawn.setdefault(name, Counter())[str(getattr(program, name))] += 1
        try:
            report.done += program.run()
        except Exception as error:  # noqa: BLE001 - it is what is looked for
            report.failures.append((seed, f"{type(error).__name__}: {error}"))
            print(f"seed {seed}: {report.failures[-1][1]}", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the next ones follow")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--replay", type=int, help="the seed of one program")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.replay is not None:
        print(Program(arguments.replay), Program(arguments.replay).run())
        return
    began = time.monotonic()
    report = run(range(arguments.seed, arguments.seed + arguments.programs))
    found = {
        "programs": arguments.programs,
        "seed": arguments.seed,
        "failures": report.failures,
        "done": dict(sorted(report.done.items())),
        "drawn": {name: dict(sorted(counts.items())) for name, counts in report.drawn.items()},
        "seconds": round(time.monotonic() - began, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": f"python tests/fuzz_paging.py --programs {arguments.programs} --seed {arguments.seed}",
    }
    print(json.dumps(found, indent=1))
    if arguments.record:
        arguments.record.write_text(json.dumps(found, indent=1) + "\n")
    if report.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()

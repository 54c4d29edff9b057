"""What a call asks of the host: budgets of torch's operations, launches and messages, and that nothing is decided twice."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cpflex
from cpflex.kernels import forward, launch
from cpflex.ring import bound
from cpflex.ring.operator import IMPLEMENTATIONS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
host: Any = importlib.import_module("host")
Case, launches_are_stubs = host.Case, host.launches_are_stubs

VIEWS = {"as_strided", "detach", "narrow", "slice", "unsqueeze", "squeeze", "view", "alias", "lift_fresh"}
ALLOCATIONS = {"empty", "new_empty", "empty_like"}
OF_THE_HANDLE = {"item"}

BUDGETS = {  # launches, and operations that would run on a device, of a forward and of a backward
    Case(1): ((1, 0), (3, 5)),
    Case(8): ((8, 5), (17, 35)),
    Case(8, "documents"): ((2, 5), (5, 11)),
}


class Counted(TorchDispatchMode):
    """Names of what is done, without what the stubs of peers do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace == "cpflex":  # its own Python, seen too
            with self:
                return IMPLEMENTATIONS[name](*args, **(kwargs or {}))
        self.names[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def on_device(self) -> int:
        return sum(count for name, count in self.names.items() if name not in VIEWS | ALLOCATIONS | OF_THE_HANDLE)


@contextlib.contextmanager
def counted() -> Iterator[Counted]:
    with Counted() as counts:
        yield counts


@pytest.mark.parametrize("case", BUDGETS, ids=str)
def test_a_call_keeps_its_budget_of_operations_and_launches(case: Any):
    with launches_are_stubs() as launched, torch.autograd.set_multithreading_enabled(False):
        training = case.training()
        training.backward(training.forward())
        found = []
        with mock.patch.object(bound, "agree"):  # what ranks tell each other is not counted here
            launched.clear()
            with counted() as counts:
                out = training.forward()
            found.append((len(launched), counts.on_device))
            launched.clear()
            with counted() as counts:
                training.backward(out)
            found.append((len(launched), counts.on_device))
    for (launches, operations), (most_launches, most_operations) in zip(found, BUDGETS[case], strict=True):
        assert launches == most_launches
        assert operations <= most_operations, (operations, most_operations)


def test_what_a_call_decided_holds_for_the_next():
    """The second call looks up no row and packs no captured tensor, at none of its steps."""
    with launches_are_stubs(), torch.autograd.set_multithreading_enabled(False):
        training = Case(8).training()
        training.backward(training.forward())
        refuse = mock.Mock(side_effect=AssertionError("decided again"))
        with (
            mock.patch.object(launch.Mods, "of", refuse),
            mock.patch.object(launch.tuning, "lookup", refuse),
            mock.patch.object(forward, "work_by_query", wraps=forward.work_by_query) as looked_up,
        ):
            training.backward(training.forward())
        assert looked_up.call_count == 8


@pytest.mark.parametrize("biased", [False, True])
def test_what_a_step_of_decoding_decided_holds_for_the_next(biased: bool):
    """Also if its score_mod reads a tensor."""
    slopes = torch.ones(8)
    score_mod = cpflex.score_mod(lambda s, b, h, q, k: s - slopes[h] * (q - k)) if biased else None
    pages = cpflex.Pages(16, 64)
    pool = pages.pool(2, 16, dtype=torch.bfloat16)
    pages.reserve("a", 200)
    plan = cpflex.make_decode_plan(cpflex.causal() & cpflex.sliding_window(70), pages, {"a": 1}, splits=3)
    q, k, v = (torch.zeros(1, heads, 1, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))

    def step() -> None:
        pool.assign(k, v, plan)
        cpflex.flex_attention(q, pool.k, pool.v, score_mod, plan, enable_gqa=True)
        plan.advance()

    refuse = mock.Mock(side_effect=AssertionError("decided again"))
    with launches_are_stubs() as launched:
        step()
        with mock.patch.object(launch.Mods, "of", refuse), mock.patch.object(launch.tuning, "lookup", refuse):
            step()
    assert launched == ["decode_kernel", "combine_kernel"] * 2


def test_the_table_has_a_row_for_each_case(tmp_path: Path):
    lines: list[str] = []
    with mock.patch.object(host, "CASES", [Case(1), Case(2, "documents")]):
        host.main(["--rounds", "2", "--out", str(tmp_path / "host.json")], lines.append)
    rows = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["causal, 1 ranks", "documents, 2 ranks"]
    assert [line.split("  ")[0] for line in lines[2:]] == ["causal, 1 ranks", "documents, 2 ranks"]
    assert all(float(number) > 0 for line in lines[2:] for number in line.split()[-2:])

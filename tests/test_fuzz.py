"""A sample of the fuzz (squares: the same cases at every run), and that what it finds can be run again."""

from __future__ import annotations

import datetime

import pytest
import torch

import fuzz
from cpflex.ring import transport
from fuzz import Case, Table, cases, replayed, run


@pytest.mark.by_day(6)
@pytest.mark.parametrize(
    "worlds", [(1, 2), (3, 4), (5, 6), (7, 8)], ids=lambda worlds: f"{worlds[0]} or {worlds[1]} ranks"
)
def test_random_attentions_equal_the_oracle(worlds: tuple[int, int]):
    report = run(60, strategy=cases(worlds))
    assert not report.failures, "\n".join(f"{f.error}\n{fuzz.replay_command(f.case)}" for f in report.failures)
    assert set(report.features["world_size"]) == {str(n) for n in worlds}
    assert set(report.features["layout"]) == {"balanced", "contiguous", "striped", "zigzag"}


def test_random_attentions_to_another_sequence_equal_the_oracle():
    """Others every day."""
    report = run(30, strategy=cases((1, 2, 3, 4), rectangles=True), random_seed=datetime.date.today().toordinal())
    assert not report.failures, "\n".join(f"{f.error}\n{fuzz.replay_command(f.case)}" for f in report.failures)
    assert {"kv_len", "layout of the keys", "tensors"} <= set(report.features)


def test_a_failure_shrinks_to_the_least_case_that_fails_and_can_be_run_again():
    def check(case: Case) -> None:
        assert not ("floor_div" in dict.fromkeys(op for _, op in case.features()) and case.world_size > 2)

    (failure,) = run(500, check, cases(range(1, 9))).failures
    again = replayed(repr(failure.case))
    assert again == failure.case
    assert again.world_size == 3 and again.seq_len == 1 and len(again.mask + again.score) < 120
    with pytest.raises(AssertionError):
        check(again)


def test_a_message_that_arrives_changed_is_found_with_two_ranks(monkeypatch: pytest.MonkeyPatch):
    pack = transport._pack
    monkeypatch.setattr(transport, "_pack", lambda pair, rows: pack(pair, rows) * 1.01)
    (failure,) = run(200).failures
    assert failure.case.world_size == 2 and 16 < failure.case.seq_len <= 32
    with pytest.raises(AssertionError, match="the budget is"):
        fuzz.check(replayed(repr(failure.case)))


def test_a_case_says_all_about_itself():
    case = Case("lambda b, h, q, k: t0[q] == t0[k]", tables=(Table((5,), rising=True),), seq_len=5, dtype="bf16")
    assert repr(case).startswith("Case(mask=") and replayed(repr(case)) == case
    assert torch.equal(case.seen, replayed(repr(case)).seen)
    fuzz.check(case)

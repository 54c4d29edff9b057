"""The Gluon kernels of sm_90 as ptxas makes them: registers, stack, tensor cores that do not wait, instructions."""

from __future__ import annotations

import hopper_gates
import pytest
from ahead_of_time import HEADER
from hopper_gates import CASES, Case

from cpflex.kernels import tuning

TOLERATED = 1.03
"""Of the instructions of a loop."""


@pytest.mark.by_day(16)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loops_are_as_short_as_they_were_and_do_not_wait(case: Case):
    figures = hopper_gates.recorded_of(tuning.triton_release()).get(str(case))
    if figures is None:
        pytest.skip("there are no figures of this Triton: python tests/kernels/hopper_gates.py --write")
    row = hopper_gates.compiled(case)
    print(HEADER, row, sep="\n")
    assert row.tensor_core_ops > 0
    assert row.bulk_copies > 0
    assert not row.is_serialised
    assert row.registers == figures["registers"]
    assert row.shared_bytes <= figures["shared_bytes"]
    assert row.spilled_bytes <= figures["stack_bytes"]
    assert len(row.instructions) == len(figures["loops"])
    for loop, before in zip(row.instructions, figures["loops"], strict=True):
        assert loop <= TOLERATED * before, (row, figures["loops"])


@pytest.mark.parametrize("release", tuning.GATED, ids=str)
def test_each_release_that_a_row_names_has_compiled_it(release: tuple[int, int]):
    """Each within what an sm_90 has: 168 registers at the launch, 12 warps; consumers take what the producer gives back."""
    figures = hopper_gates.recorded_of(release)
    served = {key[1:] for key, row in tuning.GLUON.items() if release in row.releases}
    for case in hopper_gates.cases_of(release):
        if case[:3] in served:
            row = figures[str(case)]
            assert row["registers"] == 168 and row["shared_bytes"] <= 227 << 10, case
            assert row["products"] and row["copies"] and not row["is_serialised"], case


def test_the_pinned_release_spills_nothing_where_there_is_only_a_mask():
    rows = hopper_gates.recorded_of((3, 7))
    spilling = {name: row["stack_bytes"] for name, row in rows.items() if row["stack_bytes"]}
    assert not [name for name in spilling if name.endswith(("none", "none fp16"))]
    assert all(rows[name]["spills_in_loops"] <= 0.05 * sum(rows[name]["loops"]) for name in spilling)


def test_a_loop_that_is_longer_or_waits_is_told(monkeypatch: pytest.MonkeyPatch):
    """By figures that are 4 percent shorter, as if the kernel had become longer."""
    case = Case("forward", 64, 64, "causal", "none")
    report = hopper_gates.compiled(case)
    shorter = hopper_gates.figures_of(report) | {"loops": [round(n / 1.04) for n in report.instructions]}
    monkeypatch.setattr(hopper_gates, "recorded_of", lambda release: {str(case): shorter})
    monkeypatch.setattr(hopper_gates, "compiled", lambda case: report)
    with pytest.raises(AssertionError):
        test_loops_are_as_short_as_they_were_and_do_not_wait(case)
    shorter["loops"] = report.instructions
    test_loops_are_as_short_as_they_were_and_do_not_wait(case)

"""What cpflex says while it works: log lines, and ranges in a profile."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import cpflex
from cpflex.testing import ThreadLinks, run_ranks
from patience import patience


def test_a_plan_is_logged_with_what_it_decided(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="cpflex")
    cpflex.make_plan({"full": cpflex.causal(), "sliding": cpflex.sliding_window(9)}, 1000, rank=1, world_size=4)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("Plan(full, sliding; seq_len=1000, balanced on rank 1 of 4, local_len=256) made in ")
    assert "full: " in line
    assert "PARTIAL tiles" in line


def attend(group: ThreadLinks | None = None) -> None:
    plan = cpflex.make_plan(cpflex.full(), 300, group, layout=cpflex.contiguous, schedule=cpflex.ring)
    q = torch.randn(1, 1, plan.local_len, 16, requires_grad=True)
    cpflex.flex_attention(q, q, q, block_mask=plan).sum().backward()


def test_a_new_kind_of_call_is_logged(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, logger="cpflex")
    run_ranks(attend, 2)
    said = [record.getMessage() for record in caplog.records if record.name == "cpflex.ring.agreement"]
    assert len(said) == 4, "two ranks, forward and backward"
    assert "group rank 0: a new kind of call: {'cpflex version'" in "".join(said)


def test_torch_logs_turns_it_on():
    """TORCH_LOGS takes the name of any module."""
    script = "import cpflex; cpflex.make_plan(cpflex.causal(), 300)"
    environment = os.environ | {"TORCH_LOGS": "cpflex"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=patience(120)
    )
    assert "Plan(mask; seq_len=300" in done.stderr, done.stderr


def test_every_step_is_a_range_of_the_profile():
    names: set[str] = set()

    def profiled(group: ThreadLinks) -> None:
        if group.rank:
            return attend(group)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            attend(group)
        names.update(event.name for event in profiler.events())
        return None

    run_ranks(profiled, 3)
    for step in range(3):
        assert f"cpflex::step[{step}] attend" in names
    for step in (1, 2):
        assert f"cpflex::step[{step}] wait K/V" in names
    assert any(name.startswith("cpflex::step[") and name.endswith("wait dK/dV") for name in names)

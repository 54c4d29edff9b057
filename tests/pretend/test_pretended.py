"""The pretended device tells what a GPU would have been told: copies, waits, launches with their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import checks

Run = Callable[..., Any]


def test_copies_over_the_bus_are_listed_and_those_that_the_host_waits_for_told_apart(run: Run):
    run(checks.check_copies)


def test_what_the_host_waits_for_is_listed_and_operations_compute(run: Run):
    run(checks.check_syncs)


def test_tensors_on_two_devices_are_refused(run: Run):
    run(checks.check_mixed_devices)


def test_a_launch_is_listed_with_its_grid_and_its_arguments(run: Run):
    run(checks.check_a_launch)


def test_shared_memory_is_that_of_the_chip(run: Run):
    run(checks.check_shared_memory)


def test_an_attention_runs_up_to_each_launch_in_one_thread_and_in_ranks_as_threads(run: Run):
    run(checks.check_attention)

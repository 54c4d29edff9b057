"""A kernel gets a row whose shared memory the chip has: found once, in a fixed order, and told."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from cpflex.kernels import fitting, tuning
from cpflex.kernels.fitting import Kind
from cpflex.kernels.tuning import KernelConfig
from cpflex.tile_mask import TILE

FIRST = KernelConfig(64, 128, 8, 3)
KERNEL = mock.Mock(device_caches={})
KIND = Kind("dkdv", torch.device("cpu"), 128, 128, torch.bfloat16, ())


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> Iterator[None]:
    with mock.patch.multiple(fitting, _rows={}, _fitted=set(), _kernels=set()):
        yield


def launch(needs: dict[KernelConfig, int], launched: list[KernelConfig]) -> None:
    """As `launch.start` does it; others than ``needs`` says need nothing."""
    config = fitting.row(KIND, FIRST)
    launched.append(config)
    assert fitting.is_looking()
    fitting.found(KERNEL, KIND, config, needs.get(config, 0))
    fitting.found(KERNEL, KIND, config, 0)  # another variant of the kernel, which needs less


def test_the_first_row_that_fits_is_taken_told_and_remembered(caplog: pytest.LogCaptureFixture):
    second, third = KernelConfig(64, 128, 8, 2), KernelConfig(64, 128, 8, 1)
    launched: list[KernelConfig] = []
    with mock.patch.object(fitting, "shared_memory", return_value=100), caplog.at_level(logging.WARNING):
        for calls in ("these", "these", "others"):
            fitting.fit(calls, lambda: launch({FIRST: 300 << 10, second: 101, third: 100}, launched))
    assert launched == [FIRST, second, third, third]
    assert not fitting.is_looking()
    assert [record.getMessage() for record in caplog.records] == [
        f"dkdv of head dims 128 and 128: with these mods {FIRST} needs 300 KiB of shared memory; cpu has 0; trying {second}",
        f"dkdv of head dims 128 and 128: with these mods {second} needs 0 KiB of shared memory; cpu has 0; trying {third}",
    ]


def test_what_no_row_can_hold_is_refused_and_tried_again_by_the_next_call():
    def compile_all() -> None:
        fitting.found(KERNEL, KIND, fitting.row(KIND, FIRST), 300 << 10)

    with mock.patch.object(fitting, "shared_memory", return_value=99 << 10):
        for _ in range(2):
            with pytest.raises(
                NotImplementedError, match=r"dkdv of head dims 128 and 128 needs 300 KiB.* has 99; .*reference"
            ):
                fitting.fit("these", compile_all)
    assert not fitting.is_looking()


@pytest.mark.parametrize("which", [*tuning.PASSES, *tuning.PAGE_PASSES])
@pytest.mark.parametrize("rows", [tuning.SM80, tuning.SM90, tuning.SM100, tuning.FP32], ids=["80", "90", "100", "fp32"])
def test_other_rows_are_smaller_and_their_blocks_divide_a_tile(which: str, rows: Any):
    for width in tuning.WIDTHS:
        first = rows[which, width]
        others = list(fitting.smaller(which, first))
        assert len({first, *others}) == 1 + len(others)
        sizes = [(x.block_q * x.block_kv, x.num_stages) for x in (first, *others)]
        assert sizes == sorted(sizes, reverse=True) or first.num_stages == 1
        assert all(TILE % x.block_q == 0 == TILE % x.block_kv and x.num_warps >= 4 for x in others)


def test_a_kernel_that_needs_less_keeps_its_row():
    launched: list[KernelConfig] = []
    with mock.patch.object(fitting, "shared_memory", return_value=100):
        fitting.fit("these", lambda: launch({FIRST: 100}, launched))
    assert launched == [FIRST] and fitting.row(KIND, FIRST) is FIRST


def test_memory_of_rows_and_of_variants_is_bounded():
    kernel = mock.Mock(device_caches={})
    with mock.patch.object(fitting, "shared_memory", return_value=100), mock.patch.object(fitting, "MOST", 3):
        for i in range(10):

            def compile_one(i: int = i) -> None:
                kernel.device_caches[i] = "a variant"
                fitting.found(kernel, KIND, FIRST, 0)

            fitting.fit(i, compile_one)
            assert len(fitting._fitted) <= 3
            assert len(kernel.device_caches) <= 3

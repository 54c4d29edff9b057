"""The row of `tuning` that a kernel gets on this chip: one whose shared memory the chip has.

Mods take part in what a kernel needs, so it is known when the kernel has been compiled. That is done before a rank
sends anything: a launch that fails in the middle of a ring would leave the others waiting.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton

from cpflex.kernels.call import OTHERWISE
from cpflex.kernels.tuning import KernelConfig

log = logging.getLogger(__name__)


class Kind(NamedTuple):
    """What decides how much shared memory a kernel needs, besides its row."""

    which: str
    """One of tuning.PASSES or PAGE_PASSES."""
    device: torch.device
    head_dim: int
    v_dim: int
    dtype: torch.dtype
    mods: tuple[Any, ...]
    """The functions that the mods became."""


MOST = 4096
"""Kinds of calls that are remembered, here and, with the variants that were compiled for them, by Triton."""

_rows: dict[Kind, KernelConfig] = {}
"""Of kernels whose own does not fit."""

_fitted: set[Hashable] = set()
"""Calls whose kernels were compiled, and fit."""

_kernels: set[Any] = set()
"""Those that were compiled."""

_looking: ContextVar[dict[Kind, tuple[KernelConfig, int]] | None] = ContextVar("looking", default=None)
"""Kernels that were compiled while a row is looked for: their rows, and bytes of shared memory."""


def row(kind: Kind, first: KernelConfig) -> KernelConfig:
    """The row of a kernel: ``first``, unless it was found not to fit."""
    return _rows.get(kind, first)


def is_looking() -> bool:
    """Kernels are to be compiled, and not launched."""
    return _looking.get() is not None


def found(kernel: Any, kind: Kind, config: KernelConfig, shared_bytes: int) -> None:
    """Told of each kernel that was compiled."""
    compiled = _looking.get()
    assert compiled is not None
    _kernels.add(kernel)
    if kind not in compiled or compiled[kind][1] < shared_bytes:
        compiled[kind] = config, shared_bytes


def fit(calls: Hashable, compile_all: Callable[[], None]) -> None:
    """Compile the kernels that ``compile_all`` would launch, with other rows where theirs need more than the chip has.
    Done once for ``calls``, which names all that are alike.

    Raises:
        NotImplementedError: no row fits.
    """
    if calls in _fitted:
        return
    if len(_fitted) >= MOST:
        _fitted.clear()
        _rows.clear()
        for kernel in _kernels:
            kernel.device_caches.clear()  # what is needed again comes from Triton's folder
    _fit(compile_all)
    _fitted.add(calls)


def _fit(compile_all: Callable[[], None]) -> None:
    limit = shared_memory()
    tried: dict[Kind, Iterator[KernelConfig]] = {}
    while True:
        token = _looking.set({})
        try:
            compile_all()
            compiled = _looking.get()
        finally:
            _looking.reset(token)
        assert compiled is not None
        too_large = {kind: at for kind, at in compiled.items() if at[1] > limit}
        if not too_large:
            return
        for kind, (config, shared_bytes) in too_large.items():
            others = tried.setdefault(kind, smaller(kind.which, config))
            if (other := next(others, None)) is None:
                raise NotImplementedError(
                    f"backend 'triton': with these mods the kernel {kind.which} of head dims {kind.head_dim} and "
                    f"{kind.v_dim} needs {shared_bytes >> 10} KiB of shared memory at least; {kind.device} has "
                    f"{limit >> 10}{OTHERWISE}"
                )
            log.warning(
                "%s of head dims %d and %d: with these mods %s needs %d KiB of shared memory; %s has %d; trying %s",
                *(kind.which, kind.head_dim, kind.v_dim, config, shared_bytes >> 10, kind.device, limit >> 10, other),
            )
            _rows[kind] = other


def smaller(which: str, config: KernelConfig) -> Iterator[KernelConfig]:
    """Rows that need less shared memory, the fastest first: fewer stages, then smaller blocks of what is walked over,
    then of what stays.
    """
    walked, kept = ("block_q", "block_kv") if which == "dkdv" else ("block_kv", "block_q")
    while True:
        for num_stages in range(config.num_stages - 1, 0, -1):
            yield replace(config, num_stages=num_stages)
        axis = walked if getattr(config, walked) > 32 else kept
        if getattr(config, axis) <= 32:
            return
        config = replace(config, **{axis: getattr(config, axis) // 2}, num_stages=2)
        if axis == kept:
            config = replace(config, num_warps=max(4, config.num_warps // 2))
        yield config


def shared_memory() -> int:
    """Bytes that a program may have on the current device."""
    driver: Any = triton.runtime.driver.active
    return driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"]

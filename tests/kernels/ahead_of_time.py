"""Compile the launches of the fused kernels for GPUs that are not here, and read what ptxas made of them."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cpflex.kernels import tuning

ONLY = None
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


class AbsentGpu:
    """As much of a Triton driver as compiling needs. Each capability is a device of its own, so that none finds another's kernels."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Variant:
    """One compiled variant of a kernel."""

    name: str
    kernel: object


@contextlib.contextmanager
def launches_compile(capability: int) -> Iterator[list[Variant]]:
    """Inside, a launch of any kernel compiles it for ``capability`` (90: sm_90) and runs nothing; the list gets each new variant once."""
    compiled: list[Variant] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        if ONLY and not self.fn.__name__.startswith(ONLY):
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if all(known.kernel is not kernel for known in compiled):
            compiled.append(Variant(self.fn.__name__, kernel))
        return kernel

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(AbsentGpu(capability))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(tuning, "capability_of", lambda device: capability),
        ):
            yield compiled
    finally:
        triton.runtime.driver._active = before


@dataclass(frozen=True)
class Report:
    """What became of a kernel."""

    registers: int
    spilled_bytes: int  # on the stack, per thread
    shared_bytes: int
    tensor_core_ops: dict[str, int]
    waits_at_once: int

    @property
    def shared_kib(self) -> float:
        return self.shared_bytes / 1024


def report(kernel) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    ops = {name: len(re.findall(rf"\b{name}", sass)) for name in ("HGMMA", "HMMA", "UTCHMMA", "STL", "LDL", "LDGSTS")}
    return Report(int(registers), int(stack), kernel.metadata.shared, {k: v for k, v in ops.items() if v}, 0)


def _cuobjdump(option: str, path: str) -> str:
    done = subprocess.run([os.path.join(TOOLS, "cuobjdump"), option, path], capture_output=True, text=True, check=True)
    return done.stdout

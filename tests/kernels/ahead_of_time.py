"""Compile the launches of the fused kernels for GPUs that are not here, and read what ptxas made of them.

``python tests/kernels/ahead_of_time.py`` prints a table of all that the suite compiles.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import cpflex
from cpflex.kernels import Call, backward, empty, forward, tuning
from cpflex.mods.trace import trace_score_mod
from cpflex.ring.handles import resolve

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORE_OP = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""What a tl.dot of 16-bit numbers must become."""


class AbsentGpu:
    """As much of a Triton driver as compiling needs. Each capability is a device with kernels of its own."""

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
    """One compiled variant of a kernel, and what ptxas said unless it came from the disk cache."""

    name: str
    kernel: Any
    log: str


@contextlib.contextmanager
def launches_compile(capability: int, only: str = "") -> Iterator[list[Variant]]:
    """Inside, a launch of a kernel compiles it for ``capability`` (90: sm_90) and runs nothing; each variant is listed
    once.

    Args:
        only: kernels whose name begins so; others are passed over.
    """
    compiled: list[Variant] = []
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        if not self.fn.__name__.startswith(only):
            return None
        with contextlib.redirect_stdout(io.StringIO()) as said:
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if all(known.kernel is not kernel for known in compiled):
            compiled.append(Variant(self.fn.__name__, kernel, said.getvalue()))
        return kernel

    driver, knobs = triton.runtime.driver, triton.knobs.nvidia
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(driver, "_active", AbsentGpu(capability)),
        mock.patch.object(tuning, "capability_of", return_value=capability),
        knobs.scope(),
    ):
        knobs.dump_ptxas_log = True
        yield compiled


# -- what a kernel became


@dataclass(frozen=True)
class Report:
    """Figures of one kernel. Loops are those with tensor-core operations."""

    name: str
    registers: int
    spilled_bytes: int  # of stack, per thread
    shared_bytes: int
    tensor_core_ops: int
    bulk_copies: int  # by tensor descriptors
    instructions: list[int]  # per loop
    spills_in_loops: int  # instructions
    is_serialised: bool
    """Each wgmma is waited for before the next begins: about half the speed, and nothing else to see (ptxas C7510 to
    C7515; C7519, an arrival that it adds, is none).
    """

    def __str__(self) -> str:
        loops = " + ".join(map(str, self.instructions))
        figures = f"{self.registers:9} {self.spilled_bytes:7} {self.shared_bytes / 1024:11.0f} {self.tensor_core_ops:5}"
        return f"{self.name:15} {figures}  {loops}"


HEADER = f"{'kernel':15} registers spilled shared(KiB)   mma  instructions of its loops"


def report(variant: Variant, capability: int) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(variant.kernel.asm["cubin"])
        file.flush()
        usage, sass = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    op = TENSOR_CORE_OP[capability]
    loops = _loops(sass, op)
    waits = any(_count(loop, "WARPGROUP.DEPBAR") > _count(loop, op) / 2 for loop in loops)
    return Report(
        variant.name,
        int(registers),
        int(stack),
        variant.kernel.metadata.shared,
        len(re.findall(rf"\b{op}\b", sass)),
        len(re.findall(r"\bUTMALDG\b", sass)),
        [len(loop) for loop in loops],
        sum(_count(loop, "STL") + _count(loop, "LDL") for loop in loops),
        waits or "are serialized" in variant.log,
    )


def _cuobjdump(option: str, path: str) -> str:
    tool = str(TOOLS / "cuobjdump")
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def _loops(sass: str, op: str) -> list[list[str]]:
    """The instructions of each loop that contains ``op``, from the target of a backward branch to the branch.

    Of overlapping ones the shortest counts: others enclose it, or come back to it from a wait at the end of the program.
    """
    lines = [m.groups() for m in re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    spans = []
    for i, (address, text) in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < int(address, 16) and int(branch[1], 16) in at:
            spans.append((at[int(branch[1], 16)], i + 1))
    found: list[tuple[int, int]] = []
    for begin, end in sorted(spans, key=lambda span: span[1] - span[0]):
        is_apart = all(end <= first or last <= begin for first, last in found)
        if is_apart and _count([text for _, text in lines[begin:end]], op):
            found.append((begin, end))
    return [[text for _, text in lines[begin:end]] for begin, end in sorted(found)]


def _count(loop: list[str], op: str) -> int:
    return sum(bool(re.search(rf"\b{re.escape(op)}\b", text)) for text in loop)


# -- what the suite compiles

SEQ_LEN = 256
SLOPES = torch.rand(4)
BIASES = torch.rand(4, 2 * SEQ_LEN)
MASKS = {
    "causal": lambda: cpflex.causal(),
    "doc_causal": lambda: cpflex.document(torch.arange(SEQ_LEN) // 50) & cpflex.causal(),
}
SCORES = {
    "none": None,
    "softcap": lambda score, b, h, q, k: 30.0 * torch.tanh(score / 30.0),
    "alibi": lambda score, b, h, q, k: score - SLOPES[h] * (q - k).abs(),
    "relative_bias": lambda score, b, h, q, k: score + BIASES[h, q - k + SEQ_LEN],
}
MODS = [("causal", "none"), ("doc_causal", "alibi"), ("doc_causal", "softcap")]
CAPABILITIES = (80, 90, 100)
HEAD_DIMS = (64, 128)
OTHER_HEAD_DIMS = (72, 80, 88, 96, 104, 112, 120, 160, 192, 256)


def compile_all(
    capability: int,
    head_dim: int,
    mask: str,
    score: str,
    dtype: torch.dtype = torch.bfloat16,
    only: str = "",
    tma: bool = False,
    wanted: tuple[int, ...] = (),
    alone: bool = False,
) -> list[Report]:
    """The kernels of a training step of one rank: its only forward step, and backward.

    Args:
        wanted: slots of captured tensors whose gradient is.
        alone: gradients are written in ``dtype``, as by an only step, not added up in fp32.
    """
    plan = cpflex.make_plan(MASKS[mask](), SEQ_LEN)
    mod, (step,), _ = resolve(plan.handle).on(torch.device("cpu"))
    score_mod = None if SCORES[score] is None else trace_score_mod(SCORES[score])
    call = Call(mod, 0.125, score_mod and score_mod.graph, score_mod.captured if score_mod else (), wanted)
    q, k, v, grad_out = (torch.zeros(2, heads, SEQ_LEN, head_dim, dtype=dtype) for heads in (4, 2, 2, 4))
    lse, dq = torch.zeros(q.shape[:3]), torch.zeros(q.shape, dtype=dtype if alone else torch.float32)
    rows = tuning.rows_for(capability, dtype)
    rows = {key: replace(config, tma=tma) for key, config in rows.items()}
    with launches_compile(capability, only) as variants, mock.patch.object(tuning, "rows_for", return_value=rows):
        forward.attend_and_finish(q, k, v, step.tile_mask, call, empty(q, head_dim))
        d_captured = [call.captured[slot] for slot in wanted]
        backward.attend_backward(q, k, v, grad_out, lse, lse, step.tile_mask, call, dq, d_captured)
    return [report(variant, capability) for variant in variants]


def main() -> None:
    print(f"Triton {triton.__version__}, bf16\n{'':32}{HEADER}")
    for capability in CAPABILITIES:
        for head_dim in (*HEAD_DIMS, *OTHER_HEAD_DIMS):
            for mods in MODS:
                for row in compile_all(capability, head_dim, *mods):
                    print(f"sm_{capability:<4} D{head_dim:<4} {'-'.join(mods):20}{row}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

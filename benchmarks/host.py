"""What an attention call costs the host: the time until everything has been launched, forward and backward.

    python benchmarks/host.py
    python benchmarks/host.py --before ../checkout --out benchmarks/results/host.json   # two versions in turns

Nothing is computed and nothing travels: peers are stubs, and so is what follows Triton's binder and its cache, the real
ones. Tensors are small ones on the CPU, where an operation of torch costs the host about what it costs on a GPU. CPU
time of one thread, the least of many calls: compare ratios of runs on one machine.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import cpflex
from cpflex import kernels
from cpflex.kernels import tuning
from cpflex.links.protocol import Message, Words

TOKENS = 256
"""Of each rank."""
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
CAPABILITY = 90

TURNS = 3


class Peers:
    """Links whose messages are there at once: exchanges are counted, what arrives is what lay in memory."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.agreed: dict[int, Words] = {}
        self.waits = False
        self.opening_bytes = 0
        self.said: Counter[str] = Counter()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Peers:
        self.said["exchange"] += 1
        return self

    def wait(self) -> None:
        return

    def compare(self, *_: Any) -> None:
        self.said["number"] += 1

    def all_gather_number(self, value: int, *_: Any) -> list[int]:
        """What older checkouts call instead of `compare`."""
        self.said["number"] += 1
        return [value] * self.world_size

    def settle(self) -> None:
        return

    def apart(self) -> None:
        return

    def say(self, number: int, words: Words) -> None:
        raise AssertionError("all ranks agree")

    def find(self, numbers: Iterable[int]) -> dict[int, Words]:
        raise AssertionError("all ranks agree")


class _Driver:
    """As much of a Triton driver as launching needs; its device is a new one, for which nothing has been compiled."""

    _devices = itertools.count(1000)

    def __init__(self) -> None:
        self.device = next(self._devices)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiled:
    """A kernel that a launch finds compiled, and that does nothing."""

    function = 0
    packed_metadata = ()

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def launch_metadata(self, *_: Any) -> None:
        return

    def run(self, *_: Any) -> None:
        self.launched.append(self.name)


def _capability_of(_: torch.device) -> int:
    """A function, since calls of a mock would be measured."""
    return CAPABILITY


def _is_fused(*_: Any) -> bool:
    return True


@contextlib.contextmanager
def launches_are_stubs() -> Iterator[list[str]]:
    """Inside, CPU tensors get fused kernels, which do nothing; their names are listed."""
    launched: list[str] = []

    def compiled(self, key, signature, device, *rest, **options):
        kernel = self.device_caches[device][0][key] = _Compiled(self.fn.__name__, launched)
        return kernel

    with (
        mock.patch.object(JITFunction, "_do_compile", compiled),
        mock.patch.object(triton.runtime.driver, "_active", _Driver()),
        mock.patch.object(tuning, "capability_of", _capability_of),
        mock.patch.object(kernels, "_is_fused", _is_fused),
    ):
        yield launched


@dataclass(frozen=True)
class Case:
    """A rank in the middle of a group; ``direct``: documents, of which it needs a few of its neighbours' keys."""

    world_size: int
    mask: str = "causal"

    def __str__(self) -> str:
        return f"{self.mask}, {self.world_size} ranks"

    def training(self) -> Training:
        seq_len = TOKENS * self.world_size
        peers = Peers(self.world_size // 2, self.world_size)
        mask_mod = cpflex.causal()
        if self.mask == "documents":
            cuts = [*range(0, seq_len, max(1, seq_len // 13)), seq_len]
            mask_mod = cpflex.document(cu_seqlens=cuts) & mask_mod
        plan = cpflex.make_plan(mask_mod, seq_len, peers)
        shapes = [(1, heads, plan.local_len, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        leaves = [torch.zeros(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
        return Training(plan, leaves, torch.ones(shapes[0], dtype=torch.bfloat16))


@dataclass(frozen=True)
class Training:
    """One attention of a training step."""

    plan: cpflex.Plan
    leaves: list[Tensor]
    grad_out: Tensor

    def forward(self) -> Tensor:
        q, k, v = self.leaves
        out = cpflex.flex_attention(q, k, v, block_mask=self.plan, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out

    def backward(self, out: Tensor) -> None:
        torch.autograd.grad(out, self.leaves, self.grad_out)


CASES = [Case(1), Case(8), Case(64), Case(1, "documents"), Case(8, "documents"), Case(64, "documents")]


def microseconds(training: Training, rounds: int) -> tuple[float, float]:
    """Of the host, forward and backward: the least of many."""
    spent: list[tuple[float, float]] = []
    for _ in range(rounds):
        began = time.process_time_ns()
        out = training.forward()
        between = time.process_time_ns()
        training.backward(out)
        spent.append((between - began, time.process_time_ns() - between))
    forward, backward = (1e-3 * min(times) for times in zip(*spent, strict=True))
    return forward, backward


def measured(rounds: int) -> list[Row]:
    """Each case with this process's cpflex."""
    rows = []
    with launches_are_stubs() as launched, torch.autograd.set_multithreading_enabled(False):
        for case in CASES:
            training = case.training()
            training.backward(training.forward())
            launched.clear()
            training.backward(training.forward())
            count, steps = len(launched), len(training.plan.steps)
            forward, backward = microseconds(training, max(10, rounds // steps))
            rows.append(Row(str(case), steps, count, forward, backward))
    return rows


class Row(NamedTuple):
    """Host time of a call in microseconds."""

    case: str
    steps: int
    launches: int
    forward: float
    backward: float


def in_turns(checkouts: Sequence[Path], rounds: int) -> list[list[Row]]:
    """The rows of each checkout: the least of `TURNS` processes, one after the other."""
    found: list[list[list[Row]]] = [[] for _ in checkouts]
    for _ in range(TURNS):
        for rows, checkout in zip(found, checkouts, strict=True):
            command = [sys.executable, __file__, "--rounds", str(rounds), "--out", "/dev/stdout"]
            environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
            said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            rows.append([Row(**row) for row in json.loads(said[said.index("\n{") :])["rows"]])
    return [[_least(turns) for turns in zip(*rows, strict=True)] for rows in found]


def _least(turns: Sequence[Row]) -> Row:
    forward, backward = (min(times) for times in zip(*(row[3:] for row in turns), strict=True))
    return turns[0]._replace(forward=forward, backward=backward)


def main(arguments: Sequence[str] | None = None, write: Callable[[str], Any] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="calls of the cases with one step; others get fewer")
    parser.add_argument("--before", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--out", type=Path, help="a file for the figures, JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    write(f"torch {torch.__version__}, triton {triton.__version__}; host time in microseconds a call")
    before: list[Row] = []
    if options.before:
        before, rows = in_turns([options.before, Path(__file__).parents[1]], options.rounds)
    else:
        rows = measured(options.rounds)
    write(f"{'':22}{'steps':>6}{'launches':>10}{'forward':>10}{'backward':>10}{'  of before' if before else ''}")
    for place, row in enumerate(rows):
        shares = [after / then for after, then in zip(row[3:], before[place][3:], strict=True)] if before else []
        shown = "".join(f"{share:7.2f}" for share in shares)
        write(f"{row.case:22}{row.steps:6}{row.launches:10}{row.forward:10.0f}{row.backward:10.0f}{shown}")
    if options.out:
        record = {"torch": torch.__version__, "triton": triton.__version__, "rounds": options.rounds}
        figures = {
            name: [row._asdict() for row in found] for name, found in (("before", before), ("rows", rows)) if found
        }
        options.out.write_text(json.dumps({**record, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""A sequence in chunks: problems, and how the ranks of a group compute them, each chunk's queries with the keys of all
chunks so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import cpflex
from cases import LAYOUTS, options_of
from cpflex.testing import ThreadLinks, run_ranks
from oracle import Attention, MaskFn, assert_within_budget, dense_attention

NAN = float("nan")
NAMES = ("q", "k", "v", "grad_out", "grad_lse")


def _documents(p: ChunkProblem) -> MaskFn:
    ids = torch.randint(0, 5, (2, p.bounds[-1]), generator=torch.Generator().manual_seed(5)).sort().values
    return cpflex.causal() & cpflex.document(ids)


def _table(p: ChunkProblem) -> MaskFn:
    table = torch.rand(p.bounds[-1], p.bounds[-1], generator=torch.Generator().manual_seed(6)) < 0.3
    return lambda b, h, q, k: table[q, k] & (k <= q)


MASKS: dict[str, Callable[[ChunkProblem], MaskFn]] = {
    "causal": lambda p: cpflex.causal(),
    "window and sinks": lambda p: cpflex.causal() & (cpflex.sliding_window(90) | (lambda b, h, q, k: k < 4)),
    "documents": _documents,
    "random table": _table,
    "by head": lambda p: lambda b, h, q, k: (k <= q) & ((k + h) % 3 != b),
    "own chunk alone": lambda p: lambda b, h, q, k: (k <= q) & (k >= p.bounds[-2]) & (q >= p.bounds[-2]),
}


@dataclass(frozen=True)
class ChunkProblem:
    """`str` of it is a test id."""

    mask: str
    bounds: tuple[int, ...]
    """Where chunks begin, and the end."""
    layout: str = "balanced"
    schedule: str = "auto"
    world_size: int = 2
    ulysses_size: int = 1

    def __str__(self) -> str:
        bounds = "-".join(map(str, self.bounds[1:]))
        return f"{self.mask}-{bounds}-{self.layout}-{self.schedule}-w{self.world_size}a{self.ulysses_size}"

    @property
    def mask_mod(self) -> MaskFn:
        return MASKS[self.mask](self)

    def tensors(self) -> dict[str, Tensor]:
        length, generator = self.bounds[-1], torch.Generator().manual_seed(sum(self.bounds))
        sizes = {"q": (4, length, 16), "k": (2, length, 16), "v": (2, length, 24)}
        sizes |= {"grad_out": (4, length, 24), "grad_lse": (4, length)}
        return {name: torch.randn(2, *size, generator=generator) for name, size in sizes.items()}

    def captured(self) -> Tensor:
        """By distance, as long as the sequence, and no longer."""
        made = torch.randn(self.bounds[-1], generator=torch.Generator().manual_seed(1))
        return made.requires_grad_()

    def dense(self, precision: torch.dtype = torch.float64) -> Attention:
        named = self.tensors()
        return dense_attention(
            *(named[name] for name in NAMES), self.mask_mod, biased, [self.captured()], precision=precision
        )


def biased(bias: Tensor) -> Any:
    """Looked up where the query is and where the key is."""
    return lambda s, b, h, q, k: s + bias[q] * bias[k]


def attend(group: Any, problem: ChunkProblem, **options: Any) -> dict[str, Tensor | list[int]]:
    """Whole results. Pads of every input hold NaN, those of chunks long past too."""
    local, plans, results = {name: [] for name in NAMES}, [], []
    captured, planned = problem.captured(), options_of(problem.schedule)
    for begin, end in pairwise(problem.bounds):
        plan = cpflex.make_plan(
            cpflex.cached(problem.mask_mod, plans), end - begin, group, start=begin, layout=LAYOUTS[problem.layout],
            batch_size=2, num_heads=4, ulysses_size=problem.ulysses_size, **planned,
        )  # fmt: skip
        for name, x in problem.tensors().items():
            shard = plan.shard(x[:, :, begin:end], dim=2, pad_value=NAN)
            local[name].append(shard.requires_grad_(name in "qkv"))
        keys, values = (torch.cat(local[name], dim=2) for name in "kv")
        results += cpflex.flex_attention(
            local["q"][-1], keys, values, biased(captured), plan, enable_gqa=True, return_lse=True, **options
        )
        plans.append(plan)
    inputs = [*local["q"], *local["k"], *local["v"], captured]
    given = [x for both in zip(local["grad_out"], local["grad_lse"], strict=True) for x in both]
    *grads, d_captured = torch.autograd.grad(results, inputs, given)

    def whole(parts: list[Tensor]) -> Tensor:
        for plan, part in zip(plans, parts, strict=True):
            at_pads = part[:, :, plan.positions >= plan.layout.end]
            assert not at_pads.nan_to_num(neginf=0).any(), "nothing may come out at pads"
        return torch.cat([plan.unshard(part.detach(), dim=2) for plan, part in zip(plans, parts, strict=True)], dim=2)

    found: dict[str, Any] = {"out": whole(results[::2]), "lse": whole(results[1::2]), "d_captured": d_captured}
    for index, name in enumerate(("dq", "dk", "dv")):
        found[name] = whole(list(grads[index * len(plans) : (index + 1) * len(plans)]))
    return found | {"unproven": [plan.stats["unproven_tiles"] for plan in plans]}


def on_threads(problem: ChunkProblem, **options: Any) -> list[dict[str, Any]]:
    def on_rank(group: ThreadLinks) -> dict[str, Any]:
        with torch.autograd.set_multithreading_enabled(False):
            return attend(group, problem, **options)

    return run_ranks(on_rank, world_size=problem.world_size)


def assert_right(problem: ChunkProblem, results: list[dict[str, Any]]) -> None:
    """On every rank; gradients of captured tensors are summed."""
    reference, exact = problem.dense(torch.float32), problem.dense()
    summed = torch.stack([result["d_captured"] for result in results]).sum(dim=0)
    for result in results:
        named = {name: result[name] for name in ("out", "lse", "dq", "dk", "dv")}
        assert_within_budget(Attention(**named, d_captured=[summed]), reference, exact)

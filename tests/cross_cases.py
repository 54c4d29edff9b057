"""Attention of queries to another sequence: a table of masks, problems, and how the ranks of a group compute them.

Drawn masks and shapes are in fuzz.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import cpflex
from cases import DIMS, HEADS, LAYOUTS, options_of
from cpflex.testing import ThreadLinks, run_ranks
from oracle import Attention, MaskFn, ScoreFn, assert_within_budget, dense_attention
from runs import assemble
from runs import attend as attend_with

EVERYWHERE = "everywhere"
REACH = 2000

MASKS: dict[str, Callable[[CrossProblem], MaskFn]] = {
    "full": lambda p: cpflex.full(),
    "monotonic": lambda p: lambda b, h, q, k: k * p.q_len <= q * p.kv_len,
    "band": lambda p: lambda b, h, q, k: (q * p.kv_len - k * p.q_len).abs() <= 40 * p.q_len,
    "images so far": lambda p: p.images_so_far(),
    "documents": lambda p: cpflex.document(p.ids(p.q_len), kv_ids=p.ids(p.kv_len)),
    "varlen": lambda p: cpflex.masks_from.varlen([0, p.q_len // 3, p.q_len], [0, p.kv_len // 2, p.kv_len], causal=True),
    "block diffusion": lambda p: lambda b, h, q, k: (k // 8 < q // 8) | ((k >= p.q_len) & ((k - p.q_len) // 8 == q // 8)),
    "random table": lambda p: p.random_table(),
    "by head and batch": lambda p: lambda b, h, q, k: (k + h) % 3 != b,
    "nothing": lambda p: lambda b, h, q, k: k < 0,
}  # fmt: skip


@dataclass(frozen=True)
class CrossProblem:
    """`str` of it is a test id."""

    mask: str = "full"
    q_len: int = 127
    kv_len: int = 300
    keys: str = "contiguous"
    """Their layout, or `EVERYWHERE`."""
    layout: str = "balanced"
    schedule: str = "auto"
    world_size: int = 2
    heads: str = "gqa"
    dims: str = "d16dv24"
    score: bool = True
    """Distances are looked up in a captured table, which gets a gradient."""
    ulysses_size: int = 1
    batch_size: int = 2

    def __str__(self) -> str:
        sides = f"{self.layout}{self.q_len}-{self.keys}{self.kv_len}"
        score = "-score" if self.score else ""
        return f"{self.mask}-{sides}-{self.schedule}-{self.heads}-{self.dims}{score}-w{self.world_size}a{self.ulysses_size}"

    @property
    def num_heads(self) -> int:
        return HEADS[self.heads][0]

    def generator(self, what: int) -> torch.Generator:
        return torch.Generator().manual_seed(what + 7 * self.q_len + self.kv_len)

    def ids(self, length: int) -> Tensor:
        """Of four documents, by batch."""
        return torch.randint(0, 4, (self.batch_size, length), generator=self.generator(5)).sort().values

    def images_so_far(self) -> MaskFn:
        """Queries see the keys of images before them, as in Flamingo."""
        image_of = torch.randint(0, 6, (self.kv_len,), generator=self.generator(3)).sort().values
        seen = torch.randint(0, 7, (self.q_len,), generator=self.generator(4)).sort().values
        return lambda b, h, q, k: image_of[k] < seen[q]

    def random_table(self) -> MaskFn:
        table = torch.rand(self.q_len, self.kv_len, generator=self.generator(6)) < 0.3
        return lambda b, h, q, k: table[q, k]

    @cached_property
    def mask_mod(self) -> MaskFn:
        return MASKS[self.mask](self)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        (heads, kv_heads), (dim, v_dim) = HEADS[self.heads], DIMS[self.dims]
        sizes = {"q": (heads, self.q_len, dim), "k": (kv_heads, self.kv_len, dim), "v": (kv_heads, self.kv_len, v_dim)}
        sizes |= {"grad_out": (heads, self.q_len, v_dim), "grad_lse": (heads, self.q_len)}
        generator = self.generator(0)
        return {name: torch.randn(self.batch_size, *size, generator=generator) for name, size in sizes.items()}

    def captured(self) -> list[Tensor]:
        made = torch.randn(2 * REACH + 1, generator=torch.Generator().manual_seed(1))
        return [made.requires_grad_()] if self.score else []

    def score_mod(self, captured: Sequence[Tensor]) -> ScoreFn | None:
        if not captured:
            return None
        bias = captured[0]
        return lambda s, b, h, q, k: s + bias[(q - k).clamp(-REACH, REACH) + REACH]

    def dense(self, precision: torch.dtype = torch.float64) -> Attention:
        named = [self.tensors[name] for name in ("q", "k", "v", "grad_out", "grad_lse")]
        score = self.score_mod if self.score else None
        return dense_attention(
            *named, self.mask_mod, (lambda *x: score(x)) if score else None, self.captured(), precision=precision
        )

    def plans(self, group: Any = None, **options: Any) -> tuple[cpflex.Plan, cpflex.Plan | None]:
        """Of the queries, whose kinds are "self" and "cross", and of the keys."""
        options |= {"ulysses_size": self.ulysses_size}
        keys = None
        if self.keys != EVERYWHERE:
            keys = cpflex.make_plan(cpflex.full(), self.kv_len, group, layout=LAYOUTS[self.keys], **options)
        masks = {
            "self": cpflex.causal(),
            "cross": cpflex.cross(self.mask_mod, self.kv_len if keys is None else keys),
        }
        options |= options_of(self.schedule) | {"batch_size": self.batch_size, "num_heads": self.num_heads}
        return cpflex.make_plan(masks, self.q_len, group, layout=LAYOUTS[self.layout], **options), keys


def attend(group: Any, problem: CrossProblem) -> dict[str, Any]:
    """Local results and their positions."""
    plan, keys = problem.plans(group)
    return attend_with(plan["cross"], keys, problem)


def on_threads(problem: CrossProblem) -> list[dict[str, Any]]:
    def on_rank(group: ThreadLinks) -> dict[str, Any]:
        with torch.autograd.set_multithreading_enabled(False):
            return attend(group, problem)

    return run_ranks(on_rank, world_size=problem.world_size)


def assert_right(problem: CrossProblem, results: list[dict[str, Any]]) -> None:
    assert_within_budget(assemble(results), problem.dense(torch.float32), problem.dense())

"""Attention of queries to another sequence: problems, how the ranks of a group compute them, and how the results are
put together again. As many drawn ones as wanted, on threads, against dense attention in float64:

    python tests/cross_cases.py --cases 1000 --seed 0
"""

from __future__ import annotations

import argparse
import random
import time
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

NAN = float("nan")
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

    @classmethod
    def drawn(cls, seed: int) -> CrossProblem:
        pick = random.Random(seed).choice
        return cls(
            pick(list(MASKS)),
            pick([1, 5, 64, 127, 300, 700]),
            pick([1, 7, 100, 321, 900, 1500]),
            pick([*LAYOUTS, EVERYWHERE]),
            pick(list(LAYOUTS)),
            pick(["ring", "ring:both", "direct", "auto", "even:3", "gather", "relay:2", "striped:1/2"]),
            pick([1, 2, 3, 4]),
            pick(list(HEADS)),
            pick(list(DIMS)),
            pick([True, False]),
        )

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


def attend(group: Any, problem: CrossProblem, **options: Any) -> dict[str, Any]:
    """Local results and their positions. Pads of every input hold NaN."""
    plan, keys = problem.plans(group)
    cross = plan["cross"]
    local = {}
    for name, x in problem.tensors.items():
        of = keys if name in "kv" else plan
        local[name] = x.clone() if of is None else of.shard(x, dim=2, pad_value=NAN)
        local[name].requires_grad_(name in "qkv")
    captured = problem.captured()
    out, lse = cpflex.flex_attention(
        *(local[name] for name in "qkv"),
        score_mod=problem.score_mod(captured),
        block_mask=cross,
        enable_gqa=True,
        return_lse=True,
        **options,
    )
    inputs = [local["q"], local["k"], local["v"], *captured]
    dq, dk, dv, *d_captured = torch.autograd.grad((out, lse), inputs, (local["grad_out"], local["grad_lse"]))
    found = {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv, "d_captured": d_captured}
    found["unproven"] = cross.stats["unproven_tiles"]
    return found | {"q_positions": plan.positions, "kv_positions": None if keys is None else keys.positions}


def assemble(results: Sequence[dict[str, Any]], problem: CrossProblem) -> Attention:
    """Global results; gradients of captured tensors, and of keys that all ranks hold, are summed. Nothing may have come
    out at pads.
    """
    whole: dict[str, Any] = {}
    for name in ("out", "lse", "dq", "dk", "dv"):
        parts = [r[name] for r in results]
        axis, length = ("kv", problem.kv_len) if name in ("dk", "dv") else ("q", problem.q_len)
        positions = [r[f"{axis}_positions"] for r in results]
        if positions[0] is None:
            whole[name] = torch.stack(parts).sum(dim=0)
            continue
        joined = torch.cat(parts, dim=2)[:, :, torch.cat(positions).argsort()]
        at_pads = joined[:, :, length:]
        torch.testing.assert_close(at_pads, torch.full_like(at_pads, -torch.inf if name == "lse" else 0.0))
        whole[name] = joined[:, :, :length]
    summed = [torch.stack(parts).sum(dim=0) for parts in zip(*(r["d_captured"] for r in results), strict=True)]
    return Attention(**whole, d_captured=summed)


def on_threads(problem: CrossProblem) -> list[dict[str, Any]]:
    def on_rank(group: ThreadLinks) -> dict[str, Any]:
        with torch.autograd.set_multithreading_enabled(False):
            return attend(group, problem)

    return run_ranks(on_rank, world_size=problem.world_size)


def assert_right(problem: CrossProblem, results: list[dict[str, Any]]) -> None:
    assert_within_budget(assemble(results, problem), problem.dense(torch.float32), problem.dense())


def main() -> int:
    parser = argparse.ArgumentParser(description="Drawn attentions to another sequence, against dense attention.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, wrong = time.monotonic(), 0
    for seed in range(options.seed, options.seed + options.cases):
        problem = CrossProblem.drawn(seed)
        try:
            assert_right(problem, on_threads(problem))
        except Exception as error:  # noqa: BLE001 - any error is a wrong case
            wrong += 1
            print(f"seed {seed}: {problem!r}: {error}", flush=True)
    print(f"{options.cases} cases, {wrong} wrong, {time.monotonic() - began:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())

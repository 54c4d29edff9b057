"""Random attentions against the dense float64 oracle, forward and all gradients: any mask, any score_mod, any plan.

A `Case` is a complete Python expression of itself. Failures shrink to a small one, printed as code to run again:

    python tests/fuzz.py --cases 10000 --seed 0 --record benchmarks/results/fuzz.json
    python tests/fuzz.py --rectangles --cases 1000 --seed 0 --record benchmarks/results/fuzz_cross.json
    python tests/fuzz.py --replay 'Case(mask="lambda b, h, q, k: k <= q", seq_len=33, world_size=2)'
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import cpflex
from cases import DTYPES, LAYOUTS, SCHEDULES, options_of
from cpflex.mods.graph import Graph
from cpflex.mods.trace import trace_mask_mod, trace_score_mod
from cpflex.ring.heads import why_not_divided
from cpflex.testing import run_ranks
from cross_cases import EVERYWHERE
from oracle import Attention, MaskFn, ScoreFn, assert_within_budget, dense_attention
from runs import assemble, attend

CASES_PER_BATCH = 200

# -- cases

TABLE_DTYPES = {name: getattr(torch, name) for name in ("bool", "uint8", "int8", "int16", "int32", "int64")}
TABLE_DTYPES |= {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


def _code(x: Any) -> str:
    """The expression that makes a dataclass, less what is as in the simplest one."""
    fields = ((f, getattr(x, f.name)) for f in dataclasses.fields(x))
    texts = (
        (f.name, json.dumps(value) if isinstance(value, str) else repr(value))
        for f, value in fields
        if value != f.default
    )
    return f"{type(x).__name__}({', '.join(f'{name}={text}' for name, text in texts)})"


@dataclass(frozen=True)
class Table:
    """A tensor that a mod captures: document ids that rise, or numbers of a dtype."""

    shape: tuple[int, ...]
    dtype: str = "int64"
    rising: bool = False
    parents: bool = False
    """Of tokens in a tree: mostly the one before, else any earlier one or none."""
    special: bool = False
    """With NaN and infinities."""
    grad: bool = False
    seed: int = 0

    def tensor(self) -> Tensor:
        random = torch.Generator().manual_seed(self.seed)
        dtype = TABLE_DTYPES[self.dtype]
        if dtype.is_floating_point:
            made = torch.randn(self.shape, generator=random)
            if self.special:
                made.view(-1)[::3] = torch.tensor(float("nan"))
                made.view(-1)[1::3] = torch.tensor(-float("inf"))
        elif self.rising:
            made = (torch.rand(self.shape, generator=random) < 0.1).cumsum(dim=-1)
        elif self.parents:
            token, (far, anywhere) = torch.arange(*self.shape), torch.rand(2, *self.shape, generator=random)
            made = torch.where(far < 0.2, (anywhere * (token + 1)).long() - 1, token - 1)
        elif dtype == torch.bool:
            made = torch.rand(self.shape, generator=random) < 0.5
        else:
            made = torch.randint(0 if dtype == torch.uint8 else -20, 60, self.shape, generator=random)
        return made.to(dtype).requires_grad_(self.grad)

    def __repr__(self) -> str:
        return _code(self)


@dataclass(frozen=True)
class Case:
    """One attention and how it is computed. Mods are Python text, in which captured tables are t0, t1, ..."""

    mask: str = "lambda b, h, q, k: k <= q"
    score: str = ""
    tables: tuple[Table, ...] = ()
    seq_len: int = 1
    world_size: int = 1
    layout: str = "contiguous"
    schedule: str = "ring"
    batch_size: int = 1
    heads: tuple[int, int] = (1, 1)  # Hq, H
    dims: tuple[int, int] = (8, 8)  # D, Dv
    dtype: str = "fp32"
    beside: str = ""
    """Another mask kind that shares the layout."""
    stored: bool = False
    """The plan was bytes on its way to the group."""
    seed: int = 0
    ulysses_size: int = 1
    kv_len: int = 0
    """Of another sequence of keys; 0: they are the queries' own."""
    keys: str = ""
    """Their layout, or `EVERYWHERE`."""
    packed: bool = False
    """q, k and v are [T, H, D]."""

    def __repr__(self) -> str:
        return _code(self)

    @cached_property
    def names(self) -> dict[str, Any]:
        """What the texts of mods may say."""
        return {"torch": torch, "cpflex": cpflex, **{f"t{i}": table.tensor() for i, table in enumerate(self.tables)}}

    @cached_property
    def mask_mod(self) -> MaskFn:
        return eval(self.mask, self.names)

    @cached_property
    def seen(self) -> Tensor:
        """The mask as torch itself computes it, [B, Hq, S, S_kv]."""
        sides = [torch.arange(n) for n in (self.batch_size, self.heads[0], self.seq_len, self.kv_len or self.seq_len)]
        b, h, q, k = (x.view([-1] + [1] * (3 - dim)) for dim, x in enumerate(sides))
        return self.mask_mod(b, h, q, k).expand([len(x) for x in sides])

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Tables of floats that the score_mod reads: they are in the precision of the oracle."""
        read = [i for i in range(len(self.tables)) if f"t{i}" in self._words]
        return tuple(i for i in read if TABLE_DTYPES[self.tables[i].dtype].is_floating_point)

    @property
    def _words(self) -> frozenset[str]:
        return frozenset(compile(self.score, "score", "eval").co_consts[0].co_names) if self.score else frozenset()

    def captured(self) -> list[Tensor]:
        """Fresh leaves: each rank has its own, as processes would."""
        return [self.tables[i].tensor() for i in self.leaves]

    def score_mod(self, captured: Sequence[Tensor]) -> ScoreFn | None:
        if not self.score:
            return None
        return eval(self.score, self.names | {f"t{i}": x for i, x in zip(self.leaves, captured, strict=True)})

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """q, k, v, grad_out [B, H, S, D] and grad_lse [B, Hq, S]."""
        (num_heads, kv_heads), (dim, v_dim) = self.heads, self.dims
        q_len, kv_len = self.seq_len, self.kv_len or self.seq_len
        sizes = {"q": (num_heads, q_len, dim), "k": (kv_heads, kv_len, dim), "v": (kv_heads, kv_len, v_dim)}
        random = torch.Generator().manual_seed(self.seed)
        made = {
            name: torch.randn(self.batch_size, *size, generator=random).to(DTYPES[self.dtype])
            for name, size in (sizes | {"grad_out": (num_heads, q_len, v_dim)}).items()
        }
        return made | {"grad_lse": torch.randn(self.batch_size, num_heads, self.seq_len, generator=random)}

    def plans(self, group: Any) -> tuple[cpflex.Plan, cpflex.Plan | None]:
        """Of the attention, and of what shards its keys; None if each rank holds them all."""
        where: dict[str, Any] = (
            {"rank": group.rank, "world_size": group.world_size} if self.stored else {"group": group}
        )
        where["ulysses_size"] = self.ulysses_size
        keys, mask = None, self.mask_mod
        if self.kv_len:
            if self.keys != EVERYWHERE:
                keys = cpflex.make_plan(cpflex.full(), self.kv_len, layout=LAYOUTS[self.keys], **where)
            mask = cpflex.cross(mask, keys or self.kv_len)
        options = options_of(self.schedule)
        if "topology" in options:
            options["heads"] = cpflex.Heads(*self.heads, self.dims[0])
        masks = {"mask": mask} | ({"beside": eval(self.beside, self.names)} if self.beside else {})
        plan = cpflex.make_plan(
            masks, self.seq_len, **where, batch_size=self.batch_size, num_heads=self.heads[0],
            layout=LAYOUTS[self.layout], **options,
        )  # fmt: skip
        if self.stored:
            plan = cpflex.Plan.from_bytes(plan.to_bytes()).bind(group)
        return plan["mask"], keys if self.kv_len else plan["mask"]

    def plan(self, group: Any) -> cpflex.Plan:
        return self.plans(group)[0]

    def dense(self, precision: torch.dtype) -> Attention:
        captured = self.captured()
        found = dense_attention(
            **self.tensors,
            mask_mod=lambda b, h, q, k: self.seen[b, h, q, k],
            score_mod=(lambda *captured: self.score_mod(captured)) if self.score else None,
            captured=captured,
            precision=precision,
        )
        for attention in filter(None, (found, found.terms)):
            attention.d_captured = [d for d, x in zip(attention.d_captured, captured, strict=True) if x.requires_grad]
        return found

    def features(self) -> Iterator[tuple[str, Any]]:
        """What a record counts."""
        yield from (("world_size", self.world_size), ("layout", self.layout), ("schedule", self.schedule))
        yield from (
            ("dtype", self.dtype),
            ("heads", f"{self.heads[0]} over {self.heads[1]}"),
            ("batch_size", self.batch_size),
        )
        yield "seq_len", _at_most(self.seq_len)
        if self.kv_len:
            yield from (("kv_len", _at_most(self.kv_len)), ("layout of the keys", self.keys))
            yield "tensors", "[T, H, D]" if self.packed else "[B, H, S, D]"
        yield "dims", "equal" if self.dims[0] == self.dims[1] else "Dv differs"
        yield "plan", "stored" if self.stored else "made in place"
        yield "ranks that exchange heads", self.ulysses_size
        yield "mask kinds", 2 if self.beside else 1
        yield "captured tensors with gradients", sum(self.tables[i].grad for i in self.leaves)
        visible = self.seen.any(dim=-1)
        yield "mask", "nothing" if not visible.any() else "everything" if self.seen.all() else "some queries see nothing" if not visible.all() else "every query sees some"  # fmt: skip
        yield from (("op in masks", op) for op in _ops(trace_mask_mod(self.mask_mod).graph))
        score_mod = self.score_mod(self.captured())
        yield from (
            ("op in score_mods", op)
            for op in (_ops(trace_score_mod(score_mod).graph) if score_mod else ["no score_mod"])
        )


def _at_most(length: int) -> str:
    return f"up to {next(n for n in (1, 16, 64, 128, 256, 512) if length <= n)}"


def _ops(graph: Graph) -> set[str]:
    return {node.op for node in graph.nodes} - {"input", "const", "captured"}


def attend_on_rank(group: Any, case: Case) -> dict[str, Any]:
    return attend(*case.plans(group), case, packed=case.packed)


Errors = dict[str, tuple[float, float]]
"""Of each result: its error, and its budget."""


def check(case: Case) -> Errors:
    """All ranks compute what one dense attention does, within the error of its own precision; none of them hangs."""
    return compare(case, run_ranks(partial(attend_on_rank, case=case), case.world_size, timeout=60))


def compare(case: Case, results: Sequence[dict[str, Any]]) -> Errors:
    return assert_within_budget(assemble(results), case.dense(torch.float32), case.dense(torch.float64))


# -- random mods, as text: i an integer of int64, x a float, c a bool
#
# Both sides compute the same mask if every operation has one right result: floats in masks are added, multiplied,
# divided, rounded and compared, no more. Score_mods are smooth in the score and do not magnify its error.

INT_OF_ONE = ["(-{i})", "{i}.abs()", "(~{i})", "torch.sign({i})", "({i} * {i})", "({i} ** 3)", "({i} == 3).long()"]
INT_OF_ONE += [f"{{i}}.to(torch.{dtype}).long()" for dtype in ("int8", "uint8", "int16", "int32")]
INT_AND_NUMBER = [
    "({i} + {n})",
    "({i} - {n})",
    "({n} - {i})",
    "({i} * {n})",
    "({i} // {n})",
    "({i} % {n})",
    "({i} & {n})",
]
INT_AND_NUMBER += [
    "({i} | {n})",
    "({i} ^ {n})",
    "torch.fmod({i}, {n})",
    "({i} // -{n})",
    "({i} % -{n})",
    "({i} >> {bits})",
]
INT_AND_NUMBER += [
    "torch.div({i}, {n}, rounding_mode='trunc')",
    "{i}.clamp(min={n})",
    "{i}.clamp(-{n}, {n})",
    "({i} << {bits})",
]
INT_OF_TWO = [
    "({i} + {j})",
    "({i} - {j})",
    "({i} * {j})",
    "({i} & {j})",
    "({i} | {j})",
    "({i} ^ {j})",
    "torch.maximum({i}, {j})",
]
INT_OF_TWO += [
    "torch.minimum({i}, {j})",
    "({i} // ({j} % 7 + 1))",
    "({i} % ({j} % 7 + 1))",
    "torch.fmod({i}, {j} % 7 - 8)",
]
INT_OF_TWO += ["({i} << ({j} & 7))", "({i} >> ({j} & 7))", "torch.where({c}, {i}, {j})"]
FLOAT_OF_ONE = ["(-{x})", "{x}.abs()", "torch.sign({x})", "torch.floor({x})", "torch.ceil({x})", "torch.round({x})"]
FLOAT_OF_ONE += [
    "torch.trunc({x})",
    "torch.sqrt({x})",
    "torch.relu({x})",
    "{x}.bfloat16().float()",
    "{x}.half().float()",
]
FLOAT_AND_NUMBER = [
    "({x} + {f})",
    "({x} - {f})",
    "({f} - {x})",
    "({x} * {f})",
    "({x} / {f})",
    "({f} / {x})",
    "{x}.clamp(max={f})",
]
FLOAT_OF_TWO = [
    "({x} + {y})",
    "({x} - {y})",
    "({x} * {y})",
    "({x} / {y})",
    "torch.maximum({x}, {y})",
    "torch.where({c}, {x}, {y})",
]
COMPARE = ["<", "<=", ">", ">=", "==", "!="]
LOGIC = [
    "({c} & {d})",
    "({c} | {d})",
    "({c} ^ {d})",
    "(~{c})",
    "torch.where({c}, {d}, {e})",
    "({c} == {d})",
    "torch.logical_or({c}, {d})",
]
KNOWN = [
    "(k <= q)",
    "(q - k < {n})",
    "((q - k).abs() <= {n})",
    "(k < {n})",
    "(q // {n} == k // {n})",
    "(q // {n} >= k // {n})",
]
KNOWN += ["((q - k) % {n} == 0)", "((q ^ k) < {n})", "(k >= 0)", "(q < 0)", "(q + k < {n})"]
LIBRARY = [
    "cpflex.causal()",
    "cpflex.full()",
    "cpflex.sliding_window({n})",
    "cpflex.sliding_window({n}, {n})",
    "cpflex.prefix_lm({n})",
]
LIBRARY += ["cpflex.document({documents})"]
LIBRARY_OF_ONE = ["cpflex.tree({parents})", "cpflex.prefix_lm({n}, positions={positions})"]
LIBRARY_OF_ONE += ["cpflex.sliding_window({n}, positions={positions})"]
OF_TWO = ["(k * {Q} <= q * {K})", "((q * {K} - k * {Q}).abs() <= {n} * {Q})", "(k <= q + ({K} - {Q}))"]
OF_TWO += ["(k // {n} < q // {n})", "(k >= {Q})"]
LIBRARY_OF_TWO = ["cpflex.document({documents})"] * 2
LIBRARY_OF_TWO += ["cpflex.masks_from.varlen({cu_q}, {cu_k}, causal={yes}, window_size=({n}, -1))"]
LIBRARY_OF_TWO += ["cpflex.masks_from.varlen({cu_q}, {cu_k}, causal={yes})"]
SMOOTH = ["(3.0 * torch.tanh({x} / 3.0))", "torch.sin({x})", "torch.cos({x})", "torch.erf({x})", "torch.sigmoid({x})"]
SMOOTH += ["torch.sqrt({x} * {x} + 1.0)", "torch.log1p({x} * {x})", "torch.exp(-{x} * {x})", "torch.exp2(-{x} * {x})"]
SMOOTH += [
    "({x} / ({x} * {x} + 1.0))",
    "torch.rsqrt({x} * {x} + 1.0)",
    "torch.nn.functional.gelu({x})",
    "torch.expm1(-{x} * {x})",
]
SMOOTH += [
    "torch.nn.functional.silu({x})",
    "torch.log2({x} * {x} + 2.0)",
    "({x} + 0.5 * {x}.detach())",
    "torch.log({x} * {x} + 1.0)",
]
SMOOTH += ["(({x} * {x} + 1.0) ** 0.5)"]
BIAS = [
    "({x} + {t})",
    "({x} * torch.sigmoid({t}))",
    "({x} * {t} / 4.0)",
    "({x} - {t} * 0.01 * (q - k).abs())",
    "({x} / ({t} * {t} + 1.0))",
]
BIAS += [
    "({x} + torch.tanh({t}) * torch.sigmoid({u}))",
    "torch.atan2({x}, {t} * {t} + 1.0)",
    "({x} + {i}.clamp(-9, 9) * 0.1)",
]
BIAS += [
    "torch.where({c}, {x}, {t})",
    "torch.where({c}, {x}, {x} * 0.5)",
    "({x} * torch.log(q + 2.0) / 6.0)",
    "({x} - 0.05 * (q - k).abs())",
]
BIAS += [
    "({x} * torch.cos((q - k) * 0.1))",
    "({x} + {t}.abs())",
    "({x} + torch.maximum({t}, {u}))",
    "({x} + {t}.clamp(-0.5, 0.5))",
]
NUMBERS = [1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 40, 64, 100]
FLOATS = ["0.1", "0.5", "1.0", "2.0", "3.7", "16.0", "40.0"]
SPANS = {"q": "seq_len", "k": "seq_len", "b": "batch_size", "h": "num_heads"}


class _Mods:
    """Draws the texts of mods; their tables have the sizes of one case."""

    def __init__(self, draw: Callable, seq_len: int, batch_size: int, num_heads: int, kv_len: int = 0) -> None:
        self.draw = draw
        self.sizes = {"q": seq_len, "k": kv_len or seq_len, "b": batch_size, "h": num_heads}
        self.known = KNOWN + OF_TWO if kv_len else KNOWN
        self.library = LIBRARY + (LIBRARY_OF_TWO if kv_len else LIBRARY_OF_ONE)
        self.is_square = not kv_len
        self.tables: list[Table] = []

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def fill(self, form: str, depth: int) -> str:
        """The form with each placeholder drawn once."""
        tokens = [(self.sizes["q"],), (self.sizes["b"], self.sizes["q"])]
        makers = {
            **dict.fromkeys("ij", lambda: self.int(depth - 1)),
            **dict.fromkeys("xy", lambda: self.float(depth - 1)),
            **dict.fromkeys("cde", lambda: self.bool(depth - 1)),
            **dict.fromkeys("tu", lambda: self.learned(depth - 1)),
            "n": lambda: str(self.pick(NUMBERS)),
            "f": lambda: self.pick(FLOATS),
            "bits": lambda: str(self.pick([0, 1, 3, 8])),
            "positions": lambda: self.table(self.pick(tokens), self.pick(["int64", "int16"])),
            "parents": lambda: self.table((self.sizes["q"],), "int64", parents=True),
            "documents": lambda: self.documents(self.pick([(), (self.sizes["b"],)]), "int64"),
            "yes": lambda: str(self.pick([False, True])),
            "cu_q": lambda: self.bounds("q"),
            "cu_k": lambda: self.bounds("k"),
            "Q": lambda: str(self.sizes["q"]),
            "K": lambda: str(self.sizes["k"]),
        }
        return form.format_map({name: make() for name, make in makers.items() if f"{{{name}}}" in form})

    def table(self, shape: tuple[int, ...], dtype: str, **options: Any) -> str:
        self.tables.append(Table(shape, dtype, **options, seed=self.draw(st.integers(0, 99))))
        return f"t{len(self.tables) - 1}"

    def documents(self, batch: tuple[int, ...], dtype: str, between: str = ", kv_ids=") -> str:
        """Of the queries, and of the keys if these are another sequence."""
        q_ids = self.table((*batch, self.sizes["q"]), dtype, rising=True)
        if self.is_square:
            return q_ids
        return f"{q_ids}{between}{self.table((*batch, self.sizes['k']), dtype, rising=True)}"

    def bounds(self, axis: str) -> str:
        """cu_seqlens of three sequences, empty ones among them."""
        cuts = sorted(self.draw(st.integers(0, self.sizes[axis])) for _ in range(2))
        return str([0, *cuts, self.sizes[axis]])

    def gather(self, dtype: str, depth: int, **options: Any) -> str:
        """One element: at a position as it is, or anywhere within, counted from either end."""
        shape, indices = [], []
        for _ in range(self.pick([1, 1, 1, 2, 0])):
            if depth <= 0 or self.draw(st.booleans()):
                name = self.pick("qkqkhb")
                shape.append(self.sizes[name])
                indices.append(name)
                continue
            size, i = self.pick([1, 2, 5, 16]), self.int(depth - 1)
            shape.append(size)
            indices.append(self.pick([f"{i} % {size}", f"{i} % {size} - {size}", f"{i}.clamp({-size}, {size - 1})"]))
        name = self.table(tuple(shape), dtype, **options)
        return f"{name}[{', '.join(indices)}]" if indices else name

    def learned(self, depth: int) -> str:
        grad = self.pick([True, True, False])
        dtype = "float32" if grad else self.pick(["float32", "bfloat16", "float16", "float64"])
        # what is computed in 16 bits would be as coarse, and the oracle is not
        return self.gather(dtype, depth, grad=grad) + (".to(score.dtype)" if dtype.endswith("16") else "")

    def int(self, depth: int) -> str:
        form = self.pick(["leaf"] if depth <= 0 else ["leaf", "one", "number", "number", "two", "gather"])
        if form == "leaf":
            return self.pick(["q", "k", "(q - k)", "(k - q)", "h", "b"])
        if form == "gather":
            return self.gather(self.pick(["int64", "int32", "int16", "int8", "uint8"]), depth) + ".long()"
        return self.fill(self.pick({"one": INT_OF_ONE, "number": INT_AND_NUMBER, "two": INT_OF_TWO}[form]), depth)

    def float(self, depth: int) -> str:
        form = self.pick(["cast"] if depth <= 0 else ["cast", "one", "number", "two", "gather"])
        if form == "cast":
            return f"{self.int(depth - 1)}.float()"
        if form == "gather":
            dtype = self.pick(["float32", "float16", "bfloat16", "float64"])
            return self.gather(dtype, depth, special=self.pick([False, False, True])) + ".float()"
        return self.fill(self.pick({"one": FLOAT_OF_ONE, "number": FLOAT_AND_NUMBER, "two": FLOAT_OF_TWO}[form]), depth)

    def bool(self, depth: int) -> str:
        form = self.pick(
            ["known"] if depth <= 0 else ["known", "known", "logic", "logic", "int", "float", "gather", "documents"]
        )
        if form == "known":
            return self.fill(self.pick(self.known), depth)
        if form == "logic":
            return self.fill(self.pick(LOGIC), depth)
        if form == "gather":
            return self.gather("bool", depth)
        if form == "documents":
            q_ids, _, k_ids = self.documents((), self.pick(["int64", "int32"]), " ").partition(" ")
            return f"({q_ids}[q] == {k_ids or q_ids}[k])"
        make, numbers = (self.int, NUMBERS) if form == "int" else (self.float, FLOATS)
        other = str(self.pick(numbers)) if self.draw(st.booleans()) else make(depth - 1)
        return f"({make(depth - 1)} {self.pick(COMPARE)} {other})"

    def mask(self, depth: int) -> str:
        """A plain callable, masks of the library, or both together."""
        form = self.pick(["plain", "library", "both"])
        plain = f"lambda b, h, q, k: {self.bool(depth)}" if form != "library" else ""
        if form == "plain":
            return plain
        known = self.fill(self.pick(self.library), depth)
        other = f"({plain})" if form == "both" else self.fill(self.pick(self.library), depth)
        return self.pick(["{} & {}", "{} | {}", "~{} & {}", "{} & ~({} & cpflex.full())"]).format(known, other)

    def score(self) -> str:
        steps = self.pick([0, 1, 1, 2, 3])
        if steps == 0:
            return ""
        x = "score"
        for _ in range(steps):
            form = self.pick(SMOOTH if self.draw(st.booleans()) else BIAS)
            x = self.fill(form.replace("{x}", "<x>"), 2).replace("<x>", x)
        if self.pick([False] * 5 + [True]):
            x = self.fill("torch.where({c}, <x>, -torch.inf)", 1).replace("<x>", x)
        return f"lambda score, b, h, q, k: {x}"


@st.composite
def cases(draw: Callable, worlds: Sequence[int] = tuple(range(1, 9)), rectangles: bool = False) -> Case:
    """Attentions to the same sequence, or to another one."""
    lengths = [
        st.integers(1, 20),
        st.integers(1, 100),
        st.integers(1, 100),
        st.integers(100, 200),
        st.integers(200, 330),
    ]
    seq_len = draw(st.one_of(lengths))
    kv_heads, group_size, batch_size = (
        draw(st.sampled_from([1, 1, 2])),
        draw(st.sampled_from([1, 1, 2, 3])),
        draw(st.sampled_from([1, 1, 2])),
    )
    kv_len = draw(st.one_of(lengths)) if rectangles else 0
    mods = _Mods(draw, seq_len, batch_size, kv_heads * group_size, kv_len)
    mask, score = mods.mask(draw(st.sampled_from([1, 2, 3]))), mods.score()
    beside = ""
    if draw(st.sampled_from([False] * 4 + [True])):
        square = _Mods(draw, seq_len, batch_size, kv_heads * group_size)
        square.tables = mods.tables
        beside = square.mask(1)
    heads, world_size = (kv_heads * group_size, kv_heads), draw(st.sampled_from(worlds))
    case = Case(
        mask, score, tuple(mods.tables), seq_len,
        world_size=world_size,
        layout=draw(st.sampled_from(list(LAYOUTS))),
        schedule=draw(st.sampled_from(list(SCHEDULES))),
        batch_size=batch_size,
        heads=heads,
        dims=draw(st.sampled_from([(8, 8), (16, 16), (8, 24), (1, 3)])),
        dtype=draw(st.sampled_from(list(DTYPES))),
        beside=beside,
        stored=draw(st.sampled_from([False] * 7 + [True])),
        seed=draw(st.integers(0, 9)),
        kv_len=kv_len,
        keys=draw(st.sampled_from([*LAYOUTS, EVERYWHERE])) if rectangles else "",
        packed=rectangles and batch_size == 1 and draw(st.booleans()),
    )  # fmt: skip
    if case.keys != EVERYWHERE:
        sizes = [n for n in range(1, world_size + 1) if world_size % n == 0 and not why_not_divided(*heads, n)]
        case = dataclasses.replace(case, ulysses_size=draw(st.sampled_from(sizes)))
    if case.seen.any() or draw(st.sampled_from([False, False, False, True])):
        return case
    return dataclasses.replace(case, mask=f"cpflex.causal() | ({mask})")


# -- running many


@dataclass
class Failure:
    """The smallest case that fails, and how."""

    case: Case
    error: str


@dataclass
class Report:
    """What was tried and what came of it."""

    num_cases: int = 0
    distinct: set[str] = dataclasses.field(default_factory=set)
    failures: list[Failure] = dataclasses.field(default_factory=list)
    worst: dict[str, dict[str, tuple[float, float]]] = dataclasses.field(default_factory=dict)
    """By dtype and result: the largest error, and the largest share of its budget that an error was."""
    features: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)

    def add(self, case: Case) -> None:
        self.num_cases += 1
        self.distinct.add(repr(case))
        for name, value in case.features():
            self.features.setdefault(name, Counter())[str(value)] += 1

    def add_errors(self, case: Case, errors: Errors) -> None:
        worst = self.worst.setdefault(case.dtype, {})
        for name, (error, budget) in errors.items():
            found = (error, error / budget if error else 0.0)
            name = name.partition("[")[0]
            worst[name] = tuple(map(max, worst.get(name, (0.0, 0.0)), found))  # pyright: ignore


def run(
    num_cases: int,
    check: Callable[[Case], Errors | None] = check,
    strategy: st.SearchStrategy[Case] | None = None,
    random_seed: int | None = None,
    report: Report | None = None,
) -> Report:
    """Check random cases up to the first that fails, which is shrunk.

    Args:
        random_seed: None for the same cases at every run.
    """
    report = report or Report()
    tried: list[Case] = []
    errors: list[BaseException] = []

    def body(case: Case) -> None:
        tried.append(case)
        if not errors:
            report.add(case)
        try:
            found = check(case)
        except BaseException as error:
            errors.append(error)
            raise
        if found and not errors:
            report.add_errors(case, found)

    quiet = {
        "database": None,
        "deadline": None,
        "suppress_health_check": list(HealthCheck),
        "report_multiple_bugs": False,
    }
    test = given(strategy if strategy is not None else cases())(body)
    test = settings(
        max_examples=num_cases, derandomize=random_seed is None, phases=[Phase.generate, Phase.shrink], **quiet
    )(test)
    test = test if random_seed is None else seed(random_seed)(test)
    try:
        test()
    except Exception as error:
        if not errors:
            raise
        # hypothesis ends with the smallest one
        report.failures.append(Failure(tried[-1], f"{type(error).__name__}: {error}"))
    return report


def fuzz(num_cases: int, random_seed: int, rectangles: bool = False) -> Report:
    """Batches of cases, each up to its first failure, with their progress."""
    report, began = Report(), time.perf_counter()
    batch = 0
    while report.num_cases < num_cases:
        known = len(report.failures)
        run(
            min(CASES_PER_BATCH, num_cases - report.num_cases),
            strategy=cases(rectangles=rectangles),
            random_seed=random_seed * 1_000_003 + batch,
            report=report,
        )
        batch += 1
        for failure in report.failures[known:]:
            print(f"\nFAILED {failure.error}\n{replay_command(failure.case)}\n", flush=True)
        took = time.perf_counter() - began
        print(f"{report.num_cases:6d} cases, {len(report.failures)} failures, {took:.0f} s", flush=True)
    return report


def replay_command(case: Case) -> str:
    return f"python tests/fuzz.py --replay {shlex.quote(repr(case))}"


def replayed(text: str) -> Case:
    return eval(text, {"Case": Case, "Table": Table})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rectangles", action="store_true", help="keys of another sequence than the queries")
    parser.add_argument("--replay", help="check this one case")
    parser.add_argument("--record", type=Path, help="write what was tried, and what failed, to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote reads as NaN
    if options.replay:
        check(replayed(options.replay))
        print("the case passes")
        return 0
    began = time.perf_counter()
    report = fuzz(options.cases, options.seed, options.rectangles)
    if options.record:
        record = recorded(report, options, time.perf_counter() - began)
        options.record.write_text(json.dumps(record, indent=2) + "\n")
    return 1 if report.failures else 0


def recorded(report: Report, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    which = "--rectangles " if options.rectangles else ""
    return {
        "command": f"python tests/fuzz.py {which}--cases {options.cases} --seed {options.seed} --record {options.record}",
        "cases": report.num_cases,
        "distinct": len(report.distinct),
        "failures": [{"case": repr(f.case), "error": f.error} for f in report.failures],
        "worst": {
            dtype: {name: {"error": error, "of its budget": share} for name, (error, share) in sorted(worst.items())}
            for dtype, worst in sorted(report.worst.items())
        },
        "seconds": round(seconds),
        "cpu_seconds": round(time.process_time()),
        "versions": {"cpflex": cpflex.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "coverage": {
            name: dict(sorted(counts.items(), key=lambda item: (len(item[0]), item[0])))
            for name, counts in report.features.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())

"""Sequences whose keys lie in shuffled pages of one pool, the tables that a launch takes, and what dense attention in float64
gives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import cpflex
from cases import DTYPES
from cpflex.kernels import Call, PageWork, Partials, attend_pages, combine, empty_partials, partials_of, tokens_at_once
from cpflex.mods.trace import trace_mask_mod, trace_score_mod
from oracle import Attention, dense_attention

# B sequences, N new tokens of all, Hq query heads, H heads of keys and values, R rows of the pool, D and Dv head dims

HEADS = {"mha": (2, 2), "gqa": (6, 2), "mqa": (5, 1), "wide": (70, 1)}
MOST_SEQUENCES = 8
PREFIX_PAGES = 2
"""Shared by the sequences 0 and 2."""

SLOPES = torch.tensor([2.0 ** -(i % 9 + 1) for i in range(70)])
BY_SEQUENCE = torch.tensor([9, 0, 40, 3, 0, 11, 2, 5])
BIAS = torch.tensor([[math.sin(7.0 * h + k) for k in range(2048)] for h in range(8)])
ANCESTORS = torch.tensor([0b00001, 0b00011, 0b00101, 0b01011, 0b10101])


def tree(base: int) -> Callable[..., Tensor]:
    """Of the new tokens, which begin at ``base``, each sees its ancestors: 0 - 1 - 3, 0 - 2 - 4."""

    def mask(b, h, q, k):
        seen = (ANCESTORS[(q - base).clamp(0, 4)] >> (k - base).clamp(0, 4)) & 1 == 1
        return (k < base) | (k >= base) & seen

    return mask


MASKS = {
    "causal": lambda: cpflex.causal(),
    "window": lambda: cpflex.causal() & cpflex.sliding_window(24),
    "sinks": lambda: cpflex.causal() & (cpflex.sliding_window(40) | (lambda b, h, q, k: k < 4)),
    "by_head": lambda: lambda b, h, q, k: (k <= q) & ((k + h) % 3 != 0),
    "by_sequence": lambda: lambda b, h, q, k: (k <= q) & (k >= BY_SEQUENCE[b]),
    "late": lambda: lambda b, h, q, k: (k <= q) & (k >= 40),  # nothing for short sequences
    "future": lambda: lambda b, h, q, k: k > q,
    "nothing": lambda: lambda b, h, q, k: k < 0,
    "tree": lambda: tree(30),
}
SCORES = {
    "none": None,
    "softcap": lambda score, b, h, q, k: 5.0 * torch.tanh(score / 5.0),
    "alibi": lambda score, b, h, q, k: score - SLOPES[h] * (q - k).abs(),
    "key_bias": lambda score, b, h, q, k: score + BIAS[h % 8, k],
    "by_sequence": lambda score, b, h, q, k: score * (1.0 + 0.1 * BY_SEQUENCE[b]),
    "nan_where_hidden": lambda score, b, h, q, k: score + 0.01 * torch.log(q - k + 1.0),
}


@dataclass(frozen=True)
class Paged:
    """Lengths of sequences, how many of their last tokens are new, and how pages are cut and dealt."""

    mask: str = "causal"
    score: str = "none"
    lens: tuple[int, ...] = (70, 35, 329, 16, 1)
    new: tuple[int, ...] = (1, 5, 3, 1, 1)
    heads: str = "gqa"
    dims: tuple[int, int] = (16, 24)
    dtype: str = "fp32"
    page_size: int = 16
    pages_per_split: int = 3
    world_size: int = 2
    reserved: int = 2
    """Pages of each sequence that are in its runs already, with no token in them."""
    scale: float | None = None

    def __str__(self) -> str:
        lens = "x".join(map(str, self.lens))
        dims = "x".join(map(str, self.dims))
        return f"{self.mask}-{self.score}-{lens}-{self.heads}-{dims}-{self.dtype}-p{self.page_size}-r{self.world_size}"

    @cached_property
    def pages(self) -> list[list[int]]:
        """Of each sequence: shuffled, but those of the third are neighbours; the last ``reserved`` are empty."""
        counts = [-(-n // self.page_size) + self.reserved for n in self.lens]
        total = sum(counts)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()
        found: list[list[int]] = []
        for s, count in enumerate(counts):
            shares = s == 2 and min(self.lens[0], self.lens[2]) >= PREFIX_PAGES * self.page_size
            own = [order.pop() for _ in range(count - PREFIX_PAGES * shares)]
            found.append((found[0][:PREFIX_PAGES] if shares else []) + (sorted(own) if s == 2 else own))
        return found

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """q [1, Hq, N, D] and the pool, k and v [1, H, R, D]: NaN in every row that no sequence has filled."""
        heads, kv_heads = HEADS[self.heads]
        dtype, num_rows = DTYPES[self.dtype], sum(-(-n // self.page_size) + self.reserved for n in self.lens) * self.page_size  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        made = {"q": torch.randn(1, heads, sum(self.new), self.dims[0], generator=generator).to(dtype)}
        filled = torch.cat([self.rows_of(s) for s in range(len(self.lens))]).unique()
        for name, dim in zip("kv", self.dims, strict=True):
            made[name] = torch.full((1, kv_heads, num_rows, dim), math.nan, dtype=dtype)
            made[name][:, :, filled] = torch.randn(1, kv_heads, len(filled), dim, generator=generator).to(dtype)
        return made

    def rows_of(self, s: int) -> Tensor:
        """Of the pool, of the tokens of a sequence."""
        at = torch.arange(self.lens[s])
        return torch.tensor(self.pages[s])[at // self.page_size] * self.page_size + at % self.page_size

    @property
    def starts(self) -> list[int]:
        """The first new token of each sequence in q, and their end."""
        return [0, *itertools.accumulate(self.new)]

    def work(self, rank: int) -> tuple[PageWork, Tensor]:
        """What a rank computes that has every ``world_size``-th page of each sequence, and the parts of each token."""
        items, runs, parts, num_partials = [], [], torch.zeros(sum(self.new), 3, dtype=torch.int32), 0
        heads, kv_heads = HEADS[self.heads]
        at_once = tokens_at_once(heads // kv_heads)
        for s, pages in enumerate(self.pages):
            mine = [(page, i) for i, page in enumerate(pages) if i % self.world_size == rank]
            splits = [mine[i : i + self.pages_per_split] for i in range(0, max(1, len(mine)), self.pages_per_split)]
            bounds = [self._add_runs(runs, split) for split in splits]
            for first in range(self.starts[s], self.starts[s + 1], at_once):
                end = min(first + at_once, self.starts[s + 1])
                parts[first:end] = torch.tensor([[0, end - first, len(splits)]])
                parts[first:end, 0] = num_partials + torch.arange(end - first)
                for first_run, end_run in bounds:
                    items.append([s, first, end, first_run, end_run, num_partials])
                    num_partials += end - first
        items.append([0, 0, 0, 0, 0, 0])  # of a table that is not full
        positions = torch.cat([torch.arange(n - m, n) for n, m in zip(self.lens, self.new, strict=True)])
        tables = (_int32(items), _int32(runs or [[0, 0, 0]]), positions.int(), _int32(self.lens))
        return PageWork(*tables, max(i[2] - i[1] for i in items), num_partials), parts

    def _add_runs(self, runs: list[list[int]], split: list[tuple[int, int]]) -> tuple[int, int]:
        """Pages and their places in the sequence, as runs of rows that follow one another in both."""
        begin = len(runs)
        for page, place in split:
            first, position = page * self.page_size, place * self.page_size
            last = runs[-1] if len(runs) > begin else [0, -1, 0]
            if last[1] == first and last[2] + last[1] - last[0] == position:
                last[1] += self.page_size
            else:
                runs.append([first, first + self.page_size, position])
        return begin, len(runs)

    def call(self, backend: str) -> Call:
        score = SCORES[self.score]
        mod = None if score is None else trace_score_mod(score)
        scale = 1 / math.sqrt(self.dims[0]) if self.scale is None else self.scale
        return Call(
            trace_mask_mod(MASKS[self.mask]()), scale, mod and mod.graph, mod.captured if mod else (), (), backend
        )

    def partials(self, rank: int, backend: str) -> Partials:
        """Of all items of a rank; NaN where nothing was written."""
        work, _ = self.work(rank)
        q, k, v = (self.tensors[name] for name in "qkv")
        into = empty_partials(work.num_partials, q.shape[1], v.shape[3], q.device)
        for x in into:
            x.fill_(math.nan)
        return attend_pages(q, k, v, work, self.call(backend), into)

    def run(self, backend: str) -> Partials:
        """out [N, Hq, Dv] in the dtype of q and lse [N, Hq]: splits combined on each rank, then the messages of the ranks."""
        heads, num_tokens = HEADS[self.heads][0], sum(self.new)
        gathered = torch.full((self.world_size, num_tokens + 1, heads * (self.dims[1] + 1)), math.nan)
        for rank in range(self.world_size):
            parts = self.work(rank)[1]
            combine(self.partials(rank, backend), parts, into=partials_of(gathered[rank, :-1], heads), backend=backend)
        parts = torch.stack([torch.arange(num_tokens), torch.full((num_tokens,), num_tokens + 1), torch.full((num_tokens,), self.world_size)], 1)  # fmt: skip
        whole = partials_of(gathered.flatten(0, 1), heads)
        return combine(whole, parts.int(), DTYPES[self.dtype], backend=backend)

    def dense(self, precision: torch.dtype = torch.float64) -> Partials:
        """As `run`, by `oracle.dense_attention`, sequence by sequence."""
        outs, lses = [], []
        for s, (length, new) in enumerate(zip(self.lens, self.new, strict=True)):
            exact = self._dense_sequence(s, precision)
            outs.append(exact.out[0, :, length - new :].movedim(0, 1))
            lses.append(exact.lse[0, :, length - new :].T)
        return Partials(torch.cat(outs), torch.cat(lses))

    def _dense_sequence(self, s: int, precision: torch.dtype) -> Attention:
        mask, score, place = MASKS[self.mask](), SCORES[self.score], torch.tensor(s)
        rows, (begin, end) = self.rows_of(s), self.starts[s : s + 2]
        q, k, v = (self.tensors[name] for name in "qkv")
        queries = torch.cat(
            [q.new_zeros(*q.shape[:2], self.lens[s] - (end - begin), q.shape[3]), q[:, :, begin:end]], 2
        )
        grad_out = torch.zeros(*queries.shape[:3], v.shape[3], dtype=q.dtype)
        return dense_attention(
            queries, k[:, :, rows], v[:, :, rows], grad_out, torch.zeros(queries.shape[:3]),
            mask_mod=lambda b, h, q, k: mask(place, h, q, k),
            score_mod=None if score is None else lambda: lambda x, b, h, q, k: score(x, place, h, q, k),
            scale=self.scale, precision=precision,
        )  # fmt: skip


def _int32(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def assert_near(found: Partials, problem: Paged) -> None:
    """Twice the error of dense attention in the same precision, and one rounding."""
    exact, same = problem.dense(), problem.dense(torch.float32)
    for name, x, y, z in zip(Partials._fields, found, exact, same, strict=True):
        hidden = y == -math.inf
        assert torch.equal(x == -math.inf, hidden), f"{name}: not the same tokens see nothing"
        errors = [(a.double() - y)[~hidden].abs() for a in (x, z)]
        error, allowed = (e.max().item() if e.numel() else 0.0 for e in errors)
        largest = y[~hidden].abs().max().item() if errors[0].numel() else 0.0
        rounding = torch.finfo(x.dtype).eps * max(1.0, largest)
        assert error <= 2 * allowed + 2 * rounding, f"{name}: {error:.2e} from float64, allowed {allowed:.2e}"

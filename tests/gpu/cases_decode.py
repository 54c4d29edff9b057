"""Steps of decoding that are checked on a GPU: sequences in pages, and dense attention of their new tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases_gpu import DTYPES
from torch import Tensor

import cpflex

# N new tokens of all sequences, n of one, L tokens of it, Hq query heads, H heads of keys, D and Dv head dims


@dataclass(frozen=True)
class Step:
    """Lengths of sequences with their new tokens; `str` of it is a test id."""

    mask: str
    score: str = "none"
    lens: tuple[int, ...] = (4001, 70, 1, 12000)
    new: tuple[int, ...] = (1, 3, 1, 1)
    heads: tuple[int, int] = (8, 2)
    dims: tuple[int, int] = (128, 128)
    dtype: str = "bf16"
    page_size: int = 64

    def __str__(self) -> str:
        sizes = f"D{self.dims[0]}-Dv{self.dims[1]}-H{self.heads[0]}-{self.heads[1]}-N{sum(self.new)}-p{self.page_size}"
        return f"{self.mask}-{self.score}-{sizes}-{self.dtype}"

    def mask_mod(self) -> Callable[..., Tensor]:
        return {
            "causal": lambda b, h, q, k: k <= q,
            "window": lambda b, h, q, k: (k <= q) & (q - k < 1000),
            "sinks": lambda b, h, q, k: (k <= q) & ((q - k < 1000) | (k < 4)),
            "by_head": lambda b, h, q, k: (k <= q) & ((k + h) % 3 != 0),
            "by_sequence": lambda b, h, q, k: (k <= q) & (q - k < 700 * (b + 1)),
            "late": lambda b, h, q, k: (k <= q) & (q >= 500),  # nothing for short sequences
        }[self.mask]

    def score_mod(self) -> Callable[..., Tensor] | None:
        slopes = 2.0 ** -torch.arange(1.0, self.heads[0] + 1, device="cuda")
        mods = {
            "softcap": lambda s, b, h, q, k: 20.0 * torch.tanh(s / 20.0),
            "alibi": lambda s, b, h, q, k: s - slopes[h] * (q - k).abs(),
        }
        return mods.get(self.score)


STEPS = [
    *(Step(mask) for mask in ("causal", "window", "sinks", "by_head", "by_sequence", "late")),
    *(Step("causal", score, dims=(dim, dim)) for score in ("softcap", "alibi") for dim in (64, 256)),
    *(Step("causal", page_size=page_size) for page_size in (16, 32, 128)),
    *(Step("sinks", "alibi", dims=dims, dtype="fp16") for dims in ((80, 80), (96, 64), (192, 128))),
    Step("causal", heads=(7, 7)),
    Step("causal", heads=(70, 1), dims=(64, 64)),
    Step("window", new=(200, 17, 1, 65)),  # chunks of prompts beside single tokens
    Step("causal", lens=(300, 40), new=(1, 5), dtype="fp32"),
    Step("causal", lens=(500, 40) * 32, new=(1, 1) * 32, page_size=16),
]


class Kept:
    """The sequences of a step on one rank, in pages of one pool with NaN in every row that keeps no token."""

    def __init__(self, step: Step, group: Any = None) -> None:
        self.step, (heads, kv_heads), dtype = step, step.heads, DTYPES[step.dtype]
        size, draw = step.page_size, torch.Generator().manual_seed(0)
        world_size = 1 if group is None else group.world_size
        count = 2 * sum(-(-n // size) + 1 for n in step.lens) // world_size + len(step.lens)
        self.pages = cpflex.Pages(count, size) if group is None else cpflex.Pages(count, size, group)
        self.pool = self.pages.pool(kv_heads, *step.dims, dtype=dtype, device="cuda")
        for x in (self.pool.k, self.pool.v):
            x.fill_(math.nan)
        self.dense, firsts = [], []
        """k [H, L, D] and v [H, L, Dv] of each sequence."""
        for seq, (length, new) in enumerate(zip(step.lens, step.new, strict=True)):
            kv = [torch.randn(1, kv_heads, length, dim, generator=draw).to(dtype).cuda() for dim in step.dims]
            self.pages.reserve(seq, length + size)
            old, held = length - new, self.pages.held(seq)
            mine = torch.from_numpy(held.owner == self.pages.rank)[torch.arange(old) // size].nonzero()[:, 0]
            self.pool.store(*(x[:, :, mine.cuda()] for x in kv), seq, mine)
            self.pages.fill(seq, old)
            self.dense.append([x[0] for x in kv])
            firsts.append([x[:, :, old:] for x in kv])
        self.new = [torch.cat(x, dim=2) for x in zip(*firsts, strict=True)]
        self.q = torch.randn(1, heads, sum(step.new), step.dims[0], generator=draw).to(dtype).cuda()

    def plan(self, **options: Any) -> cpflex.DecodePlan:
        new = dict(enumerate(self.step.new))
        return cpflex.make_decode_plan(self.step.mask_mod(), self.pages, new, num_heads=self.step.heads[0], **options)

    def attend(self, plan: cpflex.DecodePlan, backend: str = "triton") -> dict[str, Tensor]:
        """out [1, Hq, N, Dv] and lse [1, Hq, N]; on several ranks of all tokens."""
        self.pool.assign(*self.new, plan)
        out, lse = cpflex.flex_attention(
            self.q, self.pool.k, self.pool.v, self.step.score_mod(), plan, enable_gqa=True, return_lse=True,
            kernel_options={"backend": backend},
        )  # type: ignore[misc]  # fmt: skip
        return {"out": out, "lse": lse}

    def exact(self, precision: torch.dtype) -> dict[str, Tensor]:
        """As `attend`, dense; in float32 probabilities and out are rounded as tensor cores need them."""
        outs, lses, begin = [], [], 0
        for place, new in enumerate(self.step.new):
            out, lse = self._exact_sequence(place, self.q[0, :, begin : begin + new], precision)
            outs.append(out)
            lses.append(lse)
            begin += new
        return {"out": torch.cat(outs, dim=1)[None], "lse": torch.cat(lses, dim=1)[None]}

    def _exact_sequence(self, place: int, q: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        (heads, kv_heads), score_mod = self.step.heads, self.step.score_mod()
        k, v = (x.to(precision).repeat_interleave(heads // kv_heads, 0) for x in self.dense[place])
        kv_idx = torch.arange(k.shape[1], device="cuda")
        q_idx = kv_idx[k.shape[1] - q.shape[1] :, None]
        b, h = torch.tensor(place, device="cuda"), torch.arange(heads, device="cuda").view(-1, 1, 1)

        def rounded(x: Tensor) -> Tensor:
            return x if precision == torch.float64 else x.to(q.dtype).to(precision)

        scores = q.to(precision) @ k.mT / math.sqrt(q.shape[2])
        scores = scores if score_mod is None else score_mod(scores, b, h, q_idx, kv_idx)
        scores = scores.masked_fill(~self.step.mask_mod()(b, h, q_idx, kv_idx), -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
        out = rounded(weights) @ v
        return (out if precision == torch.float64 else out.to(q.dtype)), lse

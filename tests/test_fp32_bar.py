"""The bar of torch's own context parallel test: fp32 within atol 2e-6 / rtol 1e-5, at its shapes (B8 H8 D32)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import cpflex
from cases import options_of
from cpflex.testing import run_ranks
from oracle import Attention, MaskFn, assert_within_budget, dense_attention
from processes import RankProcesses
from runs import TOKEN_TENSORS, assemble

BATCH = HEADS = 8
DIM = 32
NUM_DOCUMENTS = 28
ATOL, RTOL = 2e-6, 1e-5


@dataclass(frozen=True)
class Bar:
    mask: str
    len_per_rank: int
    world_size: int
    schedule: str = "auto"
    kv_len_per_rank: int = 0
    """Of another sequence, in another layout; 0: keys are the queries' own."""

    def __str__(self) -> str:
        keys = f"over{self.kv_len_per_rank}" if self.kv_len_per_rank else ""
        return f"{self.mask}-S{self.len_per_rank}{keys}x{self.world_size}-{self.schedule}"

    @property
    def seq_len(self) -> int:
        return self.len_per_rank * self.world_size

    @property
    def kv_len(self) -> int:
        return self.kv_len_per_rank * self.world_size or self.seq_len

    def mask_mod(self) -> MaskFn:
        """Of a rectangle: the last query sees all, as flash-attn has it; documents of the same proportions on both sides."""
        if self.mask == "full":
            return cpflex.full()
        more_keys = torch.tensor(self.kv_len - self.seq_len)
        causal = cpflex.full() & (lambda b, h, q, k: k <= q + more_keys) if self.kv_len_per_rank else cpflex.causal()
        if self.mask == "causal":
            return causal
        ids = self.ids()
        if not self.kv_len_per_rank:
            return cpflex.document(ids) & causal
        q_ids, kv_ids = (ids[:, torch.arange(n) * ids.shape[1] // n] for n in (self.seq_len, self.kv_len))
        return cpflex.document(q_ids, kv_ids=kv_ids)

    def ids(self) -> Tensor:
        """[B, S], S the shorter of the two lengths."""
        length = min(self.seq_len, self.kv_len)
        random = torch.Generator().manual_seed(self.seq_len)
        ids = torch.zeros(BATCH, length, dtype=torch.int64)
        for row in ids:
            starts = 1 + torch.randperm(length - 1, generator=random)[: NUM_DOCUMENTS - 1]
            row[starts] = 1
        return ids.cumsum(dim=1)

    def plans(self, group: Any, **options: Any) -> tuple[cpflex.Plan, cpflex.Plan]:
        """Of the attention, and of its keys."""
        options = options_of(self.schedule) | options
        if not self.kv_len_per_rank:
            plan = cpflex.make_plan(self.mask_mod(), self.seq_len, group, batch_size=BATCH, **options)
            return plan, plan
        keys = cpflex.make_plan(cpflex.full(), self.kv_len, group, layout=cpflex.zigzag)
        mask = cpflex.cross(self.mask_mod(), keys)
        return cpflex.make_plan(mask, self.seq_len, group, batch_size=BATCH, **options), keys

    def tensors(self) -> dict[str, Tensor]:
        """As torch's test draws them: uniform q, k, v and the loss ``out.sum()``; here lse takes part in it too."""
        random = torch.Generator().manual_seed(self.seq_len)
        lengths = {"q": self.seq_len, "k": self.kv_len, "v": self.kv_len}
        made = {name: torch.rand(BATCH, HEADS, length, DIM, generator=random) for name, length in lengths.items()}
        grad_lse = torch.rand(BATCH, HEADS, self.seq_len, generator=random)
        return made | {"grad_out": torch.ones_like(made["q"]), "grad_lse": grad_lse}


def attend(group: Any, bar: Bar, **options: Any) -> dict[str, Any]:
    plan, keys = bar.plans(group, **options)
    of = {"k": keys, "v": keys}
    local = {name: of.get(name, plan).shard(x, dim=2, pad_value=0.0) for name, x in bar.tensors().items()}
    q, k, v = (local[name].requires_grad_() for name in "qkv")
    out, lse = cpflex.flex_attention(q, k, v, block_mask=plan, return_lse=True)
    grads = torch.autograd.grad((out, lse), (q, k, v), (local["grad_out"], local["grad_lse"]))
    results = dict(zip(TOKEN_TENSORS, (out.detach(), lse.detach(), *grads), strict=True))
    results |= {"d_captured": [], "positions": plan.positions, "seq_len": plan.seq_len}
    return results | {"kv_positions": keys.positions, "kv_seq_len": keys.seq_len}


def attend_alone(group: dist.ProcessGroup, bar: Bar) -> dict[str, Any]:
    """A gloo group of one rank."""
    alone = [dist.new_group([rank]) for rank in range(group.size())][group.rank()]
    return attend(alone, bar)


def check(bar: Bar, results: list[dict[str, Any]]) -> None:
    """Against the same-precision attention of one device, as torch's test compares; against float64, the error budget.

    At thousands of tokens float32 itself comes within a few percent of the bar, or passes it, in single elements of dk;
    so it does in dk of a key that many queries see alone.
    """
    whole = assemble(results)
    # of the longest sequences one head of each row of the batch: all rows and all heads, not all pairs
    heads = (
        list(itertools.product(range(BATCH), range(HEADS))) if bar.kv_len <= 2048 else [(b, b) for b in range(BATCH)]
    )
    dense = partial(dense_attention, **bar.tensors(), mask_mod=bar.mask_mod(), heads=heads)
    exact, reference = dense(precision=torch.float64), dense(precision=torch.float32)
    found, same, exact = (of_heads(x, heads) for x in (whole, reference, exact))
    assert_meets_the_bar(found, same)
    assert_within_budget(found, same, exact)
    if max(bar.seq_len, bar.kv_len) <= 512:
        assert_meets_the_bar(found, exact)


def of_heads(attention: Attention, heads: list[tuple[int, int]]) -> Attention:
    at = tuple(torch.tensor(heads).T)
    terms = None if attention.terms is None else of_heads(attention.terms, heads)
    return Attention(**{name: x[at] for name, x in attention.named().items()}, terms=terms)


def assert_meets_the_bar(found: Attention, expected: Attention) -> None:
    expected_of = expected.named()
    for name, x in found.named().items():
        torch.testing.assert_close(
            x.double(),
            expected_of[name].double(),
            atol=ATOL,
            rtol=RTOL,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def bars(sizes: dict[int, list[int]], masks: tuple[str, ...] = ("causal", "documents")) -> list[Bar]:
    return [
        Bar(mask, len_per_rank, world) for len_per_rank, worlds in sizes.items() for world in worlds for mask in masks
    ]


@pytest.mark.by_day(3)
@pytest.mark.parametrize("bar", bars({64: [1, 3, 8], 256: [1, 2]}), ids=str)
def test_threads_meet_the_bar(bar: Bar):
    check(bar, run_ranks(partial(attend, bar=bar), bar.world_size))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "bar", bars({64: [2, 4, 5, 6, 7], 256: [3, 4, 5, 6, 7, 8], 1024: [1, 2, 3, 4, 5, 6, 7, 8]}), ids=str
)
def test_threads_of_any_number_meet_the_bar_at_any_length(bar: Bar):
    check(bar, run_ranks(partial(attend, bar=bar), bar.world_size, timeout=3600))


RECTANGLES = [(64, 128), (128, 64), (64, 96), (1, 64)]  # tokens of a rank: queries, keys


def rectangles(sizes: list[tuple[int, int]], masks: tuple[str, ...] = ("full", "causal", "documents")) -> list[Bar]:
    return [
        Bar(mask, q_len, world, kv_len_per_rank=kv_len)
        for q_len, kv_len in sizes for world in (1, 2, 4) for mask in masks
        if mask != "documents" or min(q_len, kv_len) * world >= NUM_DOCUMENTS
    ]  # fmt: skip


@pytest.mark.by_day(4)
@pytest.mark.parametrize("bar", rectangles(RECTANGLES), ids=str)
def test_processes_meet_the_bar_on_rectangles(bar: Bar, request: pytest.FixtureRequest):
    check_on_processes(bar, request)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bar", rectangles([(256, 512), (1024, 256)]), ids=str)
def test_processes_meet_the_bar_on_long_rectangles(bar: Bar, request: pytest.FixtureRequest):
    check_on_processes(bar, request)


@pytest.mark.parametrize("bar", bars({64: [1, 2, 4]}), ids=str)
def test_processes_meet_the_bar(bar: Bar, request: pytest.FixtureRequest):
    check_on_processes(bar, request)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bar", bars({256: [1, 2, 4], 1024: [1, 2, 4]}), ids=str)
def test_processes_meet_the_bar_at_any_length(bar: Bar, request: pytest.FixtureRequest):
    check_on_processes(bar, request)


def check_on_processes(bar: Bar, request: pytest.FixtureRequest) -> None:
    processes: RankProcesses = request.getfixturevalue("four_processes" if bar.world_size == 4 else "two_processes")
    if bar.world_size == 1:
        check(bar, processes.run(attend_alone, bar, timeout=1800)[:1])
    else:
        check(bar, processes.run(attend, bar, timeout=1800))

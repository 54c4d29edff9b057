"""What a recurrent layer keeps for backward, and what its ranks send one another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import cpflex
from cpflex import recurrent
from cpflex.testing import run_ranks

SEQ_LEN, BATCH, HEADS, DIM, V_DIM = 4096, 2, 2, 8, 12
LAYOUTS: dict[str, Callable[..., cpflex.Layout]] = {"contiguous": cpflex.contiguous, "zigzag": cpflex.zigzag}


class Kept:
    """Bytes of all memory that is kept for backward, each storage once."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}

    def __enter__(self) -> Kept:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x)
        self._hooks.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._hooks.__exit__(*raised)

    def _keep(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        self.bytes[storage.data_ptr()] = storage.nbytes()
        return x


def layer(name: str, group: Any, layout: Callable[..., cpflex.Layout]) -> tuple[int, list[int], cpflex.Plan]:
    """(bytes kept, bytes sent forward and backward, plan) of one layer."""
    plan = cpflex.make_plan(cpflex.causal(), SEQ_LEN, group, layout=layout)
    chain = recurrent.make_chain(plan)
    tokens = BATCH, plan.local_len, HEADS
    q, k, v = (torch.randn(*tokens, dim, requires_grad=True) for dim in (DIM, DIM, V_DIM))
    rate, decay = torch.rand(tokens, requires_grad=True), -torch.rand(tokens)
    before = group.bytes_sent
    with Kept() as kept:
        if name == "ssd":
            out = recurrent.ssd(v, rate, -torch.ones(HEADS), k, q, chain)
        else:
            out = recurrent.gated_delta_rule(q, k, v, decay, rate, chain, use_qk_l2norm=True)
    sent = [group.bytes_sent - before]
    out.sum().backward()
    return sum(kept.bytes.values()), [*sent, group.bytes_sent - before - sent[0]], plan


def summary_bytes(name: str) -> int:
    """Of one fragment: the state that it leaves behind, and how it maps the one that enters."""
    return BATCH * HEADS * (DIM * V_DIM + (1 if name == "ssd" else DIM * DIM)) * 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gated_delta_rule", "ssd"])
def test_what_is_kept_falls_as_the_tokens_of_a_rank_do(name: str, layout: str):
    """By 1 / P, but for the summaries of all fragments."""
    kept = {}
    for world_size in (1, 2, 4):
        ranks = run_ranks(partial(layer, name, layout=LAYOUTS[layout]), world_size, timeout=60)
        summaries = sum(map(len, ranks[0][2].fragments)) * summary_bytes(name)
        kept[world_size] = max(rank[0] for rank in ranks)
        assert kept[world_size] <= kept[1] / world_size + summaries, kept


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gated_delta_rule", "ssd"])
def test_only_summaries_are_sent(name: str, layout: str):
    """Forward each rank its own fragments' to all others, backward the others' back."""
    world_size = 4
    for rank, (_, sent, plan) in enumerate(run_ranks(partial(layer, name, layout=LAYOUTS[layout]), world_size)):
        counts = [len(held) for held in plan.fragments]
        others = sum(counts) - counts[rank]
        assert sent == [counts[rank] * (world_size - 1) * summary_bytes(name), others * summary_bytes(name)]


def test_a_convolution_sends_only_the_tokens_before_fragments():
    channels, taps = 6, 4

    def sent(group: Any) -> tuple[int, int]:
        plan = cpflex.make_plan(cpflex.causal(), SEQ_LEN, group, layout=cpflex.zigzag)
        x = torch.randn(BATCH, channels, plan.local_len)
        recurrent.causal_conv1d(x, torch.randn(channels, taps), None, recurrent.make_chain(plan))
        return group.bytes_sent, sum(map(len, plan.fragments))

    everyones = run_ranks(sent, 4, timeout=60)
    num_fragments = everyones[0][1]
    assert sum(found for found, _ in everyones) == (num_fragments - 1) * (taps - 1) * BATCH * channels * 4

"""Attention on a packed batch is that of each document by itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import cpflex
from cpflex.planning.packing import Batch, candidates
from cpflex.testing import run_ranks
from oracle import Attention, assert_within_budget, dense_attention
from processes import RankProcesses

LENGTHS = [40, 130, 7, 61, 1, 400, 33, 90, 20, 16, 55, 600, 70]
NAMES = ("out", "lse", "dq", "dk", "dv")


def inputs() -> dict[str, torch.Tensor]:
    """Of the documents one after the other, [1, H, S, D]."""
    generator = torch.Generator().manual_seed(3)
    total = sum(LENGTHS)
    shapes = {"q": (1, 4, total, 16), "k": (1, 2, total, 16), "v": (1, 2, total, 24)}
    shapes |= {"grad_out": (1, 4, total, 24), "grad_lse": (1, 4, total)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def attend(group: Any, world_size: int, window: int | None, which: int | None = None) -> dict[str, torch.Tensor]:
    """Local results put together again, in the order of the documents. ``which``: a candidate instead of the best."""
    packed = cpflex.pack(LENGTHS, world_size, window=window)
    if which is not None:
        packed = list(candidates(Batch(np.array(LENGTHS), world_size, window)))[which]
    mask = cpflex.causal() & cpflex.document(cu_seqlens=packed.cu_seqlens)
    mask = mask if window is None else mask & cpflex.sliding_window(window)
    plan = cpflex.make_plan(mask, packed.seq_len, group, layout=packed.layout)
    local = {}
    for name, x in inputs().items():
        documents = x.movedim(2, 0).split(LENGTHS)
        whole = packed.arrange(documents, pad_value=float("nan")).movedim(0, 2)
        local[name] = plan.shard(whole.nan_to_num(7.0), dim=2).requires_grad_(name in "qkv")
    q, k, v = (local[name] for name in "qkv")
    out, lse = cpflex.flex_attention(q, k, v, block_mask=plan, enable_gqa=True, return_lse=True)
    grads = torch.autograd.grad((out, lse), (q, k, v), (local["grad_out"], local["grad_lse"]))
    whole = (plan.unshard(x.detach(), dim=2).movedim(2, 0) for x in (out, lse, *grads))
    return {name: torch.cat(packed.split(x)).movedim(0, 2) for name, x in zip(NAMES, whole, strict=True)}


def check(found: dict[str, torch.Tensor], window: int | None) -> None:
    ids = torch.from_numpy(np.repeat(np.arange(len(LENGTHS)), LENGTHS))

    def mask_mod(b, h, q, k):
        return (k <= q) & (ids[q] == ids[k]) & (k > q - (window or len(ids)))

    dense = partial(dense_attention, **inputs(), mask_mod=mask_mod)
    assert_within_budget(Attention(**found), dense(precision=torch.float32), dense())


@pytest.mark.by_day(6)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("world_size", [1, 3])
def test_threads_attend_within_each_document(world_size: int, window: int | None):
    for found in run_ranks(partial(attend, world_size=world_size, window=window), world_size, timeout=60):
        check(found, window)


@pytest.mark.by_day(6)
@pytest.mark.parametrize("which", [0, -2, -1])
def test_threads_attend_alike_however_documents_are_dealt(which: int):
    for found in run_ranks(partial(attend, world_size=3, window=None, which=which), 3, timeout=60):
        check(found, None)


@pytest.mark.parametrize("processes", [2, 4], indirect=True)
def test_processes_attend_within_each_document(processes: RankProcesses):
    for found in processes.run(attend, processes.world_size, None):
        check(found, None)

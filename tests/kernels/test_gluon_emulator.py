"""The emulator finds each kind of fault that it claims to find: all are planted once. What is right passes."""

from __future__ import annotations

import re

import gluon_emulator
import pytest
import torch
from gluon_emulator import Emulated, Fault
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

NUM, SIZE = 5, 16
"""Blocks, which are square."""


@gluon.jit
def produce(blocks, rows, full, free, num, FLAW: gl.constexpr):
    at, phase = 0, 1
    for i in range(num):
        if FLAW != "a copy into a buffer in use":
            mbarrier.wait(free.index(at), 0 if FLAW == "the wrong phase" else phase)
        num_bytes = blocks.block_type.nbytes
        mbarrier.expect(full.index(at), 2 * num_bytes if FLAW == "bytes that never come" else num_bytes)
        copy_in(blocks, [i * 16, 0], full.index(at), rows.index(at))
        at += 1
        phase = gl.where(at == 2, phase ^ 1, phase)
        at = gl.where(at == 2, 0, at)
    if FLAW == "a copy that nobody waits for":
        mbarrier.wait(free.index(at), phase)
        mbarrier.expect(full.index(at), blocks.block_type.nbytes)
        copy_in(blocks, [0, 0], full.index(at), rows.index(at))


@gluon.jit
def consume(blocks, rows, full, free, num, spare, out_ptr, out_blocks, FLAW: gl.constexpr):
    at, phase = 0, 0
    acc = gl.zeros([16, 16], gl.float32)
    cells = gl.expand_dims(gl.arange(0, 16), 1) * 16 + gl.expand_dims(gl.arange(0, 16), 0)
    for _ in range(num):
        if FLAW != "a product of what has not come":
            mbarrier.wait(full.index(at), phase)
        acc = hopper.warpgroup_mma(rows.index(at), rows.index(at), acc, is_async=True)
        if FLAW == "a result too early":
            acc = acc * 1.0
        if FLAW != "a buffer freed too early":
            acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index(at), count=2 if FLAW == "an arrival too many" else 1)
        if FLAW == "a buffer freed too early":
            acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
        at += 1
        phase = gl.where(at == 2, phase ^ 1, phase)
        at = gl.where(at == 2, 0, at)
    spare.store(acc.to(gl.bfloat16))
    if FLAW != "no fence":
        hopper.fence_async_shared()
    copy_out(out_blocks, [0, 0], spare)
    if FLAW != "a buffer stored from and to":
        tma.store_wait(0)
    spare.store(acc.to(gl.bfloat16) * 2)
    if FLAW == "a load of another's":
        hopper.warpgroup_mma(rows.index(0), rows.index(2), acc)
    if FLAW == "a product left behind":
        hopper.warpgroup_mma(rows.index(0), rows.index(0), acc, is_async=True)
    gl.store(out_ptr + cells + (1 if FLAW == "out of bounds" else 0), spare.load().to(gl.float32))


@gluon.jit
def peek(spare, done, FLAW: gl.constexpr):
    """Memory that another partition stores to, looked at in its midst."""
    if FLAW == "threads that race":
        spare.load()
        spare.store(spare.load())


@gluon.jit
def squares_kernel(blocks, out_ptr, out_blocks, num, FLAW: gl.constexpr):
    """The sum of the squares of blocks, in bf16 by TMA, and doubled by threads."""
    rows = gl.allocate_shared_memory(gl.bfloat16, [3, 16, 16], blocks.layout)
    spare = gl.allocate_shared_memory(gl.bfloat16, [16, 16], blocks.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        if FLAW != "nobody initialised":
            mbarrier.init(free.index(i), count=1)
    spare.store(gl.zeros([16, 16], gl.bfloat16))
    gl.warp_specialize(
        [
            (produce, (blocks, rows, full, free, num, FLAW)),
            (consume, (blocks, rows, full, free, num, spare, out_ptr, out_blocks, FLAW)),
            (peek, (spare, full, FLAW)),
        ],
        [4, 4],
        [24, 24],
    )


def descriptor(x: Tensor) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [SIZE, SIZE], layout)


def launch(flaw: str, seed: int, haste: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """(blocks, their squares' sum doubled by threads, the sum stored by TMA)."""
    blocks = torch.randn(NUM * SIZE, SIZE, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    out, stored = torch.empty(SIZE, SIZE), torch.empty(SIZE, SIZE, dtype=torch.bfloat16)
    kernel = Emulated(squares_kernel, seed, haste=haste)
    kernel[(1,)](descriptor(blocks), out, descriptor(stored), NUM, FLAW=flaw, num_warps=4)
    return blocks, out, stored


@pytest.mark.parametrize("haste", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_a_kernel_without_a_fault_computes_what_it_should(seed: int, haste: float):
    blocks, out, stored = launch("none", seed, haste)
    squares = (blocks.view(NUM, SIZE, SIZE).float() @ blocks.view(NUM, SIZE, SIZE).float()).sum(0)
    torch.testing.assert_close(stored, squares.to(torch.bfloat16))
    torch.testing.assert_close(out, 2 * stored.float())


FLAWS = {
    "a copy into a buffer in use": r"race: a copy of produce 0 and (a copy|a product)|where all have arrived",
    "a product of what has not come": r"race: a product of consume 1 and a copy|nobody wrote",
    "a buffer freed too early": r"race: a copy of produce 0 and a product of consume 1",
    "threads that race": r"race: a (load|store) of \w+ \d and a (load|store) of",
    "a buffer stored from and to": r"race: a store of consume 1 and a store by TMA",
    "no fence": r"no fence between a store of consume 1 and a store by TMA",
    "a result too early": r"a product of consume 1: its result is read",
    "the wrong phase": r"deadlock: .*produce 0 waits for phase 0 of an mbarrier",
    "bytes that never come": r"deadlock: .*consume 1 waits for phase 0 of an mbarrier",
    "an arrival too many": r"consume 1 arrives at an mbarrier where all have arrived",
    "nobody initialised": r"an mbarrier that nobody initialised",
    "a load of another's": r"reads shared memory that nobody wrote",
    "a product left behind": r"consume 1 ends while products are under way",
    "a copy that nobody waits for": r"the program ends, and nobody has waited for copy 6 of produce 0",
    "out of bounds": r"element 256 of a tensor of 256",
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("flaw", FLAWS)
def test_each_planted_fault_is_found(flaw: str, seed: int):
    with pytest.raises(Fault, match=FLAWS[flaw]):
        launch(flaw, seed)


def test_races_are_found_in_whatever_order_things_come():
    """Where a copy always lands before anybody goes on, no value is wrong; clocks tell all the same."""
    for flaw in ("a product of what has not come", "a copy into a buffer in use", "a buffer freed too early"):
        for seed in range(10):
            with pytest.raises(Fault, match=r"race|nobody wrote"):
                launch(flaw, seed, haste=1.0)


def test_a_seed_plays_the_same_turns_again():
    def said(seed: int) -> str:
        with pytest.raises(Fault) as raised:
            launch("a buffer freed too early", seed)
        return str(raised.value)

    assert said(3) == said(3)
    assert re.match(r"seed 3, program 0: race: ", said(3))
    assert len({said(seed) for seed in range(6)}) > 1


def test_other_errors_of_a_kernel_are_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gluon_emulator.Language, "where", staticmethod(lambda *_: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        launch("none", 0)


@gluon.jit
def add_kernel(blocks, out_blocks, num):
    rows = gl.allocate_shared_memory(gl.float32, [16, 16], blocks.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(arrived.index(0), count=1)
    for i in range(num):
        mbarrier.expect(arrived.index(0), blocks.block_type.nbytes)
        copy_in(blocks, [i * 16, 0], arrived.index(0), rows)
        mbarrier.wait(arrived.index(0), i % 2)
        value = rows.load()
        rows.store(value + 1.0)
        hopper.fence_async_shared()
        tma.async_atomic_add(out_blocks, [0, 0], rows)
        tma.store_wait(0)


@pytest.mark.skipif(not hasattr(tma, "async_atomic_add"), reason="Triton 3.8 named it")
def test_partitions_are_no_must_and_reductions_add():
    blocks, out = torch.randn(2 * SIZE, SIZE), torch.zeros(SIZE, SIZE)
    Emulated(add_kernel, 0)[(1,)](descriptor(blocks), descriptor(out), 2)
    torch.testing.assert_close(out, blocks.view(2, SIZE, SIZE).sum(0) + 2.0)

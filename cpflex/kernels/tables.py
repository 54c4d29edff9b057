"""Tables: what the kernels of all steps of a plan look up on a device, brought there by one copy.

Whatever is made later, for blocks that nobody foresaw, comes by one more copy for all steps. From pinned memory, so
that the host waits for none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpflex.mods.graph import Mod
from cpflex.tile_mask import CPU, Idle, Siblings, TileMask

ALIGNMENT = 16
"""Bytes: what Triton wants of a pointer, else it compiles another variant."""


class Tables(NamedTuple):
    """What a plan knows, on one device."""

    mask: Mod
    tile_masks: tuple[TileMask, ...]
    idle: Idle
    packed_mask: Any
    """The mask's captured tensors as the fused kernels take them; None where there are no such kernels."""
    siblings: Siblings


def bring(mask: Mod, tile_masks: Sequence[TileMask], idle: Idle, device: torch.device, *, with_work: bool) -> Tables:
    """The tables of a plan on a device, by one copy.

    Args:
        tile_masks: of all steps, which have the local queries in common.
        with_work: the work tables of all kernels that `tuning` may choose for 16-bit tensors, too.
    """
    siblings = Siblings(tuple(tile_masks))
    on_device = [replace(m, device=device, siblings=siblings, index=i) for i, m in enumerate(tile_masks)]
    if device == CPU:
        return Tables(mask, tuple(on_device), idle, None, siblings)
    captured = [t.contiguous() for t in mask.captured]
    positions = [tile_masks[0].q_positions, *(m.kv_positions for m in tile_masks)]
    works, sizes = [], []
    if device.type == "cuda" and find_spec("triton") is not None:
        from cpflex.kernels.work import foreseen_blocks, work_tables
        from cpflex.mods.triton_source import pack_captured

        with contextlib.suppress(ValueError):  # kernels that cannot take the mask say so when one is launched
            captured, *sizes = pack_captured(captured, CPU)
        works = work_tables(siblings.masks, foreseen_blocks(device)) if with_work else []
    tensors = [*positions, *idle, *captured, *sizes, *(work.table for work in works)]
    moved = iter(copy_at_once(tensors, device, siblings))
    q_positions = next(moved)
    for m in on_device:
        vars(m).update(q_positions=q_positions, kv_positions=next(moved))
    idle = Idle(*(next(moved) for _ in idle))
    captured = tuple(next(moved) for _ in captured)
    packed = (captured, *(next(moved) for _ in sizes)) if sizes else None
    siblings.works.update((work.blocks, work.split(table)) for work, table in zip(works, moved, strict=True))
    return Tables(Mod(mask.graph, captured, mask.name), tuple(on_device), idle, packed, siblings)


def copy_at_once(tensors: Sequence[Tensor], device: torch.device, siblings: Siblings) -> list[Tensor]:
    """The tensors on the device, contiguous: views of one arena, which ``siblings`` will know."""
    if device == CPU:
        return list(tensors)
    offsets, total = [], 0
    for t in tensors:
        offsets.append(total)
        total += -(-t.numel() * t.element_size() // ALIGNMENT) * ALIGNMENT
    host = torch.empty(max(total, ALIGNMENT), dtype=torch.uint8, pin_memory=device.type == "cuda")
    memory = host.numpy()
    for t, offset in zip(tensors, offsets, strict=True):
        if t.numel():
            data = t.detach().contiguous().view(-1).view(torch.uint8).numpy()
            memory[offset : offset + len(data)] = data
    arena = host.to(device, non_blocking=True)
    siblings.arenas.append(Arena.of(arena))
    typed = {dtype: arena.view(dtype) for dtype in {t.dtype for t in tensors}}
    return [
        typed[t.dtype].as_strided(t.shape, _contiguous_strides(t.shape), offset // t.element_size())
        for t, offset in zip(tensors, offsets, strict=True)
    ]


class Arena(NamedTuple):
    """Memory that a copy fills, and when."""

    memory: Tensor
    stream: Any
    filled: Any

    @classmethod
    def of(cls, memory: Tensor) -> Arena:
        """What the current stream was just told to fill."""
        if not memory.is_cuda:
            return cls(memory, None, None)
        stream = torch.cuda.current_stream(memory.device)
        return cls(memory, stream, stream.record_event())

    def wait(self) -> None:
        """The current stream may read it."""
        if self.stream is None:
            return
        current = torch.cuda.current_stream(self.memory.device)
        if current != self.stream:
            current.wait_event(self.filled)
            self.memory.record_stream(current)


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]


def foresee(tables: Tables, device: torch.device) -> None:
    """Add the work tables that `bring` was not asked for."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from cpflex.kernels.work import add_work, foreseen_blocks

        add_work(tables.siblings, foreseen_blocks(device), device)

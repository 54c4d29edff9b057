"""Grids of ranks: one group of which rows and columns are views, or two groups, as threads and as processes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from cpflex.links.threads import ThreadLinks, _Board

SHAPES = {"1x2": 2, "2x1": 1, "2x2": 2, "4x2": 2, "2x4": 4, "1x4": 4}
"""Rows x ranks of a row -> ranks of a row."""


def num_ranks(shape: str) -> int:
    rows, size = shape.split("x")
    return int(rows) * int(size)


class _Part(_Board):
    """The board of some ranks, who wait and stop with all others."""

    def __init__(self, whole: _Board, world_size: int) -> None:
        super().__init__(world_size, whole.timeout, whole.changed, words=whole.words)
        self.until = whole.until


def two_groups(group: ThreadLinks, size: int) -> tuple[ThreadLinks, ThreadLinks]:
    """(the row, the column) of a thread, on boards of their own."""
    parts = vars(group.board).setdefault("parts", {})
    row, place = divmod(group.rank, size)
    with group.board.changed:
        for name, length in ((("row", row), size), (("column", place), group.world_size // size)):
            parts.setdefault(name, _Part(group.board, length))
    rows, columns = parts["row", row], parts["column", place]
    return ThreadLinks(place, size, rows), ThreadLinks(row, columns.world_size, columns)


def in_two_groups(group: Any, size: int) -> Any:
    """A group of threads or processes as a grid of two groups."""
    if isinstance(group, ThreadLinks):
        return two_groups(group, size)
    return mesh_of(group, size)["cp", "heads"]


def mesh_of(group: dist.ProcessGroup, size: int) -> Any:
    """The ranks of a row are next to each other."""
    return init_device_mesh("cpu", (group.size() // size, size), mesh_dim_names=("cp", "heads"))

"""Arena: all tables of a plan in one piece of int32 memory, which later plans may take over."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Sizes = Mapping[str, tuple[int, int]]
"""Rows and columns of each table."""


class Arena:
    """Tables [rows, columns] with room for more rows: what a step of another plan reads lies where this one's did."""

    def __init__(self, sizes: Sizes, num_moving: int) -> None:
        """The first ``num_moving`` tables change at every step."""
        self.room = {name: (_rounded_up(rows), columns) for name, (rows, columns) in sizes.items()}
        lengths = [rows * columns for rows, columns in self.room.values()]
        self._ends = dict(zip(self.room, np.cumsum(lengths).tolist(), strict=True))
        self.numbers = np.zeros(sum(lengths), np.int32)
        self._moving = sum(lengths[:num_moving])
        self._on: dict[torch.device, Tensor] = {}

    def holds(self, sizes: Sizes) -> bool:
        """Whether tables of these sizes have room."""
        return list(sizes) == list(self.room) and all(
            rows <= self.room[name][0] and columns == self.room[name][1] for name, (rows, columns) in sizes.items()
        )

    def table(self, name: str) -> np.ndarray:
        """[room, columns], to be written."""
        rows, columns = self.room[name]
        return self.numbers[self._ends[name] - rows * columns : self._ends[name]].reshape(rows, columns)

    def put(self, tables: Mapping[str, np.ndarray]) -> None:
        """Write tables, and zeros in the room behind them."""
        for name, rows in tables.items():
            table = self.table(name)
            table[: len(rows)] = rows
            table[len(rows) :] = 0

    def on(self, device: torch.device, name: str) -> Tensor:
        """A table on a device, with all its room; brought there once."""
        if device not in self._on:
            host = torch.from_numpy(self.numbers)
            self._on[device] = host if device.type == "cpu" else host.to(device)
        rows, columns = self.room[name]
        return self._on[device][self._ends[name] - rows * columns : self._ends[name]].view(rows, columns)

    def renew(self, *, moving: bool) -> None:
        """Bring to the devices what was written: all, or only what changes at every step."""
        count = self._moving if moving else len(self.numbers)
        for device, there in self._on.items():
            if device.type != "cpu":
                there[:count].copy_(torch.from_numpy(self.numbers[:count]))


def _rounded_up(count: int) -> int:
    """To a power of two, so that tables of nearly one size share one arena; to 4 at least, so that each begins at a
    multiple of 16 bytes, as compiled kernels expect.
    """
    return max(4, 1 << max(0, count - 1).bit_length())

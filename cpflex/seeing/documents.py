"""Packed documents of realistic lengths, drawn from a published histogram of pre-training data."""

from __future__ import annotations

import numpy as np

# MagiAttention's document-length histogram (docs of v1.1.1): (shortest, longest, documents)
HISTOGRAM = [
    (0, 10, 30254), (11, 50, 391188), (51, 100, 699596), (101, 200, 1377757), (201, 500, 3794735), (501, 1024, 3316785),
    (1025, 2048, 2106566), (2049, 4096, 988525), (4097, 8192, 410002), (8193, 16384, 173574), (16385, 32768, 115007),
    (32769, 65536, 18428), (65537, 131072, 22513), (131073, 196608, 18284),
]  # fmt: skip


def draw_documents(seq_len: int, seed: int) -> list[int]:
    """cu_seqlens of a pack: midpoints of the histogram's ranges in random order, none longer than a quarter of the
    sequence.
    """
    rng = np.random.default_rng(seed)
    lengths = np.array([(low + high) // 2 for low, high, _ in HISTOGRAM])
    counts = np.array([count for *_, count in HISTOGRAM], dtype=float)
    cu_seqlens = [0]
    while cu_seqlens[-1] < seq_len:
        length = int(lengths[rng.choice(len(lengths), p=counts / counts.sum())])
        cu_seqlens.append(min(seq_len, cu_seqlens[-1] + min(length, seq_len // 4)))
    return cu_seqlens

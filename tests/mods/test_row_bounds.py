"""Row bounds against brute force: where they are given they are the mask, and people's masks have them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
from test_intervals import _bool, _trace
from torch import Tensor

import cpflex
from cases import MASKS, Problem
from cpflex import masks_from
from cpflex.mods.evaluate import evaluate
from cpflex.mods.row_bounds import row_bounds
from cpflex.mods.trace import trace_mask_mod

S, B, H = 100, 2, 4


def seen_by(mask: Callable, q_len: int, kv_len: int) -> Tensor:
    """bool [B, H, Q, K], a pair of batch and head at a time."""
    q, k = torch.arange(q_len)[:, None], torch.arange(kv_len)
    return torch.stack(
        [
            torch.stack([mask(torch.tensor(b), torch.tensor(h), q, k).expand(q_len, kv_len) for h in range(H)])
            for b in range(B)
        ]
    )


def most_runs(seen: Tensor) -> int:
    before = torch.nn.functional.pad(seen[..., :-1], (1, 0))
    return int((seen & ~before).sum(-1).max())


def bounded(mask: Callable, q_len: int = S, kv_len: int = S) -> bool:
    """Whether the mask has row bounds; if so, they are its own."""
    found = row_bounds(trace_mask_mod(mask), q_len, kv_len, B, H)
    seen = seen_by(mask, q_len, kv_len)
    if found is None:
        return False
    first, end = found
    place = torch.arange(kv_len)
    assert torch.equal(((place >= first[..., None]) & (place < end[..., None])).expand_as(seen), seen)
    assert (end[first >= end] == 0).all()
    assert (first[first >= end] == 0).all()
    assert first.dtype == end.dtype == torch.int64
    assert first.shape == end.shape
    assert first.shape[-1] == q_len
    assert all(size in (1, most) for size, most in zip(first.shape, (B, H), strict=False))
    return True


NO_PROOF = {"sliding_tile_3d", "prefix_lm_per_batch"}
"""One interval in each row at this length, which the graph does not show."""


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_the_zoo_has_row_bounds_where_each_query_sees_one_interval(name: str):
    problem = Problem(mask=name, seq_len=S, batch_size=B, heads="gqa")
    one = most_runs(seen_by(problem.mask_mod, S, S)) <= 1
    assert bounded(problem.mask_mod) == (one and name not in NO_PROOF)


READ = {
    "varlen": (lambda: masks_from.varlen([0, 30, 31, S], causal=True, window_size=(9, 0)), S),
    "varlen of two lengths": (lambda: masks_from.varlen([0, 30, 31, S], [0, 50, 52, 70], causal=True), 70),
    "flashmask, causal documents": (
        lambda: masks_from.flashmask((torch.arange(S) // 20 * 20 + 20).view(1, 1, S, 1), True), S
    ),
    "flashmask, window": (
        lambda: masks_from.flashmask(
            torch.stack([torch.arange(S) + 7, torch.arange(S) - 3], 1).clamp(0, S)[None, None], False
        ),
        S,
    ),
    "ranges": (lambda: masks_from.ranges([(0, 50), (50, S)], [(0, 80), (10, 70)], [1, 3], q_len=S), S),
    "intervals of each head": (lambda: masks_from.intervals(torch.randint(0, 60, (H, 1, S)), 60), 60),
    "a dense causal mask with padding": (
        lambda: masks_from.dense(
            torch.ones(S, S).tril().bool() & (torch.arange(S) < torch.tensor([S, 40])[:, None, None, None])
        ),
        S,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_masks_that_were_read_have_row_bounds(name: str):
    make, kv_len = READ[name]
    assert bounded(make(), S, kv_len)


RISING, FALLING = torch.arange(S) // 7, 50 - torch.arange(S) // 3
WIDE = torch.tensor([2**62, 2**62 + 5]).repeat(S // 2)
REAL, HOLES = torch.linspace(-1, 1, S), torch.linspace(-1, 1, S).masked_fill(torch.arange(S) == 5, torch.nan)
KEYS = torch.arange(S) % 50 < 30

# mask -> whether it has bounds
FORMS: dict[str, tuple[Callable, bool]] = {
    "q first": (lambda b, h, q, k: q >= k, True),
    "a difference": (lambda b, h, q, k: (q - k < 9) & (q - k >= 0), True),
    "a difference of differences": (lambda b, h, q, k: (k - q) - (3 - k) <= k - 2, True),
    "twice the key": (lambda b, h, q, k: k + k > q, True),
    "minus": (lambda b, h, q, k: -k <= -q, True),
    "a falling table": (lambda b, h, q, k: FALLING[k] > FALLING[q], True),
    "a falling table, equal": (lambda b, h, q, k: FALLING[k] == FALLING[q], True),
    "rising tables": (lambda b, h, q, k: RISING[k] + 2 <= RISING[q], True),
    "floats": (lambda b, h, q, k: REAL[k] <= REAL[q] * 0.5, True),
    "nan": (lambda b, h, q, k: HOLES[k] <= REAL[q], False),
    "integers that may wrap around": (lambda b, h, q, k: WIDE[q] + WIDE[q] - k < 5, False),
    "keys of one run": (lambda b, h, q, k: (RISING[k] > 3) & (k <= q), True),
    "keys of two runs": (lambda b, h, q, k: KEYS[k], False),
    "queries alone": (lambda b, h, q, k: KEYS[q], True),
    "either, by the query": (lambda b, h, q, k: torch.where(KEYS[q], k <= q, k < 3), True),
    "either, by the key": (lambda b, h, q, k: torch.where(KEYS[k], k <= q, k < 3), False),
    "not a prefix": (lambda b, h, q, k: ~(k < 20), True),
    "not a window": (lambda b, h, q, k: ~((k >= q - 2) & (k <= q + 2)), False),
    "not equal": (lambda b, h, q, k: k != q, False),
    "not equal to the first": (lambda b, h, q, k: k != q * 0, True),
    "two that touch": (lambda b, h, q, k: (k < q) | ((k >= q) & (k < q + 4)), True),
    "two apart": (lambda b, h, q, k: (k < 3) | ((k >= q) & (k < q + 4)), False),
    "blocks": (lambda b, h, q, k: k // 16 <= q // 16, True),
    "a remainder": (lambda b, h, q, k: k % 16 == 0, False),
    "an int32": (lambda b, h, q, k: (k - q).to(torch.int32) <= 0, False),
    "never": (lambda b, h, q, k: (k < 3) & (k > 5), True),
    "a constant": (lambda b, h, q, k: (q < 0) | True, True),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_mask_has_row_bounds_or_none(name: str):
    mask, has = FORMS[name]
    for q_len, kv_len in ((S, S), (S, 30), (7, S), (1, 1)):
        assert bounded(mask, q_len, kv_len) or (q_len, kv_len) != (S, S) or not has
    assert bounded(mask) == has


@pytest.mark.parametrize("num_masks", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_row_bounds_of_a_random_mask_are_never_contradicted_by_it(num_masks: int):
    tried = found = 0
    for seed in range(num_masks):
        rng = Random(seed)
        try:
            mod = _trace(_bool(rng, rng.choice([1, 1, 2, 2, 3])))
            sizes = 2, 3, rng.choice([1, 9, 40]), rng.choice([1, 13, 60])
            b, h, q, k = (torch.arange(size).view(-1, *[1] * (3 - dim)) for dim, size in enumerate(sizes))
            seen = evaluate(mod.graph, mod.captured, {"b": b, "h": h, "q_idx": q, "kv_idx": k})[0].expand(sizes)
        except (RuntimeError, OverflowError):  # a number that does not fit in an int8
            continue
        bounds = row_bounds(mod, *sizes[2:], *sizes[:2])
        tried += 1
        if bounds is not None:
            found += 1
            inside = (torch.arange(sizes[3]) >= bounds[0][..., None]) & (torch.arange(sizes[3]) < bounds[1][..., None])
            assert torch.equal(inside.expand(sizes), seen), f"mask {seed}:\n{mod.graph}"
    assert tried > 0.9 * num_masks
    assert found > 0.3 * tried


def test_the_example_of_the_docstring():
    first, end = row_bounds(trace_mask_mod(cpflex.causal() & cpflex.sliding_window(3)), 5, 5)  # pyright: ignore
    assert (first.tolist(), end.tolist()) == ([[[0, 0, 0, 1, 2]]], [[[1, 2, 3, 4, 5]]])

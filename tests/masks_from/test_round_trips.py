"""Random masks into each format and back, and the zoo; then attention with masks that were read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from definitions import as_bsr, as_columns, as_intervals, as_ranges, as_selected
from hypothesis import given, settings
from hypothesis import strategies as st
from looks import assert_is, look
from torch import Tensor

import cpflex
from cases import MASKS, Problem
from cpflex import masks_from
from cpflex.testing import run_ranks
from oracle import assert_within_budget, dense_attention
from processes import RankProcesses
from runs import assemble, attend_on_rank

# bool [B, H, Q, K] -> the mask that is read from it in a format, or None where it cannot be written


def through_intervals(seen: Tensor, rng: Random) -> Any:
    batch, _, _, kv_len = seen.shape
    mask_func = as_intervals(seen.transpose(0, 1).flatten(1, 2))
    if mask_func.shape[1] // 2 >= 16:
        return None
    return masks_from.intervals(mask_func, kv_len, batch_size=batch)


def through_columns(seen: Tensor, rng: Random) -> Any:
    columns = as_columns(seen)
    return None if columns is None else masks_from.flashmask(columns, False, q_len=seen.shape[2])


def through_ranges(seen: Tensor, rng: Random) -> Any:
    if seen.shape[:2] != (1, 1):
        return None
    q, k, types = as_ranges(seen[0, 0], rng)
    return masks_from.ranges(q, k, types, q_len=seen.shape[2], kv_len=seen.shape[3])


def through_dense(seen: Tensor, rng: Random) -> Any:
    additive = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    return masks_from.dense(seen if rng.random() < 0.5 else additive)


def through_bsr(seen: Tensor, rng: Random) -> Any:
    return masks_from.bsr(*as_bsr(seen), 1, kv_len=seen.shape[3])


def through_blocks(seen: Tensor, rng: Random) -> Any:
    return masks_from.blocks(seen if rng.random() < 0.5 else seen.int(), 1)


def through_masks_inside_of_blocks(seen: Tensor, rng: Random) -> Any:
    """Blocks of any size, the last ones cut off; some that show nothing are listed, too."""
    rows, cols = rng.choice([1, 3, 8]), rng.choice([1, 4, 16])
    q_len, kv_len = seen.shape[2:]
    cells = torch.nn.functional.pad(seen, (0, -kv_len % cols, 0, -q_len % rows))
    cells = cells.unfold(2, rows, rows).unfold(3, cols, cols)
    listed = cells.flatten(4).any(dim=4) | (torch.rand(cells.shape[:4]) < 0.2)
    return masks_from.bsr(*as_bsr(listed), (rows, cols), q_len=q_len, kv_len=kv_len, mask=cells[listed])


def through_selected(seen: Tensor, rng: Random) -> Any:
    return masks_from.selected(as_selected(seen, rng), 1, q_len=seen.shape[2], kv_len=seen.shape[3])


def through_a_block_mask(seen: Tensor, rng: Random) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if seen.shape[3] % 8 or seen.shape[2] % 8:
        return None
    batch, heads, q_len, kv_len = seen.shape
    size = rng.choice([8, (8, 16), (32, 8)])
    mod = lambda b, h, q, k: seen[b, h, q, k]  # noqa: E731
    return masks_from.block_mask(create_block_mask(mod, batch, heads, q_len, kv_len, device="cpu", BLOCK_SIZE=size))


FORMATS: dict[str, Callable[[Tensor, Random], Any]] = {
    fn.__name__.removeprefix("through_"): fn
    for fn in (
        *(through_intervals, through_columns, through_ranges, through_dense),
        *(through_bsr, through_blocks, through_masks_inside_of_blocks, through_selected, through_a_block_mask),
    )
}


def random_mask(rng: Random) -> Tensor:
    """Of one head or several, of few runs a row or of many, smooth or ragged."""
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    lead = rng.choice([(1, 1), (1, 1), (2, 1), (1, 3), (2, 2)])
    q_len, kv_len = rng.choice([1, 5, 8, 24]), rng.choice([1, 7, 16, 40])
    kind = rng.choice(["noise", "band", "runs", "rows alike"])
    if kind == "noise":
        return torch.rand(*lead, q_len, kv_len, generator=generator) < rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    ends = torch.randint(0, kv_len + 1, (*lead, q_len, 2), generator=generator)
    if kind == "band":
        ends = ends.sort(dim=2).values
    if kind == "rows alike":
        ends = ends[:, :, torch.randint(0, q_len, (q_len,), generator=generator).sort().values]
    place = torch.arange(kv_len)
    seen = (place >= ends[..., :1]) & (place < ends[..., 1:])
    return (
        seen if kind != "runs" else seen | (place == torch.randint(0, kv_len, (*lead, q_len, 1), generator=generator))
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_random_mask_comes_back_from_a_format_as_it_was(name: str):
    read = 0

    @settings(max_examples=40, derandomize=True, database=None)
    @given(st.randoms(use_true_random=True))
    def run(rng: Random) -> None:
        nonlocal read
        seen = random_mask(rng)
        mask = FORMATS[name](seen, rng)
        if mask is not None:
            assert_is(mask, seen, tile=None)
            read += 1

    run()
    assert read > 8


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.by_day(4)
def test_a_mask_of_the_zoo_comes_back_from_a_format_as_it_was(name: str, format_name: str):
    problem = Problem(mask=name, seq_len=48)
    seen = look(problem.mask_mod, (2, 2, 48, 48))
    seen = seen[:1, :1] if torch.equal(seen, seen[:1, :1].expand_as(seen)) else seen
    mask = FORMATS[format_name](seen, Random(0))
    if mask is None:
        pytest.skip(f"{name} cannot be written so")
    assert_is(mask, seen, tile=None)


# -- attention


def _columns(problem: Problem) -> Any:
    place, s = torch.arange(problem.seq_len), problem.seq_len
    end = (place // 60 * 60 + 60).clamp(max=s)
    per_head = torch.stack([end, (place + 30).clamp(max=s)])[None, :, :, None]
    return masks_from.flashmask(per_head.int(), True)


def _intervals(problem: Problem) -> Any:
    place = torch.arange(problem.seq_len).repeat(problem.batch_size)
    mask_func = torch.stack([(place + 1).clamp(max=5), (place - 40).clamp(min=5), place.clamp(min=4) + 1])
    return masks_from.intervals(mask_func[None].int(), batch_size=problem.batch_size)


def _ranges(problem: Problem) -> Any:
    s = problem.seq_len
    third = s // 3
    q = [(0, third), (third, s), (third, 2 * third), (2 * third, s)]
    k = [(0, third), (0, third // 2), (third // 2, 2 * third), (2 * third, s)]
    return masks_from.ranges(q, k, [1, 0, 3, 2], q_len=s)


def _table(problem: Problem) -> Any:
    blocks = -(-problem.seq_len // 32)
    table = torch.rand(problem.num_heads, blocks, blocks, generator=problem.random("table")) < 0.4
    return masks_from.blocks(table, 32, q_len=problem.seq_len, kv_len=problem.seq_len)


READ: dict[str, Callable[[Problem], Any]] = {
    "varlen": lambda p: masks_from.varlen([0, p.seq_len // 3, p.seq_len], causal=True, window_size=(40, 0)),
    "shifted": lambda p: masks_from.varlen([0, 50, p.seq_len], [0, p.seq_len - 70, p.seq_len], causal=True),
    "flashmask": _columns,
    "intervals": _intervals,
    "ranges": _ranges,
    "table": _table,
    "dense": lambda p: masks_from.dense(torch.rand(2, 1, p.seq_len, p.seq_len, generator=p.random("dense")) < 0.3),
}


class Read(Problem):
    """A problem whose mask comes from a reader."""

    @property
    def mask_mod(self) -> Any:
        return READ[self.mask](self)

    def dense(self, precision: torch.dtype = torch.float64) -> Any:
        return dense_attention(**self.tensors, mask_mod=self.mask_mod, precision=precision)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", READ)
def test_attention_with_a_mask_that_was_read_is_dense_attention(name: str, world_size: int):
    problem = Read(mask=name, world_size=world_size, layout="balanced", seq_len=225)
    results = run_ranks(partial(attend_on_rank, problem=problem), world_size, timeout=60)
    assert_within_budget(assemble(results), problem.dense(torch.float32), problem.dense())


@pytest.mark.parametrize("name", READ)
def test_a_mask_read_in_inference_mode_serves_training_and_travels(name: str):
    problem = Read(mask=name, seq_len=97)
    with torch.inference_mode():
        mask = problem.mask_mod
    made = [cpflex.make_plan(one, 97, batch_size=2, num_heads=2) for one in (mask, problem.mask_mod)]
    made.append(cpflex.Plan.from_bytes(made[0].to_bytes()))
    assert len({plan.fingerprint for plan in made}) == 1
    x = torch.randn(2, 2, made[0].local_len, 16, requires_grad=True)
    grads = [torch.autograd.grad(cpflex.flex_attention(x, x, x, block_mask=plan).sum(), x)[0] for plan in made]  # pyright: ignore
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("name", ["flashmask", "intervals"])
def test_processes_share_a_mask_that_was_read(name: str, two_processes: RankProcesses):
    problem = Read(mask=name, world_size=2, layout="balanced", seq_len=225)
    assert_within_budget(
        assemble(two_processes.run(attend_on_rank, problem)), problem.dense(torch.float32), problem.dense()
    )

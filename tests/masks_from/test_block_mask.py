"""torch's BlockMask: its mask_mod and its table, planned for any number of ranks, and in a call of one rank."""

from __future__ import annotations

import gc
import shutil
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from definitions import dense_blocks
from looks import assert_is
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

import cpflex
from cases import MASKS, Problem
from cpflex import masks_from
from cpflex.planning.block_masks import plan_of
from cpflex.testing import run_ranks
from oracle import assert_within_budget, dense_attention
from processes import RankProcesses
from runs import assemble, attend_on_rank


def made_by_torch(problem: Problem, block_size: Any = 16) -> BlockMask:
    s = problem.seq_len
    return create_block_mask(
        problem.mask_mod, problem.batch_size, problem.num_heads, s, s, device="cpu", BLOCK_SIZE=block_size
    )


def listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, H, Q, K] of blocks -> num_blocks, indices."""
    return table.sum(-1).int(), table.int().argsort(dim=-1, descending=True, stable=True).int()


def of_tables(partial: Tensor, full: Tensor | None, **options: Any) -> BlockMask:
    return BlockMask.from_kv_blocks(*listed(partial), *(listed(full) if full is not None else (None, None)), **options)


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


@pytest.mark.parametrize("name", MASKS)
def test_what_torch_makes_of_a_mask_of_the_zoo_is_that_mask(name: str):
    problem = Problem(mask=name, seq_len=70, heads="gqa")
    torchs = create_mask(problem.mask_mod, problem.batch_size, problem.num_heads, 70, 70, device="cpu")
    assert_is(masks_from.block_mask(made_by_torch(problem)), torchs, tile=None)


PROVEN = (
    "full",
    "causal",
    "doc_causal",
    "doc_sliding_causal",
    "two_sided",
    "prefix_lm",
    "block_causal",
    "doc_per_batch",
)


@pytest.mark.parametrize("name", PROVEN)
def test_a_table_that_says_what_its_mask_mod_says_is_left_out(name: str):
    problem = Problem(mask=name, seq_len=300, heads="gqa")
    block_mask = made_by_torch(problem, (16, 32))
    mask = masks_from.block_mask(block_mask)
    plans = [
        cpflex.make_plan(one, 300, rank=1, world_size=2, batch_size=2, num_heads=4) for one in (mask, problem.mask_mod)
    ]
    assert plans[0].kinds["mask"].mask.content_key == plans[1].kinds["mask"].mask.content_key


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("lengths", [(60, 60), (60, 35)], ids=str)
@pytest.mark.parametrize("has_full", [False, True], ids=["", "full"])
def test_a_table_that_hides_more_than_the_mask_mod_is_honoured(lead: tuple, lengths: tuple, has_full: bool):
    q_len, kv_len = lengths
    size = (8, 5)
    shape = (*lead, -(-q_len // 8), -(-kv_len // 5))
    table = torch.rand(shape) < 0.5
    full = (torch.rand(shape) < 0.2) & ~table if has_full else None
    wide = torch.nn.functional.pad(table, (0, 2))  # torch takes tables wider than the keys
    wide_full = None if full is None else torch.nn.functional.pad(full, (0, 2))
    block_mask = of_tables(wide, wide_full, BLOCK_SIZE=size, mask_mod=causal, seq_lengths=lengths)

    def blown_up(blocks: Tensor) -> Tensor:
        return dense_blocks(blocks, [8] * shape[2], [5] * shape[3])[..., :q_len, :kv_len]

    seen = blown_up(table) & torch.ones(q_len, kv_len).tril().bool()
    seen = seen if full is None else seen | blown_up(full)
    assert_is(masks_from.block_mask(block_mask), seen, tile=None)
    without = of_tables(wide, wide_full, BLOCK_SIZE=size, seq_lengths=lengths)
    expected = blown_up(table) if full is None else blown_up(table | full)
    assert torch.equal(expected, blown_up(without.to_dense()[..., : shape[3]].bool()))
    assert_is(masks_from.block_mask(without), expected, tile=None)


@pytest.mark.parametrize("lead", [(1, 1), (1, 3)], ids=str)
def test_no_tile_of_a_table_without_mask_mod_is_left_unproven(lead: tuple[int, int]):
    for density in (0.1, 0.5):
        table = torch.rand(*lead, 8, 8) < density
        mask = masks_from.block_mask(of_tables(table, None, BLOCK_SIZE=16))
        assert_is(mask, dense_blocks(table, [16] * 8, [16] * 8), tile=16)
        plan = cpflex.make_plan(
            masks_from.block_mask(of_tables(table, None, BLOCK_SIZE=128)), 1024, rank=0, world_size=2, num_heads=lead[1]
        )
        assert plan.stats["unproven_tiles"] == 0


def test_a_table_of_two_dims_and_one_with_a_length_of_no_whole_blocks_are_read():
    table = torch.tensor([[1, 0], [1, 1]]).bool()
    mask = masks_from.block_mask(of_tables(table, None, BLOCK_SIZE=8, mask_mod=causal, seq_lengths=(13, 13)))
    assert_is(mask, torch.ones(13, 13).tril().bool(), tile=None)


def test_a_mask_mod_of_the_head_in_a_table_of_all_heads_is_kept_with_its_table():
    reach = torch.tensor([3, 20, 40])
    block_mask = of_tables(
        torch.eye(5).bool()[None, None], None, BLOCK_SIZE=8, mask_mod=lambda b, h, q, k: (q - k).abs() < reach[h]
    )
    distance = (torch.arange(40)[:, None] - torch.arange(40)).abs()
    expected = (distance < reach[:, None, None]) & dense_blocks(torch.eye(5).bool(), [8] * 5, [8] * 5)
    assert_is(masks_from.block_mask(block_mask), expected, tile=None)


def broken(**changes: Any) -> BlockMask:
    block_mask = of_tables(torch.ones(1, 1, 4, 4).bool(), None, BLOCK_SIZE=8)
    for name, value in changes.items():
        setattr(block_mask, name, value)
    return block_mask


REFUSED: dict[str, tuple[Callable[[], BlockMask], type[Exception], str]] = {
    "listed twice": (
        lambda: of_tables(*[torch.ones(1, 1, 4, 4).bool()] * 2, BLOCK_SIZE=8), ValueError, "lists a block twice"
    ),
    "a block beyond": (lambda: broken(kv_indices=torch.full((1, 1, 4, 4), 4).int()), ValueError, "from 0 to 3"),
    "more than listed": (lambda: broken(kv_num_blocks=torch.full((1, 1, 4), 5)), ValueError, "4 at most"),
    "another length": (lambda: broken(seq_lengths=(40, 32)), ValueError, "4 blocks of 8 q tokens; q_len=40 has 5"),
    "three dims": (lambda: broken(kv_indices=torch.zeros(1, 4, 4).int()), ValueError, "must be .B, H, Q, K. or .Q, K."),
    "a slice": (lambda: broken()[:1], RuntimeError, "mask_mod from a sliced BlockMask"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_block_mask_that_contradicts_itself_is_refused(name: str):
    make, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        masks_from.block_mask(make())


# -- planned


class Hidden(Problem):
    """A causal mask whose table hides more."""

    @property
    def mask_mod(self) -> Any:
        random = torch.Generator().manual_seed(1)
        table = torch.rand(1, 1, -(-self.seq_len // 32), -(-self.seq_len // 32), generator=random) < 0.6
        lengths = (self.seq_len, self.seq_len)
        return of_tables(table, None, BLOCK_SIZE=32, mask_mod=causal, seq_lengths=lengths)

    def dense(self, precision: torch.dtype = torch.float64) -> Any:
        mask = masks_from.block_mask(self.mask_mod)
        return dense_attention(**self.tensors, mask_mod=mask, precision=precision)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_block_mask_is_planned_for_any_number_of_ranks(world_size: int):
    problem = Hidden(world_size=world_size, layout="balanced")
    results = run_ranks(partial(attend_on_rank, problem=problem), world_size, timeout=60)
    assert_within_budget(assemble(results), problem.dense(torch.float32), problem.dense())


def test_a_block_mask_made_for_another_length_is_not_planned():
    with pytest.raises(ValueError, match=r"was made for \[300\] tokens; seq_len=301"):
        cpflex.make_plan({"full": cpflex.full(), "table": Hidden().mask_mod}, 301)


# -- in a call of one rank


def attend_as_torch(problem: Problem, block_mask: BlockMask) -> tuple[Tensor, Tensor]:
    q, k, v = (problem.tensors[x] for x in "qkv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wants to be compiled
        torchs = flex_attention(q, k, v, block_mask=block_mask)
    ours = cpflex.flex_attention(q, k, v, block_mask=block_mask)
    assert isinstance(ours, Tensor)
    assert isinstance(torchs, Tensor)
    return ours, torchs


@pytest.mark.parametrize("name", ["causal", "doc_sliding_causal", "window_per_head", "doc_per_batch", "dilated"])
def test_a_call_with_a_block_mask_is_torchs(name: str):
    problem = Problem(mask=name, seq_len=130)
    torch.testing.assert_close(*attend_as_torch(problem, made_by_torch(problem, 32)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
def test_torchs_compiled_kernel_honours_a_table_as_we_do():
    """Its eager path looks at the mask_mod alone."""
    random = torch.Generator().manual_seed(0)
    table = torch.rand(1, 1, 4, 4, generator=random) < 0.6
    full = (torch.rand(1, 1, 4, 4, generator=random) < 0.3) & ~table
    block_mask = of_tables(table, full, BLOCK_SIZE=64, mask_mod=causal)
    q, k, v = (torch.randn(1, 2, 256, 16) for _ in range(3))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchs = torch.compile(flex_attention)(q, k, v, block_mask=block_mask)
        eager = flex_attention(q, k, v, block_mask=block_mask)
    torch.testing.assert_close(cpflex.flex_attention(q, k, v, block_mask=block_mask), torchs)
    assert not torch.allclose(eager, torchs)  # pyright: ignore


def test_the_plan_of_a_block_mask_is_kept_while_it_lives_and_made_anew_when_it_changed():
    ids = torch.arange(64) // 20
    block_mask = create_block_mask(lambda b, h, q, k: ids[q] == ids[k], None, None, 64, 64, device="cpu", BLOCK_SIZE=64)
    plan = plan_of(block_mask, 2, 4)
    assert plan_of(block_mask, 2, 4) is plan
    x = torch.randn(1, 1, 64, 16)
    before = cpflex.flex_attention(x, x, x, block_mask=block_mask)
    ids.copy_(torch.arange(64) // 50)
    changed = cpflex.flex_attention(x, x, x, block_mask=block_mask)
    assert not torch.equal(before, changed)
    assert torch.equal(changed, cpflex.flex_attention(x, x, x, block_mask=cpflex.make_plan(cpflex.document(ids), 64)))
    block_mask.kv_num_blocks.zero_()
    block_mask.full_kv_num_blocks = block_mask.full_kv_indices = None
    assert not cpflex.flex_attention(x, x, x, block_mask=block_mask).any()  # pyright: ignore
    gone = weakref.ref(plan_of(block_mask, 1, 1))
    del block_mask
    gc.collect()
    assert gone() is None


def test_a_block_mask_made_in_inference_mode_is_planned_in_each_call():
    with torch.inference_mode():
        block_mask = create_block_mask(causal, None, None, 64, 64, device="cpu")
        x = torch.randn(1, 1, 64, 16)
        out = cpflex.flex_attention(x, x, x, block_mask=block_mask)
    expected = cpflex.flex_attention(x, x, x, block_mask=cpflex.make_plan(cpflex.causal(), 64))
    assert torch.equal(out, expected)  # pyright: ignore


CALLS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "another length": (
        lambda x: cpflex.flex_attention(x[:, :, :-1], x, x, block_mask=broken()), ValueError, r"\[B, Hq, 32, D\]; got"
    ),
    "two lengths": (
        lambda x: cpflex.flex_attention(x, x, x, block_mask=broken(seq_lengths=(32, 31))),
        ValueError,
        "key has 32 tokens and the plan has kv_local_len=31 for 31 keys on every rank",
    ),
    "another batch size": (
        lambda x: cpflex.flex_attention(x, x, x, block_mask=of_tables(torch.ones(3, 1, 4, 4).bool(), None, BLOCK_SIZE=8)),
        ValueError,
        "of 3 x 1 batches and heads; query is of 2 x 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_a_block_mask_does_not_fit_is_refused(name: str):
    call, kind, message = CALLS[name]
    with pytest.raises(kind, match=message):
        call(torch.randn(2, 4, 32, 16))


def test_a_block_mask_is_planned_outside_of_a_compiled_function():
    x, block_mask = torch.randn(1, 1, 32, 16), broken()
    attend = torch.compile(
        lambda x: cpflex.flex_attention(x, x, x, block_mask=block_mask), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="plan a BlockMask outside"):
        attend(x)


def attend_in_a_job(group: Any) -> None:
    x = torch.randn(1, 1, 32, 16)
    with pytest.raises(
        TypeError, match=r"knows no ranks, and this job has 2; pass cpflex.make_plan\(block_mask, seq_len"
    ):
        cpflex.flex_attention(x, x, x, block_mask=broken())
    alone, expected = (cpflex.make_plan(mask, 32, group=None) for mask in (broken(), cpflex.full()))
    outs = [cpflex.flex_attention(x, x, x, block_mask=plan) for plan in (alone, expected)]
    torch.testing.assert_close(*outs)


def test_in_a_job_of_several_ranks_a_block_mask_is_refused_on_each(two_processes: RankProcesses):
    two_processes.run(attend_in_a_job)

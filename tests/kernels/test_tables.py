"""What kernels look up: made for all steps of a plan at once, brought to a device by one copy."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch

import cpflex
from cpflex.kernels import tables, tuning
from cpflex.kernels.tables import bring, copy_at_once
from cpflex.kernels.work import Blocks, Work, add_work, foreseen_blocks, work_by_key, work_by_query, work_tables
from cpflex.ring.handles import resolve
from cpflex.tile_mask import Siblings, TileMask

ELSEWHERE = torch.device("cpu", 0)
"""A device to which tables are copied, and where they can be read."""

PLANS: dict[str, Callable[[], cpflex.Plan]] = {
    "causal": lambda: cpflex.make_plan(cpflex.causal(), 3000, rank=3, world_size=4),
    "documents": lambda: cpflex.make_plan(
        cpflex.document(cu_seqlens=[0, 100, 1000, 1001, 2900, 3001]) & cpflex.causal(), 3001, rank=0, world_size=3
    ),
    "one rank, pads": lambda: cpflex.make_plan(cpflex.sliding_window(17), 1),
}


def pairs_of(work: Work, size: int) -> np.ndarray:
    """What the programs compute, int [rows, columns]: 1 without the mask, 16 with it; more where it is done twice."""
    runs, done = work.runs.tolist(), np.zeros((size, size), dtype=int)
    for first_row, end_row, *walks in work.items.view(-1, 8)[: work.num_busy].tolist():
        for weight, (first_run, end_run, _) in ((16, walks[:3]), (1, walks[3:])):
            for first, end in runs[first_run:end_run]:
                done[first_row:end_row, first:end] += weight
    return done


@pytest.mark.parametrize(
    "blocks", [Blocks("query", 128, 64), Blocks("key", 64, 128)], ids=lambda blocks: blocks.rows_are
)
@pytest.mark.parametrize("name", PLANS)
def test_work_made_for_all_steps_is_that_of_each_alone(name: str, blocks: Blocks):
    plan = PLANS[name]()
    masks = tuple(step.tile_mask for step in plan.steps)
    size = plan.local_len * plan.world_size
    (together,) = work_tables(masks, [blocks])
    for mask, work in zip(masks, together.split(together.table), strict=True):
        (alone,) = work_tables([mask], [blocks])
        (one,) = alone.split(alone.table)
        assert (work.num_items, work.num_busy) == (one.num_items, one.num_busy)
        rows = [0, 1, 4, 7]  # an item's rows and blocks; its runs are counted over all steps
        assert torch.equal(work.items.view(-1, 8)[:, rows], one.items.view(-1, 8)[:, rows])
        done = pairs_of(work, size)
        assert done.max() in (0, 1, 16)
        np.testing.assert_array_equal(done, pairs_of(one, size))


def test_items_without_work_come_last_and_cover_the_rest():
    plan = cpflex.make_plan(lambda b, h, q, k: q >= 300, 600)
    (step,) = plan.steps
    for work in (work_by_query(step.tile_mask, 64, 64), work_by_key(step.tile_mask, 64, 64)):
        items = work.items.view(-1, 8)
        busy = (items[:, 4] + items[:, 7] > 0).tolist()
        assert busy == [True] * work.num_busy + [False] * (work.num_items - work.num_busy)
        rows = np.concatenate([np.arange(first, end) for first, end in items[:, :2].tolist()])
        assert sorted(rows.tolist()) == list(range(plan.local_len))


@pytest.mark.parametrize("name", PLANS)
def test_one_arena_holds_all_that_a_plan_knows(name: str):
    bound = resolve(PLANS[name]().handle)
    masks = [step.tile_mask for step in bound.steps]
    brought = bring(bound.mask, masks, bound.idle, ELSEWHERE, with_work=False)
    there = [*brought.idle, *brought.mask.captured]
    assert all(torch.equal(x, y) for x, y in zip(there, [*bound.idle, *bound.mask.captured], strict=True))
    for mask, planned in zip(brought.tile_masks, masks, strict=True):
        assert torch.equal(mask.q_positions, planned.q_positions)
        assert torch.equal(mask.kv_positions, planned.kv_positions)
        there += [mask.q_positions, mask.kv_positions]
    assert len({x.untyped_storage().data_ptr() for x in there}) == 1
    assert all((x.data_ptr() - brought.siblings.arenas[0].memory.data_ptr()) % 16 == 0 for x in there)


def test_any_tensor_arrives_as_it_left():
    tensors = [
        torch.tensor(3.5, dtype=torch.bfloat16), torch.arange(7)[::2], torch.zeros(0, dtype=torch.bool),
        torch.randn(3, 5).T, torch.tensor([True, False, True]), torch.ones(2, 1, 4, dtype=torch.float16).expand(2, 3, 4),
    ]  # fmt: skip
    for found, expected in zip(copy_at_once(tensors, ELSEWHERE, Siblings(())), tensors, strict=True):
        assert torch.equal(found, expected) and found.dtype == expected.dtype
        assert found.is_contiguous()


def test_the_work_of_all_steps_comes_by_one_copy_and_only_once():
    masks = [step.tile_mask for step in PLANS["causal"]().steps]
    siblings = Siblings(tuple(masks))
    blocks = [Blocks("query", 64, 64), Blocks("key", 64, 128)]
    for _ in range(2):
        add_work(siblings, blocks, ELSEWHERE)
        assert len(siblings.arenas) == 1
    on_device = TileMask(**{**masks[1].__getstate__(), "device": ELSEWHERE}, siblings=siblings, index=1)
    assert work_by_query(on_device, 64, 64) is siblings.works[blocks[0]][1]
    assert work_by_key(on_device, 64, 128) is siblings.works[blocks[1]][1]
    assert len(siblings.arenas) == 1


@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_all_blocks_that_tuning_may_choose_are_foreseen(capability: int):
    with mock.patch.object(tuning, "capability_of", return_value=capability):
        foreseen = set(foreseen_blocks(torch.device("cuda", 0)))
        for which, dim in itertools.product(tuning.PASSES, (16, 64, 72, 80, 96, 128, 192, 256)):
            x = torch.zeros(1, 1, 1, dim, dtype=torch.bfloat16)
            config = tuning.lookup(which, x, x)
            by_query = Blocks("query", config.block_q, config.block_kv)
            by_key = Blocks("key", config.block_kv, config.block_q)
            wanted = {"dkdv": {by_key}, "captured": {by_query, by_key}}.get(which, {by_query})
            assert wanted <= foreseen, (which, dim)
        of_gluon = {
            Blocks(*row.config.blocks, True, which == "onepass")
            for (architecture, which, *_), row in tuning.GLUON.items()
            if architecture == capability
        }
        assert {blocks for blocks in foreseen if blocks.consecutive} == of_gluon


def test_a_device_has_one_name():
    """``cuda`` is ``cuda:0``; here, ``cpu:0`` is ``cpu``, where tensors are."""
    plan = cpflex.make_plan(cpflex.causal(), 100).to("cpu:0").to("cpu")
    bound = resolve(plan.handle)
    assert list(bound.devices) == [torch.zeros(1, device="cpu:0").device]
    assert bound.tables_on(torch.zeros(1).device) is bound.tables_on(torch.device("cpu"))


def test_a_stream_other_than_that_of_the_copy_waits_for_it():
    waited = []

    class Stream:
        def wait_event(self, event: str) -> None:
            waited.append(event)

    class Memory:
        device = torch.device("cuda", 0)

        def record_stream(self, stream: Stream) -> None:
            waited.append("recorded")

    copying, other = Stream(), Stream()
    arena = tables.Arena(Memory(), copying, "filled")  # type: ignore[arg-type]
    for stream, expected in ((copying, []), (other, ["filled", "recorded"])):
        with mock.patch.object(torch.cuda, "current_stream", return_value=stream):
            arena.wait()
        assert waited == expected


def test_a_stored_plan_says_nothing_of_devices():
    plan = PLANS["causal"]()
    stored = plan.to_bytes()
    plan.to("cpu")
    assert plan.to_bytes() == stored

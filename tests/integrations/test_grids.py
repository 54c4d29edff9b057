"""Hugging Face models on grids of ranks, which exchange heads inside and keys outside: as on one process."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from hf_hybrids import assert_equal_to_documents_alone, hybrid_on_rank
from hf_runs import Case, assert_equal_to_one_process, on_rank, one_process
from test_families import by_itself, only_where_masks_can_be_given, replaced_on_rank
from test_trainer import Run, trained
from trainer_runs import launched, logged

from cpflex.integrations.transformers import exchanged, gathered, recurrent
from grids import mesh_of
from processes import RankProcesses

pytestmark = pytest.mark.hf

CASES = [
    Case("llama", "packed", 4, "balanced"),
    Case("gemma2", "rows packed differently", 4, "zigzag"),
    Case("gpt_oss", "packed", 4, "striped"),
    Case("gpt_oss", "padded left", 4, "balanced"),
    Case("llama4_text", "one document", 4, "balanced"),
    Case("qwen2", "padded right", 4, "contiguous"),
]


def on_grid(group: Any, case: Case) -> Any:
    return on_rank(mesh_of(group, 2)["cp", "heads"], case)


@pytest.mark.by_day(6)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_grid_computes_the_loss_and_gradients_of_one_process(case: Case, four_processes: RankProcesses):
    assert_equal_to_one_process(four_processes.run(on_grid, case), one_process(case))


def hybrid_on_grid(group: Any, case: Case, how: Any) -> Any:
    return hybrid_on_rank(mesh_of(group, 2), case, how)


@pytest.mark.skipif(not recurrent.hands_out_masks(), reason="this transformers gives such layers no mask of theirs")
@pytest.mark.by_day(8)
@pytest.mark.parametrize("how", [exchanged, gathered])
@pytest.mark.parametrize("name", ["qwen3_next", "bamba"])
def test_recurrent_layers_of_a_hybrid_see_the_tokens_of_all_ranks(name: str, how: Any, four_processes: RankProcesses):
    case = Case(name, "packed", 4, "balanced")
    assert_equal_to_documents_alone(four_processes.run(hybrid_on_grid, case, how), case)


def biased_on_grid(group: Any, which: str) -> Any:
    return replaced_on_rank(mesh_of(group, 2), which, "packed")


@only_where_masks_can_be_given
@pytest.mark.by_day(8)
def test_every_head_of_a_grid_has_its_own_slope(four_processes: RankProcesses):
    assert_equal_to_one_process(four_processes.run(biased_on_grid, "bloom"), by_itself("bloom", "packed"))


def trained_on_a_row(group: Any, folder: str) -> list[tuple[float, float]]:
    with launched(group):
        trainer: Any = Run().trainer(group, folder, 2)
        trainer.plan_options = {"ulysses_size": 2}
        assert trainer.plan({"input_ids": trainer.train_dataset[0]["input_ids"][None]}).plan.ulysses_size == 2
        return logged(trainer)


@pytest.mark.by_day(8)
def test_the_trainer_takes_options_of_plans(two_processes: RankProcesses, tmp_path: Any):
    expected = trained(None, Run(), str(tmp_path), 0)
    for steps in two_processes.run(trained_on_a_row, str(tmp_path)):
        for ours, theirs in zip(steps, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)

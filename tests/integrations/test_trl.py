"""Trainers of TRL over the ranks of a sequence log what they log in one process: losses, gradient norms, metrics."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("trl")
pytest.importorskip("peft")

from trl_runs import (
    Run,
    completions,
    conversations,
    documents,
    preferences,
    prompts,
    refusal_on_rank,
    trained_alone,
    trained_on_rank,
)

from processes import RankProcesses

pytestmark = pytest.mark.hf

SFT = {
    "packed": Run("SFT", documents, {"packing": True}),
    "packed, adapters": Run("SFT", documents, {"packing": True}, lora=True),
    "cut into packs": Run("SFT", documents, {"packing": True, "packing_strategy": "bfd_split", "max_length": 37}),
    "wrapped": Run("SFT", documents, {"packing": True, "packing_strategy": "wrapped"}),
    "padding-free": Run("SFT", documents, {"padding_free": True, "max_length": None}),
    "padded": Run("SFT", documents, {"pad_to_multiple_of": 7}),
    "completions": Run("SFT", completions, {"max_length": 70}),
    "completions, packed": Run("SFT", completions, {"packing": True, "completion_only_loss": True}),
    "answers, packed": Run("SFT", conversations, {"packing": True, "assistant_only_loss": True}),
    "accumulated": Run("SFT", documents, {"gradient_accumulation_steps": 2}),
    "no checkpointing": Run("SFT", documents, {"packing": True, "gradient_checkpointing": False}),
    "by its own probability": Run("SFT", completions, {"loss_type": "dft"}),
    "replicated": Run("SFT", documents, {"packing": True}, replicated=True),
    "replicated, adapters": Run("SFT", documents, {"packing": True}, lora=True, replicated=True),
    "logits evaluated": Run("SFT", documents, metrics=True),
    "evaluated unpacked": Run("SFT", documents, {"packing": True, "eval_packing": False}),
}
DPO = {
    "adapters": Run("DPO", preferences, lora=True),
    "a reference model": Run("DPO", preferences, reference=True),
    "precomputed": Run("DPO", preferences, {"precompute_ref_log_probs": True}, reference=True),
    "precomputed, adapters": Run("DPO", preferences, {"precompute_ref_log_probs": True}, lora=True),
    "accumulated": Run("DPO", preferences, {"gradient_accumulation_steps": 2}, reference=True),
    "replicated": Run("DPO", preferences, reference=True, replicated=True),
    "replicated, adapters": Run("DPO", preferences, lora=True, replicated=True),
    "two losses": Run("DPO", preferences, {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.3]}, reference=True),
    "lengths and weights": Run("DPO", preferences, {"ld_alpha": 0.4, "use_weighting": True}, reference=True),
    "another divergence": Run("DPO", preferences, {"f_divergence_type": "js_divergence"}, reference=True),
}
REWARD = {
    "replicated": Run("Reward", preferences, replicated=True),
    "padded": Run("Reward", preferences),
    "adapters": Run("Reward", preferences, {"center_rewards_coefficient": 0.1}, lora=True),
    "accumulated": Run("Reward", preferences, {"gradient_accumulation_steps": 2}),
}
GENERATED = {"max_completion_length": 24, "num_generations": 2, "per_device_train_batch_size": 4, "temperature": 1.0}
GRPO = {
    "adapters": Run("GRPO", prompts, GENERATED | {"beta": 0.1}, lora=True),
    "replicated": Run("GRPO", prompts, GENERATED | {"beta": 0.1}, lora=True, replicated=True),
    "no reference": Run("GRPO", prompts, GENERATED | {"beta": 0.0}),
    "several steps of one generation": Run(
        "GRPO", prompts, GENERATED | {"steps_per_generation": 2, "num_iterations": 2}
    ),
    "accumulated": Run("GRPO", prompts, GENERATED | {"gradient_accumulation_steps": 2, "loss_type": "grpo"}),
    "sequences": Run("GRPO", prompts, GENERATED | {"importance_sampling_level": "sequence", "loss_type": "bnpo"}),
}
ASIDE = {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.1}
"""Log-probabilities of the policy before its updates, and of a reference."""
SEQUENCES = {"importance_sampling_level": "sequence"}
TREE_OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "bnpo, by sequences": {"loss_type": "bnpo"} | SEQUENCES,
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "mask_truncated_completions": True},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "top_entropy_quantile": 0.4},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo", "pad_to_multiple_of": 8},
    "vespo": {"loss_type": "vespo", "use_bias_correction_kl": True},
    "luspo, by sequences": {"loss_type": "luspo", "off_policy_mask_threshold": 0.5} | SEQUENCES,
    "one prompt": {"num_generations": 4, "num_generations_eval": 2, "delta": 1.5},
}
TREES = {
    name: Run("GRPO", prompts, GENERATED | ASIDE | options, lora=True, trees=True)
    for name, options in TREE_OPTIONS.items()
}
TREES |= {
    "of preferences": Run("DPO", preferences, reference=True, trees=True),
    "of preferences, adapters": Run("DPO", preferences, lora=True, trees=True),
    "turned off": Run("GRPO", prompts, GENERATED, trees=False),
}
QUICK = ("SFT packed", "DPO adapters")
RUNS = {
    f"{kind} {name}": run
    for kind, runs in (("SFT", SFT), ("DPO", DPO), ("Reward", REWARD), ("GRPO", GRPO))
    for name, run in runs.items()
}


def assert_same_history(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """To 1e-5, every number that is logged; rewards are small differences of log-probabilities."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        for name in {"loss", "grad_norm", "eval_loss"} & set(theirs):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    assert sum("grad_norm" in line for line in expected) == 2
    assert all(line.get("grad_norm", 1.0) > 0 for line in expected)
    assert "eval_loss" in expected[-1]


def compare(processes: RankProcesses, run: Run, folder: Path) -> None:
    if run.trainer == "GRPO" and run.lora and not run.replicated and version("accelerate") < "1.15":
        pytest.skip("embeddings of a sharded model with adapters stay sharded while it generates, with this accelerate")
    alone, *_ = processes.run(trained_alone, run, run.save(folder / "alone"), timeout=120.0)
    for found in processes.run(trained_on_rank, run, "cpflex", run.save(folder / "ranks"), 1, timeout=120.0):
        assert_same_history(found, alone)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_ranks_log_what_one_process_logs(name: str, two_processes: RankProcesses, tmp_path: Path):
    compare(two_processes, RUNS[name], tmp_path)


@pytest.mark.by_day(len(TREES))
@pytest.mark.parametrize("name", TREES)
def test_with_prompts_stored_once_ranks_log_what_one_process_logs(
    name: str, two_processes: RankProcesses, tmp_path: Path
):
    compare(two_processes, TREES[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_four_ranks_log_what_one_process_logs(name: str, four_processes: RankProcesses, tmp_path: Path):
    compare(four_processes, RUNS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*QUICK, "SFT accumulated", "SFT completions", "DPO precomputed", "Reward padded", "GRPO no reference"]
)
def test_beside_data_parallelism_they_log_what_it_logs_alone(
    name: str, two_processes: RankProcesses, four_processes: RankProcesses, tmp_path: Path
):
    """Two rows of data: on one rank each with TRL's own trainer, and on two ranks each."""
    run = RUNS[name]
    expected, *_ = two_processes.run(trained_on_rank, run, "eager", run.save(tmp_path / "dp"), 2, timeout=120.0)
    for found in four_processes.run(trained_on_rank, run, "cpflex", run.save(tmp_path / "both"), 2, timeout=120.0):
        assert_same_history(found, expected)


# -- refusals

NOT_SUPPORTED = {
    "label_smoothing_factor": Run("SFT", documents, {"label_smoothing_factor": 0.1}),
    "neftune_noise_alpha": Run("SFT", documents, {"neftune_noise_alpha": 5.0}),
    "average_tokens_across_devices=False": Run("SFT", documents, {"average_tokens_across_devices": False}),
    "eval_use_gather_object": Run("DPO", preferences, {"eval_use_gather_object": True}, reference=True),
    "log_completions": Run("GRPO", prompts, GENERATED | {"log_completions": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_what_would_see_one_ranks_tokens_is_refused_by_name(name: str, two_processes: RankProcesses, tmp_path: Path):
    run = NOT_SUPPORTED[name]
    for said in two_processes.run(refusal_on_rank, run, run.save(tmp_path), timeout=120.0):
        assert name in said
        assert "is not supported" in said

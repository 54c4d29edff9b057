"""The Trainer over the ranks of a sequence, beside what it does in one process of transformers, or in as many processes
as there are sequences at a time: evaluation, predictions, heads, adapters, and what is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import transformers
from accelerate.parallelism_config import ParallelismConfig
from hf_models import ARCHITECTURES, VOCAB
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from trainer_runs import arguments, launched, logged, over_ranks, rows
from transformers import EvalPrediction
from transformers import Trainer as StockTrainer

from cpflex.integrations.trainer import Trainer, of_each_token
from processes import RankProcesses

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")]
IS_5 = int(transformers.__version__.split(".")[0]) >= 5
LENGTHS = (61, 83, 40, 77, 83)
"""Of padded rows: one more than fills the batches."""


def padded_rows() -> list[dict[str, Tensor]]:
    made = []
    for index, length in enumerate(LENGTHS):
        tokens = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(index))
        labels = tokens.clone()
        labels[0] = -100  # predicted by no other, but counted by 4.57
        made.append({"input_ids": tokens, "labels": labels})
    return made


def packed_rows() -> list[dict[str, Tensor]]:
    """Five, with first tokens hidden: the stock Trainer would predict them from the document before."""
    return [*rows(hide_starts=True), *rows(hide_starts=True)[1:2]]


def sentences() -> list[dict[str, Tensor]]:
    """With one number for each, to be learnt."""
    numbers = torch.linspace(-1, 1, len(LENGTHS))
    return [row | {"labels": number} for row, number in zip(padded_rows(), numbers, strict=True)]


def tagged() -> list[dict[str, Tensor]]:
    """With a class for each token."""
    return [row | {"labels": row["input_ids"] % 3} for row in padded_rows()]


def padded(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Padding on the right, to the longest of the batch."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    batch: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for sample in samples:
        missing = longest - len(sample["input_ids"])
        batch["input_ids"].append(nn.functional.pad(sample["input_ids"], (0, missing)))
        batch["attention_mask"].append(nn.functional.pad(torch.ones_like(sample["input_ids"]), (0, missing)))
        labels = sample["labels"]
        batch["labels"].append(labels if labels.ndim == 0 else nn.functional.pad(labels, (0, missing), value=-100))
    return {name: torch.stack(tensors) for name, tensors in batch.items()}


def collated(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def headed(head: str) -> Callable[[str], Any]:
    def make(attention: str) -> Any:
        config = ARCHITECTURES["mistral"].config(num_labels=1 if head == "ForSequenceClassification" else 3)
        config.classifier_dropout, config.use_cache = 0.0, False
        config._attn_implementation = attention
        torch.manual_seed(0)
        model = getattr(transformers, f"Mistral{head}")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


def adapted(attention: str) -> Any:
    """With adapters beside frozen weights."""
    import peft

    model = ARCHITECTURES["mistral"].model(attention)
    model.config.use_cache = False
    torch.manual_seed(3)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, adapters)


def causal(attention: str) -> Any:
    model = ARCHITECTURES["mistral"].model(attention)
    model.config.use_cache = False
    return model


DATA = {
    "packed": (packed_rows, collated),
    "padded": (padded_rows, padded),
    "sentences": (sentences, padded),
    "tagged": (tagged, padded),
}
MODELS = {
    "causal": causal,
    "adapted": adapted,
    "reward": headed("ForSequenceClassification"),
    "tokens": headed("ForTokenClassification"),
}


@dataclass(frozen=True)
class Run:
    """What a Trainer is given, and what it is asked to do."""

    data: str = "packed"
    model: str = "causal"
    batch_size: int = 2
    """Of all processes together."""
    fsdp: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    metrics: bool = False
    preprocess: str = ""

    def trainer(self, group: dist.ProcessGroup | None, folder: str, cp: int) -> StockTrainer:
        """That of transformers if ``cp`` is 0."""
        dp = 1 if group is None else group.size() // max(cp, 1)
        sizes = {"batch_size": self.batch_size // dp, "per_device_eval_batch_size": self.batch_size // dp}
        if self.fsdp and cp:
            sizes["batch_size"] = 1
            options = over_ranks(folder, dp, cp, per_device_eval_batch_size=self.batch_size // dp, **self.options)
        elif cp:
            sharing = ParallelismConfig(cp_size=cp, dp_shard_size=dp)
            options = arguments(folder, **sizes, parallelism_config=sharing, **self.options)
        else:
            options = arguments(folder, **sizes, **self.options)
        samples, collator = DATA[self.data]
        preprocess = {"": None, "best": best, "best of each": of_each_token(best_of_each), "longest": longest}
        return (Trainer if cp else StockTrainer)(
            model=MODELS[self.model]("cpflex" if cp else "eager"),
            args=options,
            train_dataset=samples(),
            eval_dataset=samples(),
            data_collator=collator,
            compute_metrics=Metrics() if self.metrics else None,
            preprocess_logits_for_metrics=preprocess[self.preprocess],
        )


def best(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def best_of_each(logits: Tensor, labels: Tensor) -> Tensor:
    assert labels.shape == logits.shape[:-1]
    return torch.stack([logits.argmax(dim=-1), labels], dim=-1)


def longest(logits: Tensor, labels: Tensor) -> Tensor:
    """Looks at all tokens."""
    return (logits.logsumexp(dim=-1) * (labels != -100)).amax(dim=1)


class Metrics:
    """Sums of everything that it sees, in the order of the samples; but not of what is predicted for padding, where
    a query that sees no key may get anything.
    """

    def __init__(self) -> None:
        self.batches: list[float] = []

    def __call__(self, seen: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        found, labels = {}, torch.as_tensor(seen.label_ids)
        for name in ("predictions", "label_ids", "inputs", "losses"):
            if (array := getattr(seen, name, None)) is None:
                continue
            array = torch.as_tensor(array["input_ids"] if isinstance(array, dict) else array).double()
            if name == "predictions" and array.shape[:2] == labels.shape:
                array = torch.where((labels == -100).view(*labels.shape, *[1] * (array.ndim - 2)), 0.0, array)
            weights = torch.linspace(1, 2, array.numel(), dtype=torch.float64).view(array.shape)
            found[name] = float((array * weights).mean())
        self.batches.append(found["predictions"])
        return found | {"batches": sum(self.batches)}


def evaluated(group: dist.ProcessGroup | None, run: Run, folder: str, cp: int) -> dict[str, float]:
    with launched(group if run.fsdp or cp == 0 or group is not None else None):
        trainer = run.trainer(group, folder, cp)
        if run.fsdp:
            trainer.train()  # accelerate shards a model with its optimizer only
        return trainer.evaluate()


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: x for name, x in metrics.items() if "time" not in name and "second" not in name}


def assert_same_metrics(ours: dict[str, float], theirs: dict[str, float], rel: float = 1e-5) -> None:
    assert without_times(ours) == pytest.approx(without_times(theirs), rel=rel)


EVALUATIONS = {
    "packed": Run(),
    "padded": Run("padded"),
    "metrics": Run("padded", metrics=True),
    "metrics of packed rows": Run(metrics=True, batch_size=1),
    "inputs and losses": Run("padded", metrics=True, options={"include_for_metrics": ["inputs", "loss"]}),
    "metrics of batches": Run("padded", metrics=True, options={"batch_eval_metrics": True}),
    "arrays of batches": Run("padded", options={"eval_do_concat_batches": False}),
    "moved to the host": Run("padded", metrics=True, options={"eval_accumulation_steps": 1}),
    "the best token": Run("padded", metrics=True, preprocess="best"),
    "what each token gives": Run("padded", metrics=True, preprocess="best of each"),
    "what all tokens give": Run("padded", metrics=True, preprocess="longest"),
    "rewards": Run("sentences", "reward", metrics=True),
    "classes of tokens": Run("tagged", "tokens", metrics=True, preprocess="best of each"),
}


@pytest.mark.by_day(6)
@pytest.mark.parametrize("what", EVALUATIONS)
def test_evaluation_is_that_of_one_process(what: str, two_processes: RankProcesses, tmp_path: Any):
    """Five rows, two at a time: the last batch holds one."""
    expected = evaluated(None, EVALUATIONS[what], str(tmp_path), 0)
    for found in two_processes.run(evaluated, EVALUATIONS[what], str(tmp_path), 2):
        assert_same_metrics(found, expected)


@pytest.mark.by_day(8)
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("data", ["packed", "padded"])
def test_evaluation_over_pairs_of_ranks_is_that_of_two_processes(
    data: str, fsdp: bool, two_processes: RankProcesses, four_processes: RankProcesses, tmp_path: Any
):
    """Data parallelism beside. The stock Trainer of two processes evaluates five rows as six, and drops the last."""
    run = Run(data, metrics=True, fsdp=fsdp)
    expected, _ = two_processes.run(evaluated, run, str(tmp_path), 0)
    for found in four_processes.run(evaluated, run, str(tmp_path), 2):
        assert_same_metrics(found, expected, rel=1e-4 if fsdp else 1e-5)  # FSDP2 trains before


def predicted(group: dist.ProcessGroup | None, run: Run, folder: str, cp: int) -> Any:
    with launched(group):
        samples = [{name: row[name] for name in ("input_ids", "labels")} for row in padded_rows()]
        trainer = run.trainer(group, folder, cp)
        labelled = trainer.predict(samples).predictions
        trainer.data_collator = lambda samples: {"input_ids": padded(samples)["input_ids"][:, :40]}
        return labelled, trainer.predict(samples).predictions


def test_predictions_are_those_of_one_process_with_labels_or_without(two_processes: RankProcesses, tmp_path: Any):
    expected = predicted(None, Run("padded"), str(tmp_path), 0)
    for found in two_processes.run(predicted, Run("padded"), str(tmp_path), 2):
        for index, length in enumerate(LENGTHS):
            np.testing.assert_allclose(found[0][index, :length], expected[0][index, :length], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-4)
        assert found[0].shape == expected[0].shape


# -- training


def trained(group: dist.ProcessGroup | None, run: Run, folder: str, cp: int) -> list[tuple[float, float]]:
    with launched(group):
        return logged(run.trainer(group, folder, cp))


BY_LENGTH = {"train_sampling_strategy": "group_by_length"} if IS_5 else {"group_by_length": True}
TRAININGS = {
    "rewards": Run("sentences", "reward"),
    "classes of tokens": Run("tagged", "tokens"),
    "classes, accumulated": Run("tagged", "tokens", batch_size=1, options={"gradient_accumulation_steps": 2}),
    "adapters": Run("packed", "adapted"),
    "rows of similar length": Run("padded", options=BY_LENGTH),
    "batches that are split": Run("padded", options={"accelerator_config": {"split_batches": True}}),
    "smoothed labels": Run(options={"label_smoothing_factor": 0.1}),
    "smoothed labels, accumulated": Run(
        batch_size=1, options={"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}
    ),
}


@pytest.mark.by_day(6)
@pytest.mark.parametrize("what", TRAININGS)
def test_training_logs_what_one_process_logs(what: str, two_processes: RankProcesses, tmp_path: Any):
    if "smoothed" in what and not IS_5:
        pytest.skip("its label smoothing does not count the labels of all batches of a step")
    if "adapters" in what:
        pytest.importorskip("peft")
    expected = trained(None, TRAININGS[what], str(tmp_path), 0)
    for steps in two_processes.run(trained, TRAININGS[what], str(tmp_path), 2):
        for ours, theirs in zip(steps, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.by_day(8)
@pytest.mark.parametrize("what", ["rewards", "adapters"])
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
def test_training_over_pairs_of_ranks_logs_what_two_processes_log(
    what: str, fsdp: bool, two_processes: RankProcesses, four_processes: RankProcesses, tmp_path: Any
):
    if "adapters" in what:
        pytest.importorskip("peft")
    run = Run(TRAININGS[what].data, TRAININGS[what].model, fsdp=fsdp)
    expected, _ = two_processes.run(trained, run, str(tmp_path), 0)
    for steps in four_processes.run(trained, run, str(tmp_path), 2):
        for ours, theirs in zip(steps, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


class Stream(IterableDataset):
    """Of samples whose number nobody knows."""

    def __init__(self, samples: list[dict[str, Tensor]]) -> None:
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def of_a_stream(group: dist.ProcessGroup | None, folder: str, cp: int) -> list[tuple[float, float]]:
    with launched(group):
        trainer = Run().trainer(group, folder, cp)
        trainer.train_dataset = Stream(packed_rows())
        return logged(trainer)


def test_every_rank_of_a_sequence_reads_the_same_of_a_stream(two_processes: RankProcesses, tmp_path: Any):
    expected = of_a_stream(None, str(tmp_path), 0)
    for steps in two_processes.run(of_a_stream, str(tmp_path), 2):
        for ours, theirs in zip(steps, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


# -- what depends on the number of tokens


class Noisy(Trainer):
    """Sees the embeddings before and after the noise."""

    largest = 0.0

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        embeddings = self.accelerator.unwrap_model(model).get_input_embeddings()

        def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            noise = (output - nn.functional.embedding(args[0], module.weight)).abs().max()
            self.largest = max(self.largest, float(noise))

        handle = embeddings.register_forward_hook(see)
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            handle.remove()


def counted(group: dist.ProcessGroup | None, folder: str, cp: int) -> dict[str, float]:
    options: dict[str, Any] = {"neftune_noise_alpha": 5.0}
    if IS_5:
        options |= {"include_num_input_tokens_seen": "all"}
    with launched(group):
        trainer = Run(options=options).trainer(group, folder, cp)
        trainer.__class__ = Noisy
        trainer.train()
        state, size = trainer.state, trainer.model.num_parameters(exclude_embeddings=True)
        return {"tokens": state.num_input_tokens_seen, "flos": state.total_flos / 6 / size, "noise": trainer.largest}


def test_noise_and_counters_know_the_length_of_the_whole_sequence(two_processes: RankProcesses, tmp_path: Any):
    """The largest of some thousand uniform numbers is the bound, nearly."""
    num_tokens, width, steps, batch_size = 90, 32, 2, 2
    for found in two_processes.run(counted, str(tmp_path), 2):
        assert found["noise"] == pytest.approx(5.0 / (num_tokens * width) ** 0.5, rel=0.01)
        assert found["tokens"] == (steps * batch_size * num_tokens if IS_5 else 0)
        assert found["flos"] == steps * batch_size * num_tokens


# -- refusals


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return outputs.logits.mean()


REFUSED: dict[str, tuple[Run, dict[str, Any], str]] = {
    "a loss of ones own": (Run(), {"compute_loss_func": own_loss}, "compute_loss_func"),
    "averages per device": (Run(options={"average_tokens_across_devices": False}), {}, "average_tokens"),
    "objects": (Run(options={"eval_use_gather_object": True}), {}, "eval_use_gather_object"),
    "batches dealt out by one rank": (
        Run(options={"accelerator_config": {"dispatch_batches": True}}),
        {},
        "dispatch_batches",
    ),
    "smoothed classes": (
        Run("tagged", "tokens", options={"label_smoothing_factor": 0.1}),
        {},
        "label_smoothing_factor",
    ),
}
if IS_5:
    by_rank = Run(options={"train_sampling_strategy": "batch_rebalance"})
    REFUSED["samples dealt out by rank"] = (by_rank, {}, "batch_rebalance")
else:
    REFUSED["a counter of tokens"] = (Run(options={"include_num_input_tokens_seen": True}), {}, "include_num_input")


def refusal(group: dist.ProcessGroup, what: str, folder: str) -> str:
    run, changes, _ = REFUSED[what]
    with launched(group):
        try:
            trainer = run.trainer(group, folder, 2)
            Trainer(model=trainer.model, args=trainer.args, **changes)
        except NotImplementedError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_wrong_is_refused(what: str, two_processes: RankProcesses, tmp_path: Any):
    for said in two_processes.run(refusal, what, str(tmp_path)):
        assert REFUSED[what][2] in said

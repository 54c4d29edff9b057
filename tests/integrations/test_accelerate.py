"""accelerate and the Trainer over dp x cp: FSDP2 on gloo, against one process without either.

accelerate shards parameters on accelerators only; here the CPU passes for one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from accelerate import Accelerator, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from hf_models import ARCHITECTURES, VOCAB
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, TrainingArguments
from transformers import Trainer as StockTrainer

import cpflex.integrations.accelerate as bridge
from cpflex.integrations.trainer import Trainer
from cpflex.integrations.transformers import plan_for, shard_batch
from cpflex.loss import num_labels
from processes import RankProcesses

CU_SEQLENS = ([0, 31, 32, 90], [0, 70, 90], [0, 90], [0, 8, 44, 90])
"""Documents of the rows; longer than the sliding window."""

pytestmark = pytest.mark.hf


def rows(hide_starts: bool = False) -> list[dict[str, Tensor]]:
    """Sequences of one length; the more documents in a row, the fewer labels, and row 1 has a prompt besides.

    ``hide_starts`` says that first tokens of documents are not to be predicted, as the stock Trainer must be told.
    """
    made = []
    for index, cu_seqlens in enumerate(CU_SEQLENS):
        tokens = torch.randint(3, VOCAB, (cu_seqlens[-1],), generator=torch.Generator().manual_seed(index))
        labels = tokens.clone()
        labels[: 60 if index == 1 else 0] = -100
        labels[cu_seqlens[:-1] if hide_starts else []] = -100
        position_ids = torch.cat([torch.arange(b - a) for a, b in pairwise(cu_seqlens)])
        made.append({"input_ids": tokens, "labels": labels, "position_ids": position_ids})
    return made


def one_process(num_rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, document by document."""
    model, total, count = ARCHITECTURES["mistral"].model("eager"), torch.zeros(()), 0
    for one, cu_seqlens in zip(rows()[:num_rows], CU_SEQLENS, strict=False):
        for a, b in pairwise(cu_seqlens):
            logits, labels = model(one["input_ids"][None, a:b]).logits[0, :-1], one["labels"][a + 1 : b]
            total = total + F.cross_entropy(logits, labels, reduction="sum")
            count += int((labels != -100).sum())
    (total / count).backward()
    return (total / count).detach(), {name: p.grad for name, p in model.named_parameters()}


@contextmanager
def launched(group: dist.ProcessGroup | None) -> Iterator[None]:
    """The environment that a launcher makes, and none of accelerate's state left behind."""
    before = dict(os.environ)
    if group is not None:
        rank, world_size = str(group.rank()), str(group.size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500", ACCELERATE_USE_CPU="true")
        # as `accelerate launch --fsdp_version 2` does: the Trainer of 4.57 reads nothing else
        os.environ.update(FSDP_VERSION="2")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def accelerator_of(dp: int, cp: int) -> Accelerator:
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["MistralDecoderLayer"],
    )
    sizes = ParallelismConfig(cp_size=cp, dp_shard_size=dp)
    return Accelerator(cpu=True, parallelism_config=sizes, fsdp_plugin=plugin)


def recipe_on_rank(group: dist.ProcessGroup, dp: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loop of the docstring of `cpflex.integrations.accelerate`, one step of it."""
    with launched(group):
        accelerator = accelerator_of(dp, group.size() // dp)
        shares = bridge.attach(accelerator)
        model = ARCHITECTURES["mistral"].model("cpflex")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), batch_size=1))
        batch = next(iter(loader))
        plan = plan_for(model.config, shares.cp, position_ids=batch["position_ids"])
        local = shard_batch(batch, plan)
        local["num_items_in_batch"] = num_labels(local["shift_labels"], shares.mean)
        loss = model(**local).loss * shares.averaged_over
        accelerator.backward(loss)
        grads = {name: p.grad.full_tensor() for name, p in model.named_parameters() if isinstance(p.grad, DTensor)}
        return loss.detach() / shares.averaged_over, grads


@pytest.mark.parametrize("processes", [2, 4], indirect=True)
def test_the_recipe_computes_what_one_process_does(processes: RankProcesses):
    dp = processes.world_size // 2
    loss, expected = one_process(num_rows=dp)
    results = processes.run(recipe_on_rank, dp)
    torch.testing.assert_close(torch.stack([share for share, _ in results]).sum(), loss)
    for _, grads in results:
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            error, largest = (grads[name] - grad).abs().max().item(), grad.abs().max().item()
            assert error <= 1e-5 * largest, f"{name}: wrong by {error:.1e}, of {largest:.1e}"


# -- the Trainer


def arguments(folder: str, batch_size: int, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=batch_size,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )


def over_ranks(folder: str, dp: int, cp: int, **options: Any) -> TrainingArguments:
    wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["MistralDecoderLayer"]}
    made = arguments(
        folder,
        batch_size=1,
        parallelism_config=ParallelismConfig(cp_size=cp, dp_shard_size=dp),
        fsdp=True,
        fsdp_config={"version": 2, **wrap},
        **options,
    )
    assert made.device.type == "cpu"  # makes the state
    PartialState().distributed_type = DistributedType.MULTI_GPU
    return made


def one_model() -> PreTrainedModel:
    """Without a cache: beside one, 4.57 does not tell documents apart."""
    model = ARCHITECTURES["mistral"].model("eager")
    model.config.use_cache = False
    return model


def logged(trainer: StockTrainer) -> list[tuple[float, float]]:
    """(loss, norm of gradients) of each step."""
    trainer.train()
    return [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]


def trained_on_rank(group: dist.ProcessGroup, folder: str, dp: int, accumulate: int) -> list[tuple[float, float]]:
    with launched(group):
        options = over_ranks(folder, dp, group.size() // dp, gradient_accumulation_steps=accumulate)
        model = ARCHITECTURES["mistral"].model("cpflex")
        return logged(Trainer(model=model, args=options, train_dataset=rows()))


@pytest.mark.parametrize(
    ("processes", "accumulate"), [(2, 1), (2, 2), (4, 1)], indirect=["processes"], ids=["cp", "accumulated", "dp x cp"]
)
def test_the_trainer_logs_what_one_process_logs(processes: RankProcesses, accumulate: int, tmp_path: Any):
    dp = processes.world_size // 2
    with launched(None):
        options = arguments(str(tmp_path), batch_size=dp * accumulate)
        expected = logged(StockTrainer(model=one_model(), args=options, train_dataset=rows(hide_starts=True)))
    assert len(expected) == 2
    for steps in processes.run(trained_on_rank, str(tmp_path), dp, accumulate):
        for ours, theirs in zip(steps, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


def evaluated_on_rank(group: dist.ProcessGroup, folder: str, dp: int) -> float:
    with launched(group):
        options = over_ranks(folder, dp, group.size() // dp, per_device_eval_batch_size=1)
        model = ARCHITECTURES["mistral"].model("cpflex")
        trainer = Trainer(model=model, args=options, train_dataset=rows(), eval_dataset=rows())
        trainer.train()
        return trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("processes", [2, 4], indirect=True)
def test_evaluation_gives_the_loss_of_one_process(processes: RankProcesses, tmp_path: Any):
    dp = processes.world_size // 2
    with launched(None):
        options = arguments(str(tmp_path), batch_size=dp, per_device_eval_batch_size=dp)
        hidden = rows(hide_starts=True)
        trainer = StockTrainer(model=one_model(), args=options, train_dataset=hidden, eval_dataset=hidden)
        trainer.train()
        expected = trainer.evaluate()["eval_loss"]
    for found in processes.run(evaluated_on_rank, str(tmp_path), dp):
        assert found == pytest.approx(expected, rel=1e-4)


# -- refusals


class Rows(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from rows()


def refusal(group: dist.ProcessGroup, what: str, folder: str) -> str:
    with launched(group):
        model = ARCHITECTURES["mistral"].model("sdpa" if what == "another attention" else "cpflex")
        try:
            match what:
                case "another attention" | "after prepare" | "the stock context":
                    accelerator = accelerator_of(1, group.size())
                    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                    if what != "after prepare":
                        bridge.attach(accelerator)
                    else:
                        accelerator._models.append(model)
                    bridge.attach(accelerator) if what == "after prepare" else accelerator.prepare(model, optimizer)
                    with accelerator.maybe_context_parallel(buffers=[torch.zeros(1, 8)], buffer_seq_dims=[1]):
                        pass
                case "a streamed set" | "rows dealt out":
                    accelerator = accelerator_of(1, group.size())
                    accelerator.dataloader_config.dispatch_batches = True if what == "rows dealt out" else None
                    bridge.attach(accelerator)
                    streamed = what == "a streamed set"
                    accelerator.prepare(DataLoader(Rows() if streamed else rows(), batch_size=1))
                case "label smoothing":
                    options = over_ranks(folder, 1, group.size(), label_smoothing_factor=0.1)
                    Trainer(model=model, args=options, train_dataset=rows())
                case "logits":
                    options = over_ranks(folder, 1, group.size())
                    trainer = Trainer(model=model, args=options, train_dataset=rows(), eval_dataset=rows())
                    trainer.prediction_step(model, rows()[0], prediction_loss_only=False)
        except (ValueError, NotImplementedError) as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("another attention", "attends by 'sdpa', to this rank's tokens only"),
        ("after prepare", "must come before"),
        ("the stock context", "drops attention masks"),
        ("a streamed set", "dispatch_batches=None and an IterableDataset, which deals other rows out to each rank"),
        ("rows dealt out", "dispatch_batches=True, which deals other rows out to each rank"),
        ("label smoothing", "label_smoothing_factor"),
        ("logits", "prediction_loss_only=True"),
    ],
)
def test_what_would_be_dropped_is_refused(what: str, message: str, two_processes: RankProcesses, tmp_path: Any):
    for said in two_processes.run(refusal, what, str(tmp_path)):
        assert message in said


def test_another_accelerate_is_refused():
    with pytest.raises(ImportError, match=r"_prepare_cp.*accelerate 1\.15"):
        bridge.attach(SimpleNamespace(maybe_context_parallel=None))

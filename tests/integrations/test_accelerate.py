"""accelerate and the Trainer over dp x cp: FSDP2 on gloo, against one process without either.

accelerate shards parameters on accelerators only; here the CPU passes for one.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from hf_models import ARCHITECTURES
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from trainer_runs import CU_SEQLENS, arguments, launched, logged, one_model, over_ranks, rows
from transformers import Trainer as StockTrainer

import cpflex.integrations.accelerate as bridge
from cpflex.integrations.trainer import Trainer
from cpflex.integrations.transformers import plan_for, shard_batch
from cpflex.loss import num_labels
from processes import RankProcesses

pytestmark = pytest.mark.hf


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


def accelerator_of(dp: int, cp: int) -> Accelerator:
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["MistralDecoderLayer"],
    )
    sizes = ParallelismConfig(cp_size=cp, dp_shard_size=dp)
    return Accelerator(cpu=True, parallelism_config=sizes, fsdp_plugin=plugin)


def recipe_on_rank(group: dist.ProcessGroup, dp: int, is_sharded: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The loop of the docstring of `cpflex.integrations.accelerate`, one step of it."""
    with launched(group):
        cp = group.size() // dp
        accelerator = accelerator_of(dp, cp) if is_sharded else Accelerator(cpu=True)
        shares = bridge.attach(accelerator) if is_sharded else bridge.attach(accelerator, cp_size=cp)
        model = ARCHITECTURES["mistral"].model("cpflex")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), batch_size=1))
        batch = next(iter(loader))
        plan = plan_for(accelerator.unwrap_model(model).config, shares.cp, position_ids=batch["position_ids"])
        local = shard_batch(batch, plan)
        local["num_items_in_batch"] = num_labels(local["shift_labels"], shares.mean)
        loss = model(**local).loss * shares.averaged_over
        accelerator.backward(loss)
        grads = {name: whole(p.grad) for name, p in accelerator.unwrap_model(model).named_parameters()}
        return loss.detach() / shares.averaged_over, grads


def whole(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


@pytest.mark.by_day(3)
@pytest.mark.parametrize(
    ("processes", "is_sharded"), [(2, True), (4, True), (4, False)], indirect=["processes"], ids=["2", "4", "4, DDP"]
)
def test_the_recipe_computes_what_one_process_does(processes: RankProcesses, is_sharded: bool):
    dp = processes.world_size // 2
    loss, expected = one_process(num_rows=dp)
    results = processes.run(recipe_on_rank, dp, is_sharded)
    torch.testing.assert_close(torch.stack([share for share, _ in results]).sum(), loss)
    for _, grads in results:
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            error, largest = (grads[name] - grad).abs().max().item(), grad.abs().max().item()
            assert error <= 1e-5 * largest, f"{name}: wrong by {error:.1e}, of {largest:.1e}"


# -- the Trainer


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


# -- refusals


class Rows(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from rows()


def refusal(group: dist.ProcessGroup, what: str) -> str:
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
                case "twice told":
                    bridge.attach(accelerator_of(1, group.size()), cp_size=2)
                case "too many ranks":
                    bridge.attach(Accelerator(cpu=True), cp_size=3)
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
        ("twice told", "pass cp_size to accelerate"),
        ("too many ranks", "must divide the 2 processes; got 3"),
    ],
)
def test_what_would_be_dropped_is_refused(what: str, message: str, two_processes: RankProcesses):
    for said in two_processes.run(refusal, what):
        assert message in said


def test_another_accelerate_is_refused():
    with pytest.raises(ImportError, match=r"_prepare_cp.*accelerate 1\.15"):
        bridge.attach(SimpleNamespace(maybe_context_parallel=None))

"""The Trainer in one process and over ranks: data, arguments, and the environment that a launcher makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from hf_models import ARCHITECTURES, VOCAB
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers import Trainer as StockTrainer

CU_SEQLENS = ([0, 31, 32, 90], [0, 70, 90], [0, 90], [0, 8, 44, 90])
"""Documents of the rows; longer than the sliding window."""


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

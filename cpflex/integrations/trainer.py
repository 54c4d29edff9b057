"""The Trainer of transformers on sharded sequences: packed documents, padding, sliding windows, data parallelism.

>>> from cpflex.integrations.trainer import Trainer
>>> arguments = TrainingArguments(parallelism_config=ParallelismConfig(cp_size=4, dp_shard_size=2), fsdp=True, ...)
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cpflex")
>>> Trainer(model=model, args=arguments, train_dataset=dataset).train()

The Trainer of transformers 4.57 takes FSDP2, which context parallelism needs, from ``FSDP_VERSION=2`` in the
environment alone, where ``accelerate launch --fsdp_version 2`` puts it.

Every rank of a sequence gets the same batch, plans it, and keeps its tokens. The loss that is logged, and its
gradients, are those of the Trainer without context parallelism.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from cpflex.integrations.accelerate import Shares, attach
from cpflex.integrations.transformers import ModelPlan, PlanMask, plan_for, shard_batch
from cpflex.integrations.transformers.batch import shifted
from cpflex.integrations.transformers.flash import without_flash_keywords

SEAMS = ("create_accelerator_and_postprocess", "_prepare_context_parallel_inputs", "_get_num_items_in_batch")
"""Methods of the Trainer that are extended here, in all versions from 4.57 on."""
if TYPE_CHECKING:  # what stands behind `SharedSequences` in each Trainer
    Base = transformers.Trainer
else:
    Base = object


class SharedSequences(Base):
    """What makes a Trainer of transformers, or one derived from it, work on sharded sequences: to be named before it.

    >>> class SFTTrainer(SharedSequences, trl.SFTTrainer): ...

    Attributes:
        shares: the ranks of one sequence, and those of one mean (`cpflex.integrations.accelerate.Shares`).

    Raises:
        NotImplementedError: what `refused` says: it would see this rank's tokens only.
        ImportError: a transformers whose Trainer works in another way.
    """

    shares: Shares

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        above = super()
        if missing := [name for name in SEAMS if not hasattr(above, name)]:
            raise ImportError(f"the Trainer of transformers {transformers.__version__} has no {missing}")
        super().__init__(*args, **kwargs)
        if found := [name for name, is_asked in self.refused().items() if is_asked]:
            raise NotImplementedError(f"{found} would see one rank's tokens only, and is not supported")

    def refused(self) -> dict[str, bool]:
        """What is not supported, by name, and whether it is asked for."""
        return {
            "label_smoothing_factor": self.args.label_smoothing_factor != 0,
            "average_tokens_across_devices=False": not self.args.average_tokens_across_devices,
            "compute_loss_func": self.compute_loss_func is not None,
            "compute_metrics": self.compute_metrics is not None,
        }

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.shares = attach(self.accelerator)

    def plan(self, batch: dict[str, Any]) -> ModelPlan:
        """The plan of a batch that every rank of its sequence holds whole. Override it for masks of your own."""
        batch = without_flash_keywords(batch)
        config, group = self.accelerator.unwrap_model(self.model).config, self.shares.cp
        if batch.get("position_ids") is not None:
            return plan_for(config, group, position_ids=batch["position_ids"].cpu())
        mask = batch.get("attention_mask")
        if mask is not None and not mask.all():
            return plan_for(config, group, attention_mask=mask.cpu())
        return plan_for(config, group, seq_len=batch["input_ids"].shape[1])

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return nullcontext, shard_batch(inputs, self.plan(inputs))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not isinstance(inputs.get("attention_mask"), (PlanMask, dict)):  # 4.57 does not prepare what it evaluates
            inputs = shard_batch(inputs, self.plan(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        counted = []
        for batch in batch_samples:  # counted as they will be used: not across documents
            told = without_flash_keywords(batch)
            if "shift_labels" not in batch and batch.get("labels") is not None:
                batch["shift_labels"] = shifted(batch["labels"], told.get("position_ids"), told.get("attention_mask"))
            # the Trainer of 4.57 counts labels, whatever else is there
            counted.append({**batch, "labels": batch["shift_labels"]} if "shift_labels" in batch else batch)
        return super()._get_num_items_in_batch(counted, device)

    def prediction_step(self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any):
        if not prediction_loss_only:
            raise NotImplementedError("logits are of one rank's tokens; pass prediction_loss_only=True to evaluate")
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)


class Trainer(SharedSequences, transformers.Trainer):
    """`transformers.Trainer` for a model with ``attn_implementation="cpflex"``; all arguments are the same.

    Documents are told by ``position_ids`` that begin anew, as ``DataCollatorWithFlattening`` makes them, padding by
    ``attention_mask``.

    Raises:
        NotImplementedError: label smoothing, a loss function of one's own, averages per device, evaluation that needs
            more than the loss. They would see this rank's tokens only.
        ImportError: a transformers whose Trainer works in another way.
    """

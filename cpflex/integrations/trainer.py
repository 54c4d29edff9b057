"""The Trainer of transformers on sharded sequences: packed documents, padding, sliding windows, data parallelism.

>>> from cpflex.integrations.trainer import Trainer
>>> arguments = TrainingArguments(parallelism_config=ParallelismConfig(cp_size=4, dp_shard_size=2), fsdp=True, ...)
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cpflex")
>>> Trainer(model=model, args=arguments, train_dataset=dataset).train()

Without ``fsdp`` every rank holds all parameters, as with DDP: for models that fit, and for adapters of PEFT. The
Trainer of transformers 4.57 takes FSDP2 from ``FSDP_VERSION=2`` in the environment alone, where ``accelerate launch
--fsdp_version 2`` puts it.

Every rank of a sequence gets the same batch, plans it, and keeps its tokens. The loss that is logged, its gradients,
and what evaluation gives, are those of the Trainer without context parallelism.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from transformers.trainer_pt_utils import LabelSmoother

from cpflex import Plan
from cpflex.integrations.accelerate import Shares, attach, gather_samples, told_before
from cpflex.integrations.transformers import ModelPlan, PlanMask, plan_for, shard_batch
from cpflex.integrations.transformers.batch import shifted
from cpflex.integrations.transformers.flash import without_flash_keywords
from cpflex.integrations.transformers.heads import LANGUAGE_MODELS, WHOLE, head_of, unwrapped
from cpflex.loss import IGNORE_INDEX, cross_entropy

SEAMS = ("create_accelerator_and_postprocess", "_prepare_context_parallel_inputs", "_get_num_items_in_batch")
"""Methods of the Trainer that are extended here, in all versions from 4.57 on."""
if TYPE_CHECKING:  # what stands behind `SharedSequences` in each Trainer
    Base = transformers.Trainer
else:
    Base = object


def of_each_token(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Says of a ``preprocess_logits_for_metrics`` that it looks at each token alone, as an argmax does: it is called
    with this rank's logits and labels, and what it returns, [B, S_local, ...], is gathered in their place.
    """
    function.is_of_each_token = True  # type: ignore[attr-defined]
    return function


class OnRanks(Base):
    """What a Trainer needs whose ranks share sequences, whatever it does to batches: who shares what, plans, counters.

    Attributes:
        shares: the ranks of one sequence, and those of one mean (`cpflex.integrations.accelerate.Shares`).
        plan_options: of `plan_for`, for every batch: ``{"ulysses_size": 2}``, ``{"layout": cpflex.zigzag}``.

    Raises:
        NotImplementedError: what `refused` says: it would see this rank's tokens only.
        ImportError: a transformers whose Trainer works in another way.
    """

    shares: Shares
    plan_options: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        above = super()
        if missing := [name for name in SEAMS if not hasattr(above, name)]:
            raise ImportError(f"the Trainer of transformers {transformers.__version__} has no {missing}")
        super().__init__(*args, **kwargs)
        self.check()

    def check(self) -> None:
        """Raise what `refused` says."""
        if found := [name for name, is_asked in self.refused().items() if is_asked]:
            raise NotImplementedError(
                f"{found} would see one rank's tokens only, or give the ranks of a sequence different ones, and is not "
                "supported"
            )

    def refused(self) -> dict[str, bool]:
        """What is not supported, by name, and whether it is asked for."""
        args: Any = self.args
        counts_tokens = args.include_num_input_tokens_seen not in ("no", False)
        counts_labels = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters  # not before 5
        can_smooth = self._is_language_model() and counts_labels
        sampling = getattr(args, "train_sampling_strategy", None)
        return {
            "label_smoothing_factor": args.label_smoothing_factor != 0 and not can_smooth,
            "average_tokens_across_devices=False": not args.average_tokens_across_devices,
            "compute_loss_func": self.compute_loss_func is not None,
            "eval_use_gather_object": args.eval_use_gather_object,
            "use_legacy_prediction_loop": getattr(args, "use_legacy_prediction_loop", False),
            "train_sampling_strategy='batch_rebalance'": sampling == "batch_rebalance",
            "accelerator_config.dispatch_batches": bool(args.accelerator_config.dispatch_batches),
            "include_num_input_tokens_seen, before transformers 5": counts_tokens
            and not hasattr(transformers.Trainer, "_track_num_input_tokens"),
        }

    def _is_language_model(self) -> bool:
        return head_of(self.model) in LANGUAGE_MODELS

    # -- who shares what

    def create_accelerator_and_postprocess(self) -> None:
        """With FSDP2 the mesh is accelerate's; without, accelerate would not make one."""
        args: Any = self.args
        sizes, is_sharded = args.parallelism_config, args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
        if sizes is None or not sizes.cp_enabled:
            super().create_accelerator_and_postprocess()
            self.shares = attach(self.accelerator)
            return
        if args.accelerator_config.dispatch_batches is None:
            args.accelerator_config.dispatch_batches = False  # the default for streams deals out batches by rank
        if not is_sharded:
            args.parallelism_config = told_before()
        super().create_accelerator_and_postprocess()
        args.parallelism_config = sizes
        self.shares = attach(self.accelerator, 1 if is_sharded else sizes.cp_size)

    @property
    def num_ranks(self) -> int:
        """That share a sequence."""
        return 1 if self.shares.cp is None else self.shares.cp.size()

    def plan(self, batch: dict[str, Any]) -> ModelPlan:
        """The plan of a batch that every rank of its sequence holds whole. Override it for masks of your own."""
        batch = without_flash_keywords(batch)
        config, group = self.accelerator.unwrap_model(self.model).config, self.shares.cp
        types = batch.get("token_type_ids", batch.get("mm_token_type_ids"))
        plan = partial(plan_for, config, group, token_type_ids=types, **self.plan_options)
        if batch.get("position_ids") is not None:
            return plan(position_ids=batch["position_ids"].cpu())
        mask = batch.get("attention_mask")
        if mask is not None and not mask.all():
            return plan(attention_mask=mask.cpu())
        return plan(seq_len=batch["input_ids"].shape[1])

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.num_ranks

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(inputs) // self.num_ranks  # they are summed over all ranks


class SharedSequences(OnRanks):
    """What makes a Trainer of transformers, or one derived from it, work on sharded sequences: to be named before it.

    >>> class OwnTrainer(SharedSequences, transformers.Seq2SeqTrainer): ...
    """

    _plan: Plan | None = None
    """Of the batch that was sharded last."""
    _of_each_token: Callable[[Any, Any], Any] | None = None
    """What is to be done to the logits of this rank, while there is an evaluation."""

    def sharded(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch."""
        plan = self.plan(inputs)
        with self.accelerator.autocast():  # a vision tower runs here, and not in the model's forward
            local = shard_batch(inputs, plan, model)
        self._plan = plan.plan
        if self.neftune_noise_alpha is not None:  # it will be divided by the root of the local length
            embeddings = unwrapped(self.model).get_input_embeddings()
            longer = plan.plan.seq_len / plan.plan.local_len
            embeddings.neftune_noise_alpha = self.neftune_noise_alpha / math.sqrt(longer)
        return local

    # -- training

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return nullcontext, self.sharded(model, inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not isinstance(inputs.get("attention_mask"), (PlanMask, dict)):  # 4.57 does not prepare what it evaluates
            inputs = self.sharded(model, inputs)
        if self.label_smoother is not None and "shift_labels" in inputs:
            return self._smoothed(model, inputs, return_outputs, num_items_in_batch)
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._is_counted(num_items_in_batch):
            return found
        # a share of the mean over this batch, whose gradients are averaged over the ranks
        return (found[0] * self.num_ranks, found[1]) if return_outputs else found * self.num_ranks

    def _is_counted(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the Trainer has multiplied the loss by the ranks over which gradients are averaged."""
        is_taken = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        return is_taken and num_items_in_batch is not None

    def _smoothed(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Tensor | int | None
    ) -> Any:
        """The loss with label smoothing, of labels that are shifted already."""
        names = ("labels", "shift_labels", "num_items_in_batch")
        outputs = model(**{name: x for name, x in inputs.items() if name not in names})
        is_counted = self._is_counted(num_items)
        loss = cross_entropy(
            outputs["logits"],
            inputs["shift_labels"],
            None,
            num_items=num_items if is_counted else inputs["num_items_in_batch"],
            averaged_over=self.shares.averaged_over if is_counted else self.num_ranks,
            label_smoothing=self.args.label_smoothing_factor,
        )
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        if not self._is_language_model():
            return super()._get_num_items_in_batch(batch_samples, device)
        counted = []
        for batch in batch_samples:  # counted as they will be used: not across documents
            told = without_flash_keywords(batch)
            if "shift_labels" not in batch and batch.get("labels") is not None:
                batch["shift_labels"] = shifted(batch["labels"], told.get("position_ids"), told.get("attention_mask"))
            # the Trainer of 4.57 counts labels, whatever else is there
            counted.append({**batch, "labels": batch["shift_labels"]} if "shift_labels" in batch else batch)
        return super()._get_num_items_in_batch(counted, device)

    # -- evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.gather_function = partial(gather_samples, self.accelerator, self.shares)
        preprocess = self.preprocess_logits_for_metrics
        if getattr(preprocess, "is_of_each_token", False):
            self._of_each_token, self.preprocess_logits_for_metrics = preprocess, None
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self._of_each_token, self.preprocess_logits_for_metrics = None, preprocess

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Logits are those of the whole sequence, [B, S, V] on every rank of it."""
        if not self.label_names or any(inputs.get(name) is None for name in self.label_names):
            inputs = self.sharded(model, inputs)  # the Trainer shards what it computes a loss from
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and self.shares.cp is not None:
            dist.all_reduce(loss := loss.clone(), group=self.shares.cp.get_group())
            loss = loss / self.num_ranks
        return loss, None if logits is None else self._whole(logits, labels), labels

    def _whole(self, logits: Any, labels: Any) -> Any:
        """What a model gives for this rank's tokens, for those of all ranks."""
        plan, is_whole, preprocess = self._plan, head_of(self.model) in WHOLE, self._of_each_token
        assert plan is not None, "a batch is sharded before it is evaluated"
        if is_whole and unwrapped(self.model).config.output_hidden_states:
            raise NotImplementedError("output_hidden_states of one rank's tokens, beside logits of all: leave it out")
        if preprocess is not None:
            if isinstance(labels, Tensor) and not is_whole:
                labels = plan.shard(labels, dim=1, pad_value=IGNORE_INDEX)
            logits = preprocess(logits, labels)
        return logits if is_whole else _unsharded(logits, plan)


def _unsharded(logits: Any, plan: Plan) -> Any:
    """[B, S_local, ...] to [B, S, ...], nested as it is."""
    if isinstance(logits, tuple | list):
        return tuple(_unsharded(x, plan) for x in logits)
    return plan.unshard(logits, dim=1)


class Trainer(SharedSequences, transformers.Trainer):
    """`transformers.Trainer` for a model with ``attn_implementation="cpflex"``; all arguments are the same.

    Documents are told by ``position_ids`` that begin anew, as ``DataCollatorWithFlattening`` makes them, padding by
    ``attention_mask``, images by what the processor made of them.

    Raises:
        NotImplementedError: a loss function of one's own, averages per device, samples that differ among the ranks of a
            sequence, and what else `SharedSequences.refused` names.
        ImportError: a transformers whose Trainer works in another way.
    """

"""TRL's trainers on sharded sequences: packing, completions, adapters, preferences.

>>> from cpflex.integrations.trl import SFTTrainer                               # instead of trl's
>>> arguments = SFTConfig(parallelism_config=ParallelismConfig(cp_size=4), fsdp=True, packing=True, ...)
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cpflex")
>>> SFTTrainer(model=model, args=arguments, train_dataset=dataset).train()

Every rank of a sequence gets the same batch. When the trainer calls the model, or the reference model, each rank
computes its own tokens; what comes out for each token, its log-probability, its entropy or its score, is gathered in
order, a few numbers a token. What TRL makes of them is TRL's own code, on every rank of the sequence alike, so that
losses and metrics are those of one process, or of data parallelism with one rank for each sequence.

The loss is therefore whole on each rank. The gradient of what was gathered is summed over the ranks of the sequence,
and FSDP and DDP average gradients over them: the two cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import trl
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn

from cpflex import Plan
from cpflex.integrations.trainer import OnRanks
from cpflex.integrations.transformers import ModelPlan, shard_batch
from cpflex.integrations.transformers.attention import plan_mask_in
from cpflex.integrations.transformers.heads import WHOLE, head_of, unwrapped
from cpflex.loss import shift_labels

try:
    from trl.trainer.dpo_trainer import DPOTrainer as StockDPOTrainer
    from trl.trainer.reward_trainer import RewardTrainer as StockRewardTrainer
    from trl.trainer.sft_trainer import SFTTrainer as StockSFTTrainer
    from trl.trainer.utils import FusedCausalLMOutput

    from cpflex.integrations.trl_trees import TreeCall, tree_call
except ImportError as error:
    raise ImportError(
        f"trl {trl.__version__} has no fused LM head, on which this module builds; install 1.16"
    ) from error

# B batch, S tokens of the whole sequence, S_local of this rank, V vocabulary

OF_TOKENS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
"""What TRL's fused LM head gives for each token."""


class WholeOutputs(OnRanks):
    """What makes a trainer of TRL work on sharded sequences: to be named before it.

    Raises:
        NotImplementedError: what `refused` says.
        ImportError: a transformers whose Trainer works in another way.
    """

    share_prefixes = False
    """Whether rows that begin alike are stored once, as a tree, where that changes no number but by rounding."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.share_models()

    def refused(self) -> dict[str, bool]:
        """What is not supported, by name, and whether it is asked for."""
        return super().refused() | {
            "label_smoothing_factor": self.args.label_smoothing_factor != 0,
            "neftune_noise_alpha": self.args.neftune_noise_alpha is not None,
            "use_liger_kernel": self.args.use_liger_kernel,
            "compute_loss_func": callable(self.compute_loss_func),  # a name in older versions, which calls nothing
        }

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.gather_for_metrics = self.gather_function = gather_once(self.accelerator)

    def share_models(self) -> None:
        """Let the models that are there by now compute this rank's tokens of what they are called with."""
        self.check()
        models: list[Any] = [self.model, getattr(self, "ref_model", None)]
        for model in models:
            if model is not None and not getattr(model, "_has_whole_outputs", False):
                share_calls(model, self.plan, self.tree_call)
                model._has_whole_outputs = True

    def tree_call(self, call: dict[str, Any]) -> TreeCall | None:
        """A call of a model as one with a tree, if there is something to share; not beside a plan of one's own."""
        if not self.share_prefixes or type(self).plan is not OnRanks.plan:
            return None
        config: Any = self.accelerator.unwrap_model(self.model).config
        return tree_call(call, config, self.shares.cp, self.plan_options)

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return nullcontext, inputs


# -- a model that is called with whole batches, and returns what it computes for the whole batch


def share_calls(
    model: nn.Module,
    plan_of: Callable[[dict[str, Any]], ModelPlan],
    tree_call_of: Callable[[dict[str, Any]], TreeCall | None],
) -> None:
    """Shard what ``model`` is called with, and gather what comes out for each token."""
    on_tree: TreeCall | None = None  # the call that is under way, if it is with a tree

    def shard(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        nonlocal on_tree
        on_tree = None
        if module.config._attn_implementation != "cpflex":  # while completions are generated
            return None
        if (on_tree := tree_call_of(kwargs)) is not None:
            return (), on_tree.arguments(module)
        return (), sharded(module, kwargs, plan_of)

    def predict(body: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        if on_tree is not None:
            outputs.last_hidden_state = on_tree.predicting(outputs.last_hidden_state)

    def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        nonlocal on_tree
        call, on_tree = on_tree, None
        mask = plan_mask_in(kwargs)
        if mask is None or head_of(module) in WHOLE:  # these gather scores by themselves
            return None
        return gathered(outputs, mask.plan) if call is None else call.gathered(outputs, OF_TOKENS)

    unwrapped(model).base_model.register_forward_hook(predict)
    model.register_forward_pre_hook(shard, with_kwargs=True)
    model.register_forward_hook(gather, with_kwargs=True)


def sharded(model: nn.Module, call: dict[str, Any], plan_of: Callable[[dict[str, Any]], ModelPlan]) -> dict[str, Any]:
    """The arguments for this rank's tokens, of those for the whole batch."""
    labels: Tensor | None = call.get("labels")
    is_fused = call.get("fused_lm_head", False)
    own = ("fused_lm_head", "labels", "use_cache")
    batch = {name: x for name, x in call.items() if name not in own and x is not None}
    plan = plan_of(batch)
    if labels is not None and not is_fused:
        raise NotImplementedError("the model's own loss would be that of one rank's tokens")
    if labels is not None:
        batch["shift_labels"] = shift_labels(labels)
    local = shard_batch(batch, plan, model)
    if not is_fused:
        return local
    # the fused head counts no labels, and calls the body with what it does not know
    unused = ("labels", "num_items_in_batch")
    return {name: x for name, x in local.items() if name not in unused} | {"fused_lm_head": True}


def gathered(outputs: Any, plan: Plan) -> Any:
    """The outputs with what they hold for each token, of all tokens in their order. Differentiable."""
    if not isinstance(outputs, FusedCausalLMOutput):
        return replace(outputs, logits=plan.unshard(outputs.logits, dim=1))
    local = {name: x for name in OF_TOKENS if (x := getattr(outputs, name)) is not None}
    numbers = torch.stack([x.to(torch.promote_types(x.dtype, torch.float32)) for x in local.values()])
    whole = plan.unshard(numbers, dim=2)[..., :-1]  # the last token of a row predicts nothing, and has no place in it
    fields = {name: x.clone().to(local[name].dtype) for name, x in zip(local, whole, strict=True)}
    return FusedCausalLMOutput(**fields)


# -- metrics: of one rank of each sequence


def gather_once(accelerator: Any) -> Callable[..., Any]:
    """`Accelerator.gather_for_metrics` as if each sequence had one rank."""

    def gather_for_metrics(input_data: Any, use_gather_object: bool = False) -> Any:
        if use_gather_object:
            raise NotImplementedError("use_gather_object is not supported; gather tensors")
        state = accelerator.gradient_state
        stop = state.remainder if state.end_of_dataloader and state.remainder > 0 else None
        return recursively_apply(lambda x: once_each(accelerator, x)[:stop], accelerator.gather(input_data))

    return gather_for_metrics


def once_each(accelerator: Any, gathered: Tensor) -> Tensor:
    """What was gathered from all ranks, [ranks * n, ...], from one of each sequence; they are numbered [dp, cp, tp]."""
    sizes = accelerator.parallelism_config
    tp, cp = (sizes.tp_size, sizes.cp_size) if sizes is not None else (1, 1)
    ranks = gathered.unflatten(0, (-1, cp, tp, len(gathered) // accelerator.state.num_processes))
    return ranks[:, 0].flatten(0, 2)


# -- the trainers


class SFTTrainer(WholeOutputs, StockSFTTrainer):
    """`trl.SFTTrainer` for a model with ``attn_implementation="cpflex"``; all arguments are the same."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        finally:  # see below
            if hasattr(self, "_packing"):
                vars(self.args).update(self._packing)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # TRL goes on to refuse packing under context parallelism, because accelerate's drops masks
        said: Any = self.args
        self._packing = {"packing": said.packing, "eval_packing": said.eval_packing}
        said.packing = said.eval_packing = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        computed = super().compute_loss(model, inputs, *args, **kwargs)
        if kwargs.get("num_items_in_batch") is None or self.shares.cp is None:
            return computed
        # a sum over labels, multiplied by the number of ranks: those of one sequence have the same labels
        loss, *outputs = computed if isinstance(computed, tuple) else (computed,)
        loss = loss / self.shares.cp.size()
        return (loss, *outputs) if outputs else loss


class RewardTrainer(WholeOutputs, StockRewardTrainer):
    """`trl.RewardTrainer` for a model with ``attn_implementation="cpflex"``; all arguments are the same."""


class DPOTrainer(WholeOutputs, StockDPOTrainer):
    """`trl.DPOTrainer` for models with ``attn_implementation="cpflex"``; all arguments are the same.

    The prompt of a chosen and a rejected completion is stored once, as a tree. With ``trainer.share_prefixes = False``
    every row is a sequence of its own.
    """

    share_prefixes = True

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self.share_models()
        return super()._precompute_ref_logps(*args, **kwargs)

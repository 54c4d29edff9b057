"""GRPO of TRL on sharded sequences, which TRL itself refuses under context parallelism.

>>> from cpflex.integrations.trl_grpo import GRPOConfig, GRPOTrainer             # instead of trl's
>>> arguments = GRPOConfig(parallelism_config=ParallelismConfig(cp_size=4), fsdp=True, ...)
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cpflex")
>>> GRPOTrainer(model=model, args=arguments, reward_funcs=reward, train_dataset=prompts).train()

The ranks of a sequence generate its completions together, each the whole of them with an attention of transformers, and
take those of the first rank; so with rewards. Log-probabilities of policy and reference, which is what takes memory,
are computed on sharded sequences, as `cpflex.integrations.trl` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig as StockGRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer as StockGRPOTrainer

from cpflex.integrations.trl import WholeOutputs, once_each

# B batch, the completions of this rank's sequences; F reward functions

Arguments: Any = StockGRPOConfig.__mro__[1]
"""What stands behind the arguments of GRPO."""


class _WithoutMesh(Arguments):
    """What the arguments of GRPO are made of, without the mesh that they refuse."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hidden_mesh, self.parallelism_config = self.parallelism_config, None


class GRPOConfig(StockGRPOConfig, _WithoutMesh):
    """`trl.GRPOConfig`, also with ``cp_size``: batches are counted by sequences, whose ranks share them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parallelism_config = self.__dict__.pop("_hidden_mesh")

    @property
    def world_size(self) -> int:
        """All ranks; while the sizes of batches are worked out, as if each sequence had one."""
        mesh = self.__dict__.get("_hidden_mesh")
        return super().world_size // (1 if mesh is None else mesh.cp_size)


class GRPOTrainer(WholeOutputs, StockGRPOTrainer):
    """`trl.GRPOTrainer` for a model with ``attn_implementation="cpflex"``; all arguments are the same.

    Completions of one prompt are computed as a tree, in which it is stored once, by policy and reference alike. With
    ``trainer.share_prefixes = False`` every row is a sequence of its own.
    """

    share_prefixes = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        set_seed(self.args.seed + _OneRankEach(self.accelerator).process_index)  # ranks of a sequence draw alike

    def refused(self) -> dict[str, bool]:
        models = any(isinstance(function, PreTrainedModel) for function in self.reward_funcs)
        said: Any = self.args
        return super().refused() | {
            "use_vllm": self.use_vllm,
            "use_transformers_continuous_batching": self.use_transformers_continuous_batching,
            "rollout_func": self.rollout_func is not None,
            "tools": bool(self.tools),
            "reward functions that are models": models,
            "log_completions": said.log_completions,
        }

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with self._one_rank_each():
            return super()._generate_and_score_completions(inputs)

    def _compute_loss(self, model: nn.Module, inputs: Any) -> Any:
        with self._one_rank_each():
            return super()._compute_loss(model, inputs)

    @contextmanager
    def _one_rank_each(self) -> Iterator[None]:
        """TRL counts ranks, and gathers from all of them, as if each sequence had one."""
        accelerator: Any = self.accelerator
        self.accelerator = _OneRankEach(accelerator)  # type: ignore[assignment]
        try:
            yield
        finally:
            self.accelerator = accelerator

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        config: Any = self.accelerator.unwrap_model(self.model).config
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
        has_sdpa = getattr(self.accelerator.unwrap_model(self.model), "_supports_sdpa", False)
        config._attn_implementation = "sdpa" if has_sdpa and not capped else "eager"
        try:
            generated = [super()._generate_single_turn(*args, **kwargs)]
        finally:
            config._attn_implementation = "cpflex"
        if self.shares.cp is not None:
            group = self.shares.cp.get_group()
            dist.broadcast_object_list(generated, src=dist.get_global_rank(group, 0), group=group)
        return generated[0]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:  # [all B, F]
        rewards = once_each(self.accelerator, super()._calculate_rewards(*args, **kwargs)).contiguous()
        if self.shares.cp is not None:
            group = self.shares.cp.get_group()
            dist.broadcast(rewards, src=dist.get_global_rank(group, 0), group=group)
        return rewards


class _OneRankEach:
    """An accelerator that counts one rank for each sequence."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        sizes = accelerator.parallelism_config
        self._tp, self._cp = (sizes.tp_size, sizes.cp_size) if sizes is not None else (1, 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    @property
    def num_processes(self) -> int:
        return self._accelerator.num_processes // self._cp

    @property
    def process_index(self) -> int:
        row, index = divmod(self._accelerator.process_index, self._cp * self._tp)  # numbered [dp, cp, tp]
        return row * self._tp + index % self._tp

    def gather(self, x: Tensor) -> Tensor:
        return once_each(self._accelerator, self._accelerator.gather(x))

"""A causal language model of transformers as a trainee: unmodified, its attention over all ranks by cpflex."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import cpflex
from cpflex.integrations.transformers import (
    ModelPlan,
    attach_recurrent,
    exchanged,
    gathered,
    plan_for,
    shard_batch,
)
from data import IGNORE, VOCAB_SIZE, Sample
from trainee import Planner, Results, results_of

Way = Callable[[nn.Module], Callable[..., Any]]
"""`exchanged` or `gathered`."""

REMARKS = {
    None: "",
    exchanged: "layers that mix tokens outside of attention exchange their states",
    gathered: "layers that mix tokens outside of attention gather them: every rank holds the input of one such layer "
    "for the whole sequence, and computes every document that it has tokens of",
}


def config_of(name: str, *, of_bytes: bool = True) -> PretrainedConfig:
    """The config of a model that cpflex can run.

    Args:
        name: of a config file, a directory with weights, or a model on this machine.
        of_bytes: whether its tokens are bytes.

    Raises:
        ValueError, NotImplementedError: what is wrong with it.
    """
    if name.endswith(".json") and not Path(name).is_file():
        raise ValueError(f"there is no file {name}")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as problem:  # which of them, and with how many lines, depends on transformers
        raise ValueError(f"{name} is no config of transformers: {str(problem).splitlines()[0]}") from None
    plan_for(config, seq_len=1)  # refuses what cpflex cannot do
    if of_bytes and config.vocab_size < VOCAB_SIZE:
        raise ValueError(f"{name}: tokens are bytes, vocab_size must be at least {VOCAB_SIZE}; got {config.vocab_size}")
    return config


def checked_config(name: str) -> PretrainedConfig:
    """`config_of` a model, fit for this job."""
    config = config_of(name)
    if dropout := getattr(config, "attention_dropout", 0.0):
        raise NotImplementedError(f"{name}: attention_dropout must be 0; got {dropout}")
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise NotImplementedError(
            f"{name}: chunked attention counts tokens from the start of the pack, not of the document; the proof takes "
            "documents one by one, and would refuse it"
        )
    return config


def load(name: str, dtype: torch.dtype, device: torch.device) -> HuggingFace:
    """With the model's own weights, or random ones if ``name`` is a config file."""
    config, how = checked_config(name), {"attn_implementation": "cpflex", "dtype": torch.float32}
    if Path(name).is_file():
        model: nn.Module = AutoModelForCausalLM.from_config(config, **how)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, **how)
    return HuggingFace(nn.Module.to(model, device).train(), dtype, _attached(model))


def _attached(model: nn.Module) -> Way | None:
    """How ranks share its layers that mix tokens outside of attention, if it has any. By exchanging states, where it is
    known what they are.
    """
    if not plan_for(_config(model), seq_len=1).recurrent:
        return None
    try:
        attach_recurrent(model, exchanged)
    except NotImplementedError:
        attach_recurrent(model, gathered)
        return gathered
    return exchanged


@dataclass(frozen=True, eq=False)
class HuggingFace:
    """A trainee, see trainee.py."""

    model: nn.Module
    dtype: torch.dtype
    way: Way | None = None

    @property
    def config(self) -> PretrainedConfig:
        return _config(self.model)

    @property
    def remark(self) -> str:
        return REMARKS[self.way]

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.config.to_json_string().encode()).hexdigest()[:16]

    @property
    def planner(self) -> Planner:
        return partial(_plan, self.config)

    def share_of_loss(self, sample: Sample, plan: cpflex.Plan, device: torch.device) -> Tensor:
        batch = {
            "input_ids": sample.tokens[None].to(device),
            "shift_labels": sample.labels[None].to(device),
            "position_ids": sample.position_ids[None].to(device),
            "num_items_in_batch": torch.tensor(sample.num_labels, device=device),
        }
        planned = replace(self._any_plan, plan=plan, position_ids=sample.position_ids[None])
        return _call(self.model, self.dtype, shard_batch(batch, planned)).loss

    @cached_property
    def _any_plan(self) -> ModelPlan:
        """What plan_for makes of the config, whatever the tokens."""
        return plan_for(self.config, seq_len=1)

    def for_proof(self, longest: int) -> HuggingFace:
        window = getattr(self.config, "sliding_window", None)
        changes = {} if window is None else {"sliding_window": min(window, max(1, longest // 4))}
        twin = _twin(self.model, "cpflex", **changes)
        if self.way is not None:
            attach_recurrent(twin, self.way)
        return replace(self, model=twin)

    def dense_results(self, sample: Sample, *, in_fp64: bool) -> Results:
        """By transformers' own eager attention, one document after the other: nothing is packed."""
        model, dtype = _twin(self.model, "eager"), self.dtype
        if in_fp64:
            _config(model)._experts_implementation = "eager"  # grouped products have no fp64
            model, dtype = model.double(), torch.float64
        device = next(model.parameters()).device
        loss = torch.zeros((), device=device)
        for begin, end in pairwise(sample.cu_seqlens.tolist()):
            tokens, labels = (x[begin:end].to(device) for x in (sample.tokens, sample.labels))
            with _AllInFp64() if in_fp64 else nullcontext():
                logits = _call(model, dtype, {"input_ids": tokens[None], "use_cache": False}).logits[0]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            share = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / sample.num_labels
            share.backward()
            loss = loss + share.detach()
        return results_of(model, loss)


class _AllInFp64(TorchFunctionMode):
    """What models compute in fp32 whatever their dtype, softmax, norms and recurrences for instance, too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args = [torch.float64 if x is torch.float32 else x for x in args]
        return func(*args, **{k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()})


def _config(model: nn.Module) -> PretrainedConfig:
    config = model.config
    assert isinstance(config, PretrainedConfig)
    return config


def _plan(config: PretrainedConfig, cu_seqlens: Tensor, **where: Any) -> cpflex.Plan:
    return plan_for(config, cu_seqlens=cu_seqlens, **where).plan


def _call(model: nn.Module, dtype: torch.dtype, arguments: Mapping[str, Any]) -> Any:
    """The model with its parameters rounded to ``dtype``; gradients are of the parameters."""
    rounded = {name: parameter.to(dtype) for name, parameter in model.named_parameters()}
    return functional_call(model, rounded, kwargs=dict(arguments))


def _twin(model: nn.Module, attention: str, **changes: Any) -> nn.Module:
    """Another instance of the model's class, with the same weights."""
    config = copy.deepcopy(_config(model))
    config.update(changes)
    twin = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    twin.load_state_dict(model.state_dict())
    return twin.to(next(model.parameters()).device).train(model.training)

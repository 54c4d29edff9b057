"""Hugging Face models on sharded sequences: unmodified classes with ``attn_implementation="cpflex"``.

Importing this module registers the implementation. N ranks compute what one process of the installed transformers
computes on the whole batch: the masks are composed by transformers' own functions, from global positions, and planned.

>>> from cpflex.integrations.transformers import plan_for, shard_batch
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cpflex")
>>> plan = plan_for(model.config, mesh["cp"], cu_seqlens=cu_seqlens)             # once per batch, pure
>>> loss = model(**shard_batch({"input_ids": tokens, "labels": tokens}, plan)).loss
>>> loss.backward()                                                              # this rank's share, see `shard_batch`

With images: ``attn_implementation={"text_config": "cpflex"}`` and ``shard_batch(batch, plan, model)``, see
docs/training.md.

The plan travels in the place of the attention mask, one for each kind of layer; there is no other state. Whatever
cannot be honoured raises before anything is exchanged.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from cpflex.integrations.transformers.alibi import replace_attention
from cpflex.integrations.transformers.attention import PlanMask, attention_forward, refuse_to_make_a_mask
from cpflex.integrations.transformers.batch import shard_batch
from cpflex.integrations.transformers.classes import VERIFIED
from cpflex.integrations.transformers.exchanged import exchanged
from cpflex.integrations.transformers.generation import prefill
from cpflex.integrations.transformers.masks import COMPOSE, composed
from cpflex.integrations.transformers.paged_cache import PagedCache
from cpflex.integrations.transformers.planning import ModelPlan, plan_for
from cpflex.integrations.transformers.recurrent import (
    HYBRIDS,
    RecurrentMask,
    attach_recurrent,
    detach_recurrent,
    gathered,
)

__all__ = [
    "HYBRIDS",
    "VERIFIED",
    "ModelPlan",
    "PagedCache",
    "PlanMask",
    "RecurrentMask",
    "attach_recurrent",
    "attention_forward",
]
__all__ += ["detach_recurrent", "exchanged", "gathered", "plan_for", "prefill", "replace_attention", "shard_batch"]

NAME = "cpflex"

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, refuse_to_make_a_mask)
AttentionMaskInterface.register(COMPOSE, composed)

"""One call of a model as TRL's trainers make it: log-probabilities and entropies of the labelled tokens of a batch."""

from __future__ import annotations

from typing import Any

import torch
from hf_models import ARCHITECTURES
from hf_trees import ids
from torch import Tensor
from transformers import PretrainedConfig

OUTPUTS = ("log_probs", "entropy", "is_top1")
LONG, SHORT = ids(31, 1), ids(6, 2)
ROWS = [
    (LONG, ids(24, 3)),
    (LONG, ids(24, 3)[:9]),
    (LONG, ids(24, 3)[:9]),
    (SHORT, ids(1, 4)),
    (LONG, []),
    (SHORT, ids(17, 5)),
]
"""(prompt, completion): some that begin others, equal ones, one whose completion was masked for being cut."""


def batch(rows: list[tuple[list[int], list[int]]] | None = None) -> dict[str, Tensor]:
    """Prompts padded on the left, completions on the right."""
    rows = ROWS if rows is None else rows
    before, behind = (max(len(row[i]) for row in rows) for i in (0, 1))
    found: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, completion in rows:
        left, right = before - len(prompt), behind - len(completion)
        found["input_ids"].append([0] * left + prompt + completion + [0] * right)
        found["attention_mask"].append([0] * left + [1] * (len(prompt) + len(completion)) + [0] * right)
        found["labels"].append([-100] * before + completion + [-100] * right)
    return {name: torch.tensor(x) for name, x in found.items()}


def config_of(name: str) -> PretrainedConfig:
    return ARCHITECTURES[name].model("cpflex").config


def called(group: Any, name: str, attention: str, share_prefixes: bool = False) -> dict[str, Tensor]:
    """What the call gives, and the gradients of a nonlinear function of it, summed over ranks that average them."""
    from functools import partial

    from trl.trainer.utils import add_fused_lm_head

    from cpflex.integrations.transformers import plan_for
    from cpflex.integrations.trl import share_calls, tree_call

    model, call = ARCHITECTURES[name].model(attention), batch()
    add_fused_lm_head(model, temperature=0.7, outputs=OUTPUTS)
    if attention == "cpflex":

        def plan(call: dict[str, Any]) -> Any:
            return plan_for(model.config, group, attention_mask=call["attention_mask"])

        whole = partial(tree_call, config=model.config, group=group, options={})
        share_calls(model, plan, whole if share_prefixes else lambda call: None)
    outputs = model(**call, fused_lm_head=True)
    ranks = 1 if group is None else group.size()
    ((outputs.log_probs.exp() * outputs.entropy).square().sum() / ranks).backward()
    found = {
        key: getattr(outputs, key).detach() for key in (*OUTPUTS, "label_mask") if getattr(outputs, key) is not None
    }
    return found | {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

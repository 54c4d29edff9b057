"""One batch through one model: on one process with transformers' own eager attention, and on all ranks with cpflex."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from hf_models import ARCHITECTURES, CHUNK, VOCAB, WINDOW
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cases import LAYOUTS
from cpflex.integrations.transformers import ModelPlan, plan_for, shard_batch

SEQ_LEN = 83
LENGTHS = (31, 1, 40, 11)
IGNORE = -100


@dataclass(frozen=True)
class Tokens:
    """A batch, what transformers is told about it in one process, and what `plan_for` is told."""

    batch_size: int
    planned: Mapping[str, Any]
    one_process: Mapping[str, Any] = field(default_factory=dict)
    hidden_labels: Callable[[Tensor], Tensor] = torch.zeros_like
    """[S] -> bool: positions whose labels are ignored."""

    def batch(self, seed: int = 0) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(3, VOCAB, (self.batch_size, SEQ_LEN), generator=random)
        labels = input_ids.masked_fill(self.hidden_labels(torch.arange(SEQ_LEN)).bool(), IGNORE)
        if (mask := self.planned.get("attention_mask")) is not None:
            labels = labels.masked_fill(mask == 0, IGNORE)
        return {"input_ids": input_ids, "labels": labels}

    @property
    def documents(self) -> Tensor:
        """[1 or B, S]; padding, where there is any, in -1."""
        if (mask := self.planned.get("attention_mask")) is not None:
            return mask.long() - 1
        positions = self.one_process.get("position_ids", torch.arange(SEQ_LEN)[None])
        return (positions == 0).cumsum(dim=1)


def _positions(*lengths: int) -> Tensor:
    assert sum(lengths) == SEQ_LEN
    return torch.cat([torch.arange(n) for n in lengths])


def _padding(*sides: tuple[int, int]) -> Tensor:
    """[B, S]: zeros at the beginning and at the end of each row."""
    return torch.stack([torch.tensor([0] * a + [1] * (SEQ_LEN - a - b) + [0] * b) for a, b in sides])


PACKED = _positions(*LENGTHS)[None]
ROWS = torch.stack([_positions(50, 33), _positions(7, 1, 75)])
TOKENS = {
    "one document": Tokens(2, {"seq_len": SEQ_LEN}),
    "packed": Tokens(1, {"lengths": LENGTHS}, {"position_ids": PACKED}),
    "packed, in two rows": Tokens(
        2,
        {"cu_seqlens": [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]},
        {"position_ids": PACKED.repeat(2, 1)},
    ),
    "rows packed differently": Tokens(2, {"doc_ids": (ROWS == 0).cumsum(dim=1)}, {"position_ids": ROWS}),
    "padded left": Tokens(2, {"attention_mask": (left := _padding((9, 0), (26, 0)))}, {"attention_mask": left}),
    "padded right": Tokens(2, {"attention_mask": (right := _padding((0, 5), (0, 40)))}, {"attention_mask": right}),
    "labels in one place": Tokens(1, {"seq_len": SEQ_LEN}, hidden_labels=lambda position: position > 9),
}
IGNORES_PACKING = {"gpt_oss"}
"""Models that make their masks without the position_ids, so that packed documents leak in one process: the truth is
computed with masks written out.
"""


@dataclass(frozen=True)
class Case:
    """One batch of one architecture on a number of ranks."""

    architecture: str
    tokens: str = "packed"
    world_size: int = 2
    layout: str = "balanced"
    changes: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.architecture}-{self.tokens}-{self.layout}-w{self.world_size}"

    def model(self, attention: str) -> Any:
        return ARCHITECTURES[self.architecture].model(attention, **dict(self.changes))

    def plan(self, config: Any, group: Any = None, **options: Any) -> ModelPlan:
        return plan_for(config, group, **TOKENS[self.tokens].planned, layout=LAYOUTS[self.layout], **options)


def one_process(case: Case, model: Any = None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients as transformers computes them, without cpflex."""
    model = case.model("eager") if model is None else model
    tokens = TOKENS[case.tokens]
    described = dict(tokens.one_process)
    if case.architecture in IGNORES_PACKING and "position_ids" in described:
        described["attention_mask"] = written_out_masks(model.config, tokens.documents)
    batch = tokens.batch()
    if "position_ids" in described:
        batch["labels"] = batch["labels"].masked_fill(described["position_ids"] == 0, IGNORE)
    if "attention_mask" in tokens.planned:  # the first token is predicted by no other
        starts = described["attention_mask"].diff(dim=1, prepend=torch.zeros(tokens.batch_size, 1)) == 1
        batch["labels"] = batch["labels"].masked_fill(starts, IGNORE)
    loss = model(**batch, **described, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


def on_rank(group: Any, case: Case) -> tuple[float, dict[str, Tensor]]:
    """This rank's share of the loss and of the gradients."""
    model = case.model("cpflex")
    plan = case.plan(model.config, group)
    loss = model(**shard_batch(TOKENS[case.tokens].batch(), plan)).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def written_out_masks(
    config: Any,
    documents: Tensor,  # [1 or B, S]
    also: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """For each layer type the scores to add, [1 or B, 1, S, S]: 0, or the lowest number where a key is hidden."""
    q, k = torch.arange(SEQ_LEN)[:, None], torch.arange(SEQ_LEN)[None, :]
    seen = (k <= q) & (documents[:, :, None] == documents[:, None, :])
    kinds = {"full_attention": seen, "sliding_attention": seen & (q - k < WINDOW)}
    kinds["chunked_attention"] = seen & (q // CHUNK == k // CHUNK)
    if also is not None:
        kinds = {kind: also(seen, kind == "sliding_attention") for kind, seen in kinds.items()}
    lowest = torch.finfo(torch.float32).min
    return {kind: torch.where(seen, 0.0, lowest)[:, None] for kind, seen in kinds.items()}


def assert_equal_to_one_process(shares: list[tuple[float, dict[str, Tensor]]], truth: tuple[float, Any]) -> None:
    """To 1e-5: the loss, and each parameter's gradient relative to its norm."""
    losses, grads = zip(*shares, strict=True)
    expected_loss, expected = truth
    assert abs(sum(losses) - expected_loss) <= 1e-5 * abs(expected_loss), (sum(losses), expected_loss)
    assert math.isfinite(expected_loss)
    for name, wanted in expected.items():
        # transformers 4 leaves out experts that no token of a rank goes to
        summed = torch.stack([grad.get(name, torch.zeros_like(wanted)) for grad in grads]).sum(dim=0)
        error = (summed - wanted).norm() / wanted.norm().clamp(min=1e-12)
        assert error <= 1e-5, f"{name}: {error}"
    assert any(wanted.any() for wanted in expected.values())


# -- training: many steps, several packs, activation checkpointing

NUM_STEPS = 50


def train(case: Case, model: Any, step: Callable[[Any, dict[str, Tensor], int], float]) -> list[float]:
    """The losses of ``NUM_STEPS`` steps on three packs in turn; ``step`` gives the loss and sets the gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    losses = []
    for index in range(NUM_STEPS):
        optimizer.zero_grad()
        losses.append(step(model, TOKENS[case.tokens].batch(index % 3), index))
        optimizer.step()
    return losses


def packs(index: int) -> Tensor:
    """position_ids [1, S] of the documents of a step."""
    return (PACKED, ROWS[:1], _positions(SEQ_LEN)[None])[index % 3]


def train_one_process(case: Case) -> list[float]:
    def step(model: Any, batch: dict[str, Tensor], index: int) -> float:
        positions = packs(index)
        labels = batch["labels"].masked_fill(positions == 0, IGNORE)
        loss = model(input_ids=batch["input_ids"], labels=labels, position_ids=positions, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    return train(case, case.model("eager"), step)


def train_on_rank(group: Any, case: Case) -> list[float]:
    """With activation checkpointing."""

    def step(model: Any, batch: dict[str, Tensor], index: int) -> float:
        plan = plan_for(model.config, group, position_ids=packs(index), layout=LAYOUTS[case.layout])
        loss = model(**shard_batch(batch, plan)).loss
        loss.backward()
        total = loss.detach().clone()
        for x in (total, *gradients(model).values()):
            dist.all_reduce(x, group=group)
        return float(total)

    model = case.model("cpflex")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return train(case, model, step)


# -- probes: what comes out for each token of the whole sequence


def trace_tokens(group: Any, case: Case, embeds: Tensor) -> dict[str, Tensor]:
    """Logits and gradients of the inputs [B, S, ...] of the whole sequence, where each rank computes its tokens'."""
    model = case.model("cpflex").requires_grad_(False)
    embeds = embeds.clone().requires_grad_()
    plan = case.plan(model.config, group)
    labels = TOKENS[case.tokens].batch()["labels"]
    out = model(**shard_batch({"inputs_embeds": embeds, "labels": labels}, plan))
    out.loss.backward()
    grad = embeds.grad
    assert grad is not None
    dist.all_reduce(grad, group=group)
    return {"logits": plan.plan.unshard(out.logits.detach(), dim=1), "gradient": grad}


# -- mask functions of users


def any_prefix(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx < 20) & (kv_idx < 20)


HIDDEN_KEYS = torch.arange(SEQ_LEN) % 7 == 3


def no_seventh(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx == kv_idx) | ~HIDDEN_KEYS[kv_idx]


def with_functions_on_rank(group: Any, case: Case) -> tuple[float, dict[str, Tensor]]:
    model = case.model("cpflex")
    functions = {"or_mask_function": any_prefix, "and_mask_function": no_seventh}
    plan = case.plan(model.config, group, batch_size=2, **functions)
    loss = model(**shard_batch(TOKENS[case.tokens].batch(), plan)).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


# -- bfloat16


def logits_on_rank(group: Any, case: Case) -> Tensor:
    """Of the whole sequence, from a model in bfloat16."""
    model = case.model("cpflex").bfloat16()
    plan = case.plan(model.config, group)
    with torch.no_grad():
        logits = model(**shard_batch(TOKENS[case.tokens].batch(), plan)).logits
    return plan.plan.unshard(logits, dim=1)


# -- what averages gradients


def wrapped_on_rank(group: Any, case: Case, wrap: str) -> tuple[float, dict[str, Tensor]]:
    model = case.model("cpflex")
    return averaged(group, wrap, model, model.model.layers, TOKENS[case.tokens].batch(), case.plan(model.config, group))


def averaged(
    group: Any, wrap: str, model: Any, layers: Any, batch: dict[str, Tensor], plan: ModelPlan, **options: Any
) -> tuple[float, dict[str, Tensor]]:
    """The whole gradients, which DDP or FSDP average over the ranks: so the loss is multiplied by their number."""
    if wrap == "DDP":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=group, **options)
    else:
        mesh = init_device_mesh("cpu", (group.size(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    loss = wrapped(**shard_batch(batch, plan, wrapped)).loss
    (loss * group.size()).backward()
    grads = gradients(model)
    if wrap == "FSDP":
        grads = {name: grad.full_tensor() for name, grad in grads.items()}
    dist.all_reduce(total := loss.detach().clone(), group=group)
    return float(total), grads

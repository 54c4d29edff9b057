"""Reinforcement learning on a toy task: completions of each prompt, sampled, judged, and trained on as one tree.

    python launch/train.py --job grpo --task copy

The first steps are supervised, on right answers, until some samples are right. Then each step samples completions of
some prompts, each rank its part of them; stores all of them as one forest that all ranks share; and takes one step of
GRPO (arXiv:2402.03300). The reward is the part of the bytes that are right.

Before the first step it proves itself: loss and gradients of a tree on all ranks, and on one, against a forward for
each completion in fp64. And each step compares the log-probabilities of the tree with those of the sampler.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW

import checkpoint
import cpflex
from cpflex import trees
from cpflex.trees import PackedTree
from data import VOCAB_SIZE, text_files
from model import Shape, Transformer
from planning import LAYOUTS
from progress import learning_rate, resume, say, update
from proof import Comparison, compare, describe
from report import Report, Told, balance_line, balance_of
from sampling import Sampled, dense, gumbel, sample
from step import gradients_of
from tasks import END, LONGEST, TASKS, Question, reward, words_of
from trainee import Results, copy_in_fp64, results_of

OPTIONS = {"task": "copy", "prompts": 32, "completions": 8, "supervised": 90}
"""Options of this job alone."""

DEFAULTS = {
    "steps": 240,
    "layers": 2,
    "dim": 64,
    "window": 8,
    "lr": 6e-3,
    "run_dir": Path("runs/grpo"),
    "save_every": 40,
}
"""Of options that it shares with the other job."""

DECIDES_THE_CURVE = (*OPTIONS, "layers", "dim", "heads", "kv_heads", "window", "dtype", "lr", "seed")

CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""How far log-probabilities may be from the sampler's, in nats; rounding makes a hundredth of that."""


@dataclass(frozen=True)
class GrpoRecord:
    """One step, as logged."""

    step: int  # from 1
    is_supervised: bool
    reward: float  # mean over the step's samples
    solved: float  # part of them that are the answer
    loss: float
    mismatch: float  # largest difference of a log-probability from the sampler's, in nats
    grad_norm: float
    lr: float
    seconds: float
    sampling_seconds: float
    tokens: int  # of the tree
    separate_tokens: int  # of its completions, each with its prompt
    tokens_per_s: float  # of the tree
    imbalance: dict[str, float]
    kv_moved: dict[str, float]


def one_line(record: GrpoRecord) -> str:
    shorter = record.separate_tokens / record.tokens
    return (
        f"{'supervised' if record.is_supervised else 'grpo'}  reward {record.reward:.3f}  solved {record.solved:.0%}  "
        f"tree {shorter:.1f}x shorter  {balance_line(record)}"
    )


TOLD = Told(GrpoRecord, lambda record: record.reward, "reward", one_line, "reward.png")


def train(options: argparse.Namespace, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype) -> None:
    words = words_of(text_files(options.data))
    torch.manual_seed(options.seed)
    shape = Shape(VOCAB_SIZE, options.layers, options.dim, options.heads, options.kv_heads, dtype)
    model = Transformer(shape).to(device)
    optimizer = AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"ranks: {group.size()} on {device.type}; {num_parameters:,} parameters; {len(words):,} words")

    policy = Policy(model, options.window, options.layout)
    comparisons = prove(policy, options, words, group, device)
    say(describe(comparisons, group.size()))
    if not all(comparison.passed for comparison in comparisons):
        raise SystemExit(f"rank {group.rank()}: the proof failed; not training")

    run = {name: getattr(options, name) for name in DECIDES_THE_CURVE} | {"model": "built in", "words": len(words)}
    num_done = resume(options, model, optimizer, run, group)
    with Report(options.run_dir, num_done, options.steps, is_silent=group.rank() > 0, told=TOLD) as report:
        for step in range(num_done + 1, options.steps + 1):
            lr = learning_rate(step, options.steps, options.lr)
            record = train_step(policy, optimizer, options, words, step, lr, group, device)
            report.step(record)
            if step % options.save_every == 0 or step == options.steps:
                checkpoint.save(options.checkpoint_dir, step, model, optimizer, run, group)
    report.finish()


@dataclass(frozen=True, eq=False)
class Policy:
    """The model, and what its layers see of a tree."""

    model: Transformer
    window: int
    """Tokens along the path that sliding layers see."""
    layout: str

    def plan(self, packed: PackedTree, group: dist.ProcessGroup | None) -> cpflex.Plan:
        along, weights = cpflex.tree(packed.tree), Counter(self.model.shape.kinds)
        masks = {"full": along, "sliding": along & cpflex.sliding_window(self.window, positions=packed.position_ids)}
        where: dict[str, Any] = {} if group is None else {"group": group, "layout": LAYOUTS[self.layout]}
        return cpflex.make_plan(
            {kind: masks[kind] for kind in sorted(weights)}, packed.seq_len, weights=weights, **where
        )

    def log_probs(self, shard: trees.TreeShard, plan: cpflex.Plan) -> Tensor:  # of this rank's terms
        def attend(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
            out = cpflex.flex_attention(q, k, v, block_mask=plan[kind], enable_gqa=True)
            assert isinstance(out, Tensor)
            return out

        return shard.log_probs(self.model(shard.tokens[None], shard.position_ids[None], attend))


def train_step(
    policy: Policy,
    optimizer: AdamW,
    options: argparse.Namespace,
    words: Sequence[bytes],
    step: int,
    lr: float,
    group: dist.ProcessGroup,
    device: torch.device,
) -> GrpoRecord:
    began = time.perf_counter()
    is_supervised = step <= options.supervised
    questions = drawn(options, words, step)
    asked = [question for question in questions for _ in range(1 if is_supervised else options.completions)]
    noise = gumbel(options.seed, step, (len(asked), LONGEST, VOCAB_SIZE), device)
    samples = sample(policy.model, policy.window, [q.prompt for q in asked], noise, END[0], group)
    rewards = torch.tensor([reward(bytes(s.tokens), q.answer) for s, q in zip(samples, asked, strict=True)])
    sampled = time.perf_counter()

    packed = supervised_tree(questions) if is_supervised else sampled_tree(questions, samples, rewards)
    plan = policy.plan(packed, group)
    plan.require_same(tokens=packed.tokens, weights=packed.weights)
    shard, plan = packed.shard(plan).to(device), plan.to(device)
    log_probs = policy.log_probs(shard, plan)
    if is_supervised:
        share, mismatch = trees.cross_entropy(log_probs, shard), 0.0
    else:
        old = shard.values["old_log_probs"]
        share, mismatch = trees.policy_loss(log_probs, shard, group, old_log_probs=old), largest(log_probs - old, group)
    loss = gradients_of(share, policy.model, group).item()
    grad_norm = update(policy.model, optimizer, lr)
    if not math.isfinite(loss + grad_norm):
        raise FloatingPointError(f"step {step}: loss {loss}, gradients of norm {grad_norm}; try a lower --lr")
    if mismatch > CLOSE[policy.model.shape.dtype]:
        raise RuntimeError(f"step {step}: a log-probability of the tree is {mismatch:.1e} from the sampler's")
    seconds = time.perf_counter() - began
    return GrpoRecord(
        step=step,
        is_supervised=is_supervised,
        reward=float(rewards.mean()),
        solved=mean(bytes(s.tokens) == q.answer for s, q in zip(samples, asked, strict=True)),
        loss=loss,
        mismatch=mismatch,
        grad_norm=grad_norm,
        lr=lr,
        seconds=seconds,
        sampling_seconds=sampled - began,
        tokens=packed.seq_len,
        separate_tokens=sum(len(packed.tree.path(row)) for row in packed.rows.tolist()),
        tokens_per_s=packed.seq_len / seconds,
        **balance_of(plan),
    )


def drawn(options: argparse.Namespace, words: Sequence[bytes], step: int) -> list[Question]:
    """The questions of a step, whatever was drawn before; more while each is asked once."""
    draw = random.Random(f"{options.seed} {step}")
    num_prompts = options.prompts * (4 if step <= options.supervised else 1)
    return [TASKS[options.task](draw, words) for _ in range(num_prompts)]


def supervised_tree(questions: Sequence[Question]) -> PackedTree:
    return trees.pack([(list(question.prompt), [list(question.answer)]) for question in questions])


def sampled_tree(questions: Sequence[Question], samples: Sequence[Sampled], rewards: Tensor) -> PackedTree:
    """Samples of each question, one question after the other; advantages are those of GRPO, within each question."""
    size = len(samples) // len(questions)
    groups = [
        (list(question.prompt), [s.tokens for s in samples[index * size : (index + 1) * size]])
        for index, question in enumerate(questions)
    ]
    group_ids = torch.arange(len(questions)).repeat_interleave(size)
    return trees.pack(
        groups,
        weights=trees.group_advantages(rewards, group_ids).tolist(),
        values={"old_log_probs": [s.log_probs for s in samples]},
    )


def largest(x: Tensor, group: dist.ProcessGroup) -> float:
    """The largest absolute value on any rank."""
    found = x.detach().abs().max().reshape(1) if x.numel() else x.new_zeros(1)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return found.item()


# proof


def prove(
    policy: Policy,
    options: argparse.Namespace,
    words: Sequence[bytes],
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[Comparison]:
    """The comparisons, equal on every rank; whether they passed is the caller's to judge.

    Completions are drawn, and weighed by numbers above 0: those of a group of samples would nearly cancel in the loss.
    """
    draw = random.Random(0)
    questions = [TASKS[options.task](draw, words) for _ in range(3)]
    completions = [[draw.choices(q.answer, k=draw.randint(1, LONGEST)) for _ in range(8)] for q in questions]
    weights = [0.5 + draw.random() for _ in range(24)]
    old = [[-math.log(VOCAB_SIZE)] * len(c) for of_one in completions for c in of_one]
    packed = trees.pack(
        [(list(q.prompt), of_one) for q, of_one in zip(questions, completions, strict=True)],
        weights=weights,
        values={"old_log_probs": old},
    )
    alone = [(list(q.prompt), c) for q, of_one in zip(questions, completions, strict=True) for c in of_one]
    found = results_of_tree(policy, packed, group, device)
    answer: list[Any] = [None]
    if group.rank() == 0:
        one_rank = results_of_tree(policy, packed, None, device)
        exact_model = copy_in_fp64(policy.model)
        separate = partial(results_one_by_one, window=policy.window, alone=alone, weights=weights)
        answer = [compare(found, one_rank, separate(policy.model), separate(exact_model), policy.model.shape.dtype)]
    dist.broadcast_object_list(answer, group_src=0, group=group, device=device)
    policy.model.zero_grad()
    separate_tokens = sum(len(prompt) + len(completion) for prompt, completion in alone)
    say(f"{len(alone)} completions alone, {separate_tokens} tokens, and as a tree of {packed.seq_len}")
    return answer[0]


def results_of_tree(
    policy: Policy, packed: PackedTree, group: dist.ProcessGroup | None, device: torch.device
) -> Results:
    plan = policy.plan(packed, group)
    shard, plan = packed.shard(plan).to(device), plan.to(device)
    log_probs = policy.log_probs(shard, plan)
    share = trees.policy_loss(log_probs, shard, group, old_log_probs=shard.values["old_log_probs"])
    return results_of(policy.model, gradients_of(share, policy.model, group))


def results_one_by_one(
    model: Transformer, window: int, alone: Sequence[tuple[list[int], list[int]]], weights: Sequence[float]
) -> Results:
    """A forward for each completion, and the loss by its definition, without plan, ranks, trees or cpflex."""
    device, attend, terms = model.head.weight.device, dense(window), []
    for (prompt, completion), weight in zip(alone, weights, strict=True):
        tokens = torch.tensor(prompt + completion, device=device)[None]
        logits = model(tokens, torch.arange(tokens.shape[1], device=device)[None], attend)[0]
        log_probs = logits.log_softmax(dim=-1)[:-1].gather(1, tokens[0, 1:, None])[len(prompt) - 1 :, 0]
        ratio = (log_probs + math.log(VOCAB_SIZE)).exp()
        terms.append(-torch.minimum(ratio * weight, ratio.clamp(0.8, 1.2) * weight).mean())
    model.zero_grad()
    loss = torch.stack(terms).mean()
    loss.backward()
    return results_of(model, loss)

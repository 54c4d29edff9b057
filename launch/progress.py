"""How a run goes on: from where it resumes, the learning rate of a step, one update. The same for all jobs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW

import checkpoint
from report import LOG_FILE

MAX_GRAD_NORM = 1.0


def resume(
    options: argparse.Namespace,
    model: nn.Module,
    optimizer: AdamW,
    run: Mapping[str, object],
    group: dist.ProcessGroup,
) -> int:
    """The number of steps done: those of the latest checkpoint, which is loaded, or 0.

    Without --resume, what an earlier run left in the same places is renamed, not lost.
    """
    latest = checkpoint.latest(options.checkpoint_dir)
    dist.barrier(group)  # all have looked before one renames
    if not options.resume:
        if group.rank() == 0:
            for path in (options.checkpoint_dir, options.run_dir / LOG_FILE):
                if aside := checkpoint.set_aside(path):
                    say(f"{path} of an earlier run is now {aside}")
        return 0
    if latest is None:
        say(f"no checkpoint in {options.checkpoint_dir}: starting at step 1")
        return 0
    num_done, path = latest
    checkpoint.load(path, model, optimizer, run, group)
    say(f"resuming after step {num_done}, from {path}")
    return num_done


def update(model: nn.Module, optimizer: AdamW, lr: float) -> float:
    """One step of the optimizer, alike on all ranks as the gradients are. Returns their norm before clipping."""
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr
    optimizer.step()
    return grad_norm.item()


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Up to ``peak`` over the first tenth of the steps, then a cosine down to a tenth of it. Steps count from 1."""
    num_warmup = max(1, num_steps // 10)
    if step <= num_warmup:
        return peak * step / num_warmup
    progress = (step - num_warmup) / (num_steps - num_warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def say(text: str) -> None:
    """Print, on the first rank only."""
    if dist.get_rank() == 0:
        print(text, flush=True)

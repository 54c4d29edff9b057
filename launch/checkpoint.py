"""Checkpoints that are there entirely or not at all: ``DIRECTORY/step-000050``, the state after 50 steps.

A checkpoint is written beside its final name and renamed once every rank has written its part; whenever the run is
killed, the highest number is complete. All ranks need to see the directory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

KEPT = 2
"""Checkpoints to keep, the latest."""

PREFIX = "step-"
UNFINISHED = "unfinished"
RUN_FILE = "run.json"


def latest(directory: Path) -> tuple[int, Path] | None:
    """The number of steps and the path of the latest checkpoint."""
    return max(_complete(directory), default=None)


def save(
    directory: Path,
    num_steps: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Mapping[str, Any],
    group: dist.ProcessGroup,
) -> None:
    """Write what ``num_steps`` steps have led to. All ranks call it.

    Args:
        run: what the run that resumes must have in common with this one, as JSON.
    """
    unfinished = directory / UNFINISHED
    is_first = group.rank() == 0
    if is_first and unfinished.exists():
        shutil.rmtree(unfinished)
    dist.barrier(group)  # nobody writes before the remains of a killed run are gone
    state_dict_saver.save(_state(model, optimizer), checkpoint_id=unfinished, process_group=group)
    if is_first:
        (unfinished / RUN_FILE).write_text(json.dumps(dict(run), indent=2))
        unfinished.rename(directory / f"{PREFIX}{num_steps:06d}")
        for _, path in sorted(_complete(directory))[:-KEPT]:
            shutil.rmtree(path)


def load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Mapping[str, Any],
    group: dist.ProcessGroup,
) -> None:
    """Put model, optimizer and random numbers back. All ranks call it.

    Raises:
        ValueError: the checkpoint is of another run; the message says what differs.
    """
    _require_same_run(json.loads((path / RUN_FILE).read_text()), run, path)
    state = _state(model, optimizer)
    state_dict_loader.load(state, checkpoint_id=path, process_group=group)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    torch.set_rng_state(state["rng"])


def set_aside(path: Path) -> Path | None:
    """Rename what an earlier run left to the first free of ``path.1``, ``path.2`` ...; None if there is nothing."""
    if not path.exists():
        return None
    number = 1
    while (free := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(free)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "rng": torch.get_rng_state()}


def _require_same_run(saved: Mapping[str, Any], run: Mapping[str, Any], path: Path) -> None:
    differing = [f"{name} was {saved.get(name)!r}, is {new!r}" for name, new in run.items() if saved.get(name) != new]
    if differing:
        raise ValueError(
            f"{path} is of another run: {'; '.join(differing)} - pass the same options, or leave out --resume"
        )


def _complete(directory: Path) -> list[tuple[int, Path]]:
    return [(int(path.name.removeprefix(PREFIX)), path) for path in directory.glob(f"{PREFIX}*")]

"""A run that loses a rank goes on by itself, and a checkpoint is there entirely or not at all, whenever it is killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_train import TINY, TORCHRUN, TRAIN, train
from torch import nn

import checkpoint
from patience import patience
from report import read_log


def ranks_of(launcher: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "--ppid", str(launcher), "-o", "pid=,args="], capture_output=True, text=True, check=False
    )
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "train.py" in line]


@pytest.mark.by_day(7)
def test_a_rank_that_dies_under_torchrun_is_restarted_with_the_same_losses_bit_by_bit(tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(*TORCHRUN, TRAIN, *TINY, "--run-dir", str(whole))
    command = [sys.executable, *TORCHRUN, "--max-restarts", "2", TRAIN, *TINY, "--resume", "--run-dir", str(broken)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + patience(120)
    while len(read_log(broken / "log.jsonl")) < 3:
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first, second = ranks_of(process.pid)
    os.kill(second, signal.SIGKILL)
    said, _ = process.communicate(timeout=patience(120))
    assert process.returncode == 0, said
    assert "resuming after step" in said
    expected, found = (read_log(run / "log.jsonl") for run in (whole, broken))
    assert [(r.step, r.loss, r.grad_norm) for r in found] == [(r.step, r.loss, r.grad_norm) for r in expected]
    for rank in (first, second):
        assert not Path(f"/proc/{rank}").exists(), "no process is left behind"


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(64, 64)
    return model, torch.optim.AdamW(model.parameters())


def save_for_ever(directory: Path) -> None:
    """Checkpoint n holds weights that are all n."""
    dist.init_process_group("gloo", init_method=f"file://{directory}-{os.getpid()}", rank=0, world_size=1)
    model, optimizer = model_and_optimizer()
    found = checkpoint.latest(directory)
    number = found[0] if found else 0
    while True:
        number += 1
        nn.init.constant_(model.weight, float(number))
        checkpoint.save(directory, number, model, optimizer, {"seed": 0}, dist.group.WORLD)


@pytest.mark.by_day(7)
def test_whenever_a_run_is_killed_its_latest_checkpoint_loads(tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.checkpoint.state_dict"])
    directory, draw, numbers = tmp_path / "checkpoints", random.Random(0), []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/here", rank=0, world_size=1)
    try:
        for _ in range(12):
            process = context.Process(target=save_for_ever, args=(directory,))
            process.start()
            before, deadline = checkpoint.latest(directory), time.monotonic() + patience(60)
            while checkpoint.latest(directory) == before:
                assert process.is_alive()
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(draw.random() * 0.05)  # a save takes about 10 ms
            process.kill()
            process.join()
            number, path = checkpoint.latest(directory)
            model, optimizer = model_and_optimizer()
            checkpoint.load(path, model, optimizer, {"seed": 0}, dist.group.WORLD)
            assert (model.weight == number).all()
            numbers.append(number)
    finally:
        dist.destroy_process_group()
    assert numbers == sorted(set(numbers)), "every run went on from the latest"

"""Several GPUs over NCCL, one process each, started by torchrun; rehearsed on the CPU over gloo.

With two GPUs or more: ``python -m pytest -m multi_gpu tests/multi_gpu``. Never run here, where there is no GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from scenarios import LAST, SAFE

from patience import patience
from processes import RankProcesses

RANKS = Path(__file__).with_name("ranks.py")
BACKENDS = {"nccl alone": "cuda:nccl", "gloo and nccl": "cpu:gloo,cuda:nccl"}
SECONDS = 400


def ends(backend: str, num_ranks: int, folder: Path, names: list[str]) -> list[dict[str, str]]:
    """How each scenario ended on each rank: "passed", a traceback, or nothing."""
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", RANKS, backend, folder, *names]
    with open(folder / "log.txt", "w") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            launcher.wait(timeout=patience(SECONDS))
        except subprocess.TimeoutExpired:
            launcher.terminate()  # torchrun ends its ranks
            launcher.wait(timeout=patience(60))
    files = [folder / f"rank{rank}.json" for rank in range(num_ranks)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def check(found: list[dict[str, str]], name: str, folder: Path) -> None:
    for rank, ended in enumerate(found):
        how = ended.get(name, f"did not end; the log's last lines:\n{(folder / 'log.txt').read_text()[-4000:]}")
        assert how == "passed", f"rank {rank} of {len(found)}: {how}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of the scenarios that leave devices as they were: one start of the ranks for all, by backend and number."""
    return {}


def need(num_gpus: int) -> None:
    found = torch.cuda.device_count()
    if found < num_gpus:
        pytest.skip(f"needs {num_gpus} CUDA devices and NCCL between them; this machine has {found}")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("num_gpus", [2, 8])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SAFE)
def test_gpus_over_nccl(name: str, backend: str, num_gpus: int, runs: dict, tmp_path_factory):
    need(num_gpus)
    if (backend, num_gpus) not in runs:
        folder = tmp_path_factory.mktemp("nccl")
        runs[backend, num_gpus] = ends(BACKENDS[backend], num_gpus, folder, list(SAFE)), folder
    found, folder = runs[backend, num_gpus]
    check(found, name, folder)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("num_gpus", [2, 8])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAST)
def test_gpus_over_nccl_in_a_later_call(name: str, backend: str, num_gpus: int, tmp_path: Path):
    need(num_gpus)
    check(ends(BACKENDS[backend], num_gpus, tmp_path, [name]), name, tmp_path)


# -- rehearsal


def rehearse(group: dist.ProcessGroup, name: str) -> None:
    def make_group() -> dist.ProcessGroup:
        made = dist.new_group(list(range(group.size())), timeout=timedelta(seconds=patience(30)))
        assert isinstance(made, dist.ProcessGroup)
        return made

    (SAFE | LAST)[name](make_group, torch.device("cpu"))


@pytest.mark.parametrize("name", [*SAFE, *LAST])
def test_scenarios_pass_on_the_cpu(name: str, two_processes: RankProcesses):
    two_processes.run(rehearse, name)


def test_a_rank_without_messages_is_met_with_four_ranks(four_processes: RankProcesses):
    four_processes.run(rehearse, "idle_ranks")


@pytest.mark.slow
def test_torchrun_starts_the_scenarios(tmp_path: Path):
    names = ["idle_ranks", "refusal_in_the_first_call"]
    found = ends("cpu:gloo", 2, tmp_path, [*names, "refusal_in_a_later_call"])
    for name in names:
        check(found, name, tmp_path)

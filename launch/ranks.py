"""One process per rank: starts them when nobody else has, and joins them in a group.

A script's own part of it, after which `python script.py` and `torchrun script.py` do the same:

    def main() -> None:
        options = parse_options()    # a mistake in them is reported once, before any rank runs
        if ranks.started():
            with ranks.joined() as (group, device):
                ...
        else:
            ranks.start(__file__, sys.argv[1:])
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # first imported later, it would keep the group for ever: see `joined`
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.rendezvous import rendezvous
from torch.distributed.run import main as torchrun

CPU_RANKS = 2
"""Ranks to start on a machine without GPUs."""

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for another before it gives up."""

PR_SET_PDEATHSIG = 1


def started() -> bool:
    """Whether this process is a rank, started by torchrun or by something that sets the same variables."""
    return "RANK" in os.environ


def start(script: str, arguments: Sequence[str], *, num_ranks: int | None = None, device_type: str = "auto") -> None:
    """What ``torchrun script arguments`` would do. Returns when all ranks have succeeded.

    Args:
        num_ranks: one per GPU if None, `CPU_RANKS` on the CPU.
        device_type: "cpu", "cuda" or "auto".

    Raises:
        SystemExit: a rank failed, the others were ended; or a signal ended them all.
    """
    on_gpus = chosen(device_type) == "cuda"
    num_ranks = num_ranks or (torch.cuda.device_count() if on_gpus else CPU_RANKS)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // num_ranks)))
    try:
        torchrun(["--standalone", f"--nproc-per-node={num_ranks}", script, *arguments])
    except ChildFailedError as error:
        exit_code = error.get_first_failure()[1].exitcode
        raise SystemExit(exit_code if exit_code > 0 else 1) from None  # negative: the signal that killed it
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


@contextmanager
def joined(device_type: str = "auto") -> Iterator[tuple[dist.ProcessGroup, torch.device]]:
    """The group of all ranks, NCCL with GPUs and gloo without, and this rank's device.

    Keep the group in local variables, of functions that return before Python ends: a gloo group that is alive then
    aborts it now and then ("terminate called without an active exception", torch 2.13). torch.distributed.nn, which
    torch.compile imports, has functions with the group of all ranks as the default of an argument.

    Args:
        device_type: "cpu", "cuda" or "auto".

    Raises:
        RuntimeError: this machine has fewer GPUs than ranks.
    """
    _end_with_launcher()
    backend, device = _place(device_type)
    store, rank, world_size = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun keeps its store when it restarts the ranks (torch 2.13): the addresses of dead ones are still there
    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    device_id = device if device.type == "cuda" else None
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT, device_id=device_id
    )
    group = dist.group.WORLD
    assert group is not None, "the group was just made"
    yield group, device
    # not in a finally: after a failure other ranks may be gone, and saying goodbye would wait for them
    dist.destroy_process_group()


def _place(device_type: str) -> tuple[str, torch.device]:
    """The backend and the device of this rank."""
    if chosen(device_type) == "cuda":
        local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise RuntimeError(f"NCCL needs a GPU per rank: this is local rank {local_rank}, there are {num_gpus} GPUs")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return "cpu:gloo,cuda:nccl", device
    return "gloo", torch.device("cpu")


def chosen(device_type: str) -> str:
    """ "cpu" or "cuda", where "auto" is cuda if there is a GPU."""
    if device_type == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device_type


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _end_with_launcher() -> None:
    """On Linux, die with the launcher: a rank that lived on would write checkpoints beside those of the resumed run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

"""Functions of a test's module, run in a process of their own: Triton reads once whether it interprets."""

from __future__ import annotations

import contextlib
import os
import pickle
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch


@contextlib.contextmanager
def another_process(**environment: str) -> Iterator[Callable[..., Any]]:
    """``call(fn, *args)`` runs a function of a module, from a seed that the call itself determines."""
    with mock.patch.dict(os.environ, environment):
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(torch.set_num_threads, 1).result()
    try:
        yield lambda fn, *args: pool.submit(_seeded, fn, *args).result()
    finally:
        pool.shutdown()


def _seeded(fn: Callable[..., Any], *args: Any) -> Any:
    seed(fn, args)
    return fn(*args)


def seed(*call: Any) -> None:
    """What is drawn at random depends on ``call`` alone: not on the process, nor on what ran there before."""
    torch.manual_seed(zlib.crc32(pickle.dumps(call)))

"""The same inputs and the same plan give the same bits: forward, backward and captured gradients, at every run, whatever
the hash seed and the number of threads.

Matrix products are BLAS's. Where it rounds them alike with any number of threads, as on the machines that this ran on, the
whole attention does; where it does not, equal bits are promised for equal numbers of threads, and asked for here.
The fused kernels have their own test of bits, in kernels/test_triton_kernels.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from cases import Problem
from cpflex.testing import run_ranks
from fuzz import Case, Table
from patience import patience
from runs import TOKEN_TENSORS, attend_on_rank

PROBLEMS = [
    Problem("doc_sliding_causal", "relative_bias", 321, "gqa", layout="balanced", schedule="ring", world_size=4),
    Problem("doc_sliding_causal", "relative_bias", 321, "gqa", layout="balanced", schedule="direct", world_size=4),
    # pieces of more than 32768 scores, which torch divides among its threads
    Case(
        mask="cpflex.full()",
        score="lambda score, b, h, q, k: score + t0[(q - k).clamp(-16, 16) + 16]",
        tables=(Table((33,), "float32", grad=True),),
        seq_len=2000,
        world_size=4,
    ),
    Problem("full", "temperature", 600, "mqa", layout="contiguous", schedule="direct", dtype="bf16", world_size=4),
    Problem("causal", "key_bias", 321, "gqa", "d24", layout="striped", schedule="auto", world_size=4),
    Problem("doc_causal", "relative_bias", 321, "gqa", layout="balanced", schedule="relay:2", world_size=4),
    Problem("global_sliding", "none", 321, "mha", layout="striped", schedule="striped:1/2", world_size=5),
]


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def digests_of(problem: Problem | Case) -> dict[str, str]:
    """Of each result, over all ranks."""
    ranks = run_ranks(partial(attend_on_rank, problem=problem), problem.world_size, timeout=patience(100))
    found = {name: _digest(*(rank[name] for rank in ranks)) for name in TOKEN_TENSORS}
    return found | {"d_captured": _digest(*(x for rank in ranks for x in rank["d_captured"]))}


def digest_of_products() -> str:
    """Of plain matrix products of the shapes that an attention has."""
    random = torch.Generator().manual_seed(0)
    shapes = [(8, 256, 16, 1000), (8, 256, 1000, 16), (8, 1000, 256, 16), (6, 384, 24, 128), (6, 128, 384, 24)]
    return _digest(
        *(torch.randn(n, i, j, generator=random) @ torch.randn(n, j, k, generator=random) for n, i, j, k in shapes)
    )


def main(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    found = {str(problem): digests_of(problem) for problem in PROBLEMS}
    again = {str(problem): digests_of(problem) for problem in PROBLEMS}
    print(json.dumps({"products": digest_of_products(), "found": found, "again": again}))


def in_a_process(num_threads: int, hash_seed: str) -> dict:
    environment = {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, __file__, str(num_threads)],
        env=os.environ | environment, capture_output=True, text=True, check=True, timeout=patience(250),
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def once() -> dict:
    return in_a_process(1, "0")


@pytest.mark.by_day(3)
@pytest.mark.parametrize(("num_threads", "hash_seed"), [(1, "12345"), (2, "random"), (3, "0")], ids=str)
def test_bits_are_the_same_across_runs_threads_and_hash_seeds(once: dict, num_threads: int, hash_seed: str):
    other = in_a_process(num_threads, hash_seed)
    assert other["found"] == other["again"], "two runs in one process"
    if other["products"] == once["products"]:
        assert other["found"] == once["found"]
    else:
        assert num_threads > 1, "BLAS itself is not deterministic here"
        assert other["found"] == in_a_process(num_threads, "1")["found"]


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""The fused kernels on a GPU, at real sizes: error budget against float64, bits, poisoned memory, nothing recompiled.

The last key head of the last batch, with its group of query heads, is compared with a dense oracle; the rest of the
heads run beside it. Not run in CI, which has no GPU: ``make test-gpu``.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import verdicts
from cases_gpu import CASES, DTYPES, Case
from torch import Tensor

import cpflex
from cpflex.kernels import tuning
from cpflex.testing import run_ranks
from patience import patience

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(420),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the oracle multiplies in torch's deterministic mode
ROOT = Path(__file__).parents[2]
KERNELS = {"attend_kernel", "dq_kernel", "dkdv_kernel"}
"""Each test launches them."""
FUSED, PLAIN = {"backend": "triton"}, {"backend": "reference"}


def tensors_of(case: Case) -> list[Tensor]:
    """q, k, v that want gradients, and grad_out."""
    torch.manual_seed(0)
    (heads, kv_heads), (dim, v_dim) = case.heads, case.dims
    shapes = [(heads, dim), (kv_heads, dim), (kv_heads, v_dim), (heads, v_dim)]
    made = [torch.randn(case.batch, h, case.seq_len, d, device="cuda").to(DTYPES[case.dtype]) for h, d in shapes]
    return [x.requires_grad_(i < 3) for i, x in enumerate(made)]


def attend(case: Case, tensors: list[Tensor], options: dict[str, str] | None = FUSED) -> dict[str, Tensor]:
    """Through the public API; results of all heads, pads dropped."""
    q, k, v, grad_out = tensors
    sizes = {"batch_size": case.batch, "num_heads": case.heads[0]}
    plan = cpflex.make_plan(case.mask_mod("cpu"), case.seq_len, layout=cpflex.contiguous, **sizes)
    local = [plan.shard(x, dim=2, pad_value=math.nan).detach().requires_grad_() for x in (q, k, v)]
    out, lse = cpflex.flex_attention(
        *local, case.score_mod("cuda"), plan, enable_gqa=True, return_lse=True, kernel_options=options
    )  # type: ignore[misc]
    grads = torch.autograd.grad(out, local, plan.shard(grad_out, dim=2, pad_value=0.0))
    named = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))
    return {name: x.detach()[:, :, : case.seq_len] for name, x in named.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_stay_within_the_budget(case: Case):
    tensors = tensors_of(case)
    verdicts.assert_within_budget(case, tensors, attend(case, tensors))


@pytest.mark.parametrize(
    "case", [Case("doc_causal"), Case("causal", "alibi", dims=(64, 64)), Case("full", dims=(80, 96))], ids=str
)
def test_tensor_descriptors_stay_within_the_budget(case: Case, monkeypatch: pytest.MonkeyPatch):
    capability = tuning.capability_of(torch.device("cuda", torch.cuda.current_device()))
    if capability < 90:
        pytest.skip("tensor descriptors need sm_90")
    rows = {key: replace(row, tma=True) for key, row in tuning.rows_for(capability, DTYPES[case.dtype]).items()}
    monkeypatch.setattr(tuning, "rows_for", lambda capability, dtype: rows)
    tensors = tensors_of(case)
    verdicts.assert_within_budget(case, tensors, attend(case, tensors))


def test_cuda_tensors_get_the_fused_kernels_by_default():
    case = Case("causal", dims=(64, 64), seq_len=1000)
    tensors = tensors_of(case)
    default, fused, plain = (attend(case, tensors, options=options) for options in (None, FUSED, PLAIN))
    verdicts.assert_same_bits(default, fused)
    verdicts.assert_other_bits(default["dk"], plain["dk"])


@pytest.mark.parametrize("case", [Case("doc_causal"), Case("causal", "alibi", dims=(64, 64)), Case("window")], ids=str)
def test_the_same_inputs_give_the_same_bits(case: Case):
    tensors = tensors_of(case)
    first = attend(case, tensors)
    for _ in range(5):
        torch.empty(1 << 28, device="cuda")  # other memory
        again = attend(case, tensors)
        verdicts.assert_same_bits(first, again)


@pytest.mark.parametrize("case", [Case("doc_causal", seq_len=4096), Case("doc_window", seq_len=5001)], ids=str)
def test_several_ranks_equal_one(case: Case):
    """The state is carried over steps; ranks are threads on one GPU."""
    tensors = tensors_of(case)
    sizes = {"batch_size": case.batch, "num_heads": case.heads[0]}

    def rank(group) -> dict[str, Tensor]:
        plan = cpflex.make_plan(case.mask_mod("cpu"), case.seq_len, group, **sizes)
        local = attend_shard(case, tensors, plan)
        return {name: plan.unshard(x, dim=2) for name, x in local.items()}

    ranks = run_ranks(rank, world_size=4)
    verdicts.assert_within_budget(case, tensors, ranks[0])


def attend_shard(
    case: Case, tensors: list[Tensor], plan: cpflex.Plan, options: dict[str, str] = FUSED
) -> dict[str, Tensor]:
    q, k, v, grad_out = (plan.shard(x, dim=2, pad_value=0.0).detach() for x in tensors)
    local = [x.requires_grad_() for x in (q, k, v)]
    out, lse = cpflex.flex_attention(*local, None, plan, enable_gqa=True, return_lse=True, kernel_options=options)  # type: ignore[misc]
    grads = torch.autograd.grad(out, local, grad_out)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True))


def test_the_gradient_of_a_table_of_relative_positions():
    """Added atomically, in float64."""
    torch.use_deterministic_algorithms(False)
    case = Case("causal", dims=(64, 64), seq_len=2048)
    q, k, v, grad_out = tensors_of(case)
    plan = cpflex.make_plan(cpflex.causal(), case.seq_len)
    grads = {}
    for backend in ("triton", "reference"):
        table = torch.linspace(-1, 1, 129, device="cuda").repeat(case.heads[0], 1).requires_grad_()
        score_mod = cpflex.score_mod(lambda s, b, h, i, j, t=table: s + t[h, (i - j).clamp(0, 128)])
        out = cpflex.flex_attention(q, k, v, score_mod, plan, enable_gqa=True, kernel_options={"backend": backend})
        (grads[backend],) = torch.autograd.grad(out, table, grad_out)
    verdicts.assert_near(grads["triton"], grads["reference"], 0.02)


def test_new_lengths_documents_windows_and_batches_compile_nothing():
    from triton import knobs

    compiled: list[str] = []
    knobs.compilation.listener = lambda *, src, cache_hit, **rest: compiled.append(src.name)
    try:
        for length, cuts, window, batch in [
            (2048, [0, 9, 2048], 64, 1),
            (300, [0, 1, 300], 1000, 3),
            (5001, [0, 5001], 1, 2),
        ]:
            mask_mod = cpflex.document(cu_seqlens=cuts) & cpflex.sliding_window(window) & cpflex.causal()
            plan = cpflex.make_plan(mask_mod, length)
            q = torch.randn(batch, 4, plan.local_len, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            cpflex.flex_attention(q, q, q, None, plan, kernel_options=FUSED).sum().backward()
            torch.cuda.synchronize()
            kernels = [name for name in compiled if name in ("attend_kernel", "dq_kernel", "dkdv_kernel")]
            assert len(kernels) <= 3, kernels
    finally:
        knobs.compilation.listener = None


def test_memcheck_finds_nothing():
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        pytest.skip("compute-sanitizer is not installed")
    script = str(Path(__file__).with_name("small_run.py"))
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, script]
    # an allocation for each tensor, so that memory beside it is nobody's
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(400), env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

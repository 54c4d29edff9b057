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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from dense_head import dense_head
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
FUSED, PLAIN = {"backend": "triton"}, {"backend": "reference"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MaskFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One attention; `str` of it is a test id."""

    mask: str
    score: str = "none"
    seq_len: int = 4096
    dims: tuple[int, int] = (128, 128)
    heads: tuple[int, int] = (8, 2)
    batch: int = 2
    dtype: str = "bf16"

    def __str__(self) -> str:
        sizes = f"S{self.seq_len}-D{self.dims[0]}-Dv{self.dims[1]}-H{self.heads[0]}-{self.heads[1]}-B{self.batch}"
        return f"{self.mask}-{self.score}-{sizes}-{self.dtype}"

    def mask_mod(self, device: str) -> MaskFn:
        """Also in words that the oracle can run on the GPU."""
        ids = (torch.arange(self.seq_len, device=device) * 7 // self.seq_len + 1) // 2  # documents of uneven lengths
        windows = torch.arange(1, self.heads[0] + 1, device=device) * 100
        masks: dict[str, MaskFn] = {
            "full": lambda b, h, q, k: (q >= 0) & (k >= 0),
            "causal": lambda b, h, q, k: q >= k,
            "window": lambda b, h, q, k: (q >= k) & (q - k < 1024),
            "doc_causal": lambda b, h, q, k: (q >= k) & (ids[q] == ids[k]),
            "doc_window": lambda b, h, q, k: (q >= k) & (q - k < 300) & (ids[q] == ids[k]),
            "prefix_lm": lambda b, h, q, k: (q >= k) | (k < self.seq_len // 3),
            "dilated": lambda b, h, q, k: (q >= k) & ((q - k) % 5 == 0),
            "window_per_head": lambda b, h, q, k: (q >= k) & (q - k < windows[h]),
            "some_see_nothing": lambda b, h, q, k: (q >= k) & (q % 3 != 0),
        }
        return masks[self.mask]

    def score_mod(self, device: str) -> Callable | None:
        slopes = 2.0 ** -torch.arange(1.0, self.heads[0] + 1, device=device)
        bias = torch.linspace(-1, 1, 129, device=device)
        mods = {
            "none": None,
            "softcap": lambda s, b, h, q, k: 20.0 * torch.tanh(s / 20.0),
            "alibi": lambda s, b, h, q, k: s - slopes[h] * (q - k).abs(),
            "relative_bias": lambda s, b, h, q, k: s + bias[(q - k).clamp(-64, 64) + 64],
        }
        return mods[self.score]


CASES = [
    *(Case(mask, dtype=dtype) for mask in ("full", "causal", "doc_causal") for dtype in ("bf16", "fp16")),
    *(Case(mask, dims=(64, 64)) for mask in ("window", "doc_window", "prefix_lm", "dilated", "window_per_head")),
    *(Case("causal", score, dims=(dim, dim)) for score in ("softcap", "alibi", "relative_bias") for dim in (64, 128)),
    *(Case("doc_causal", "alibi", dims=dims) for dims in ((16, 16), (80, 80), (96, 96), (192, 128), (256, 256))),
    Case("some_see_nothing", "softcap"),
    Case("causal", heads=(7, 7), batch=1, seq_len=5001),
    Case("causal", heads=(16, 1), batch=1),
    Case("causal", dims=(24, 40), seq_len=1000),
    *(Case("causal", dims=(dim, dim), seq_len=1024, dtype="fp32") for dim in (64, 128)),
    *(Case(mask, seq_len=32768, batch=2, heads=(16, 4)) for mask in ("full", "causal", "doc_window")),
    Case("causal", "softcap", seq_len=32768, batch=1, heads=(32, 8), dims=(64, 64), dtype="fp16"),
]


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


def exact(case: Case, tensors: list[Tensor], precision: torch.dtype) -> dict[str, Tensor]:
    """Of the last group."""
    heads, kv_heads = case.heads
    group, first = heads // kv_heads, heads - heads // kv_heads
    mask_mod, score_mod = case.mask_mod("cuda"), case.score_mod("cuda")
    b = torch.tensor(case.batch - 1, device="cuda")

    def head_of(place: int) -> Tensor:
        return torch.tensor(first + place, device="cuda")

    def seen(place: int, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, head_of(place), q_idx, kv_idx).expand(len(q_idx), len(kv_idx))

    def modified(scores: Tensor, place: int, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return scores if score_mod is None else score_mod(scores, b, head_of(place), q_idx, kv_idx)

    q, k, v, grad_out = (x[-1] for x in tensors)
    return dense_head(q[-group:], k[-1], v[-1], grad_out[-group:], seen, modified, precision)


def last_group(case: Case, results: dict[str, Tensor]) -> dict[str, Tensor]:
    group = case.heads[0] // case.heads[1]
    return {name: x[-1, -1] if name in ("dk", "dv") else x[-1, -group:] for name, x in results.items()}


def assert_within_budget(case: Case, tensors: list[Tensor], results: dict[str, Tensor]) -> None:
    """error <= 2 x error of the same precision on one device + one rounding, both against float64 (DESIGN.md 7)."""
    true, close = exact(case, tensors, torch.float64), exact(case, tensors, torch.float32)
    for name, value in last_group(case, results).items():
        finite = true[name].isfinite()
        assert torch.equal(value.isfinite(), finite), f"{name}: finite where it should not be, or the reverse"
        error, allowed = ((x.double() - true[name])[finite].abs().max().item() for x in (value, close[name]))
        rounding = torch.finfo(value.dtype).eps * true[name][finite].abs().max().item()
        assert error <= 2 * allowed + rounding, f"{name}: {error:.3e}; 2 x {allowed:.3e} + {rounding:.3e} are allowed"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_stay_within_the_budget(case: Case):
    tensors = tensors_of(case)
    assert_within_budget(case, tensors, attend(case, tensors))


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
    assert_within_budget(case, tensors, attend(case, tensors))


def test_cuda_tensors_get_the_fused_kernels_by_default():
    case = Case("causal", dims=(64, 64), seq_len=1000)
    tensors = tensors_of(case)
    default, fused, plain = (attend(case, tensors, options=options) for options in (None, FUSED, PLAIN))
    assert all(torch.equal(default[name], fused[name]) for name in fused)
    assert not torch.equal(default["dk"], plain["dk"])


@pytest.mark.parametrize("case", [Case("doc_causal"), Case("causal", "alibi", dims=(64, 64)), Case("window")], ids=str)
def test_the_same_inputs_give_the_same_bits(case: Case):
    tensors = tensors_of(case)
    first = attend(case, tensors)
    for _ in range(5):
        torch.empty(1 << 28, device="cuda")  # other memory
        again = attend(case, tensors)
        assert all(torch.equal(first[name], again[name]) for name in first)


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
    assert_within_budget(case, tensors, ranks[0])


def attend_shard(case: Case, tensors: list[Tensor], plan: cpflex.Plan) -> dict[str, Tensor]:
    q, k, v, grad_out = (plan.shard(x, dim=2, pad_value=0.0).detach() for x in tensors)
    local = [x.requires_grad_() for x in (q, k, v)]
    out, lse = cpflex.flex_attention(*local, None, plan, enable_gqa=True, return_lse=True, kernel_options=FUSED)  # type: ignore[misc]
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
    size = grads["reference"].abs().max().item()
    torch.testing.assert_close(grads["triton"], grads["reference"], rtol=0.02, atol=0.02 * size)


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


SMALL_RUN = """
import torch, cpflex
for dim, dtype in ((64, torch.bfloat16), (80, torch.float16), (24, torch.float32)):
    plan = cpflex.make_plan(cpflex.document(cu_seqlens=[0, 100, 333]) & cpflex.causal(), 333)
    q = torch.randn(1, 2, plan.local_len, dim, device="cuda", dtype=dtype, requires_grad=True)
    cpflex.flex_attention(q, q, q, None, plan, kernel_options={"backend": "triton"}).sum().backward()
torch.cuda.synchronize()
"""


def test_memcheck_finds_nothing(tmp_path: Path):
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        pytest.skip("compute-sanitizer is not installed")
    script = tmp_path / "small_run.py"
    script.write_text(SMALL_RUN)
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(script)]
    # an allocation for each tensor, so that memory beside it is nobody's
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(400), env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

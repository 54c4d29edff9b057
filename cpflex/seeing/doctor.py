"""What this machine has for cpflex, and whether it works: versions, GPUs and their links, a test of a few seconds."""

from __future__ import annotations

import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import scaled_dot_product_attention

from cpflex.attention import flex_attention
from cpflex.masks import causal, document, sliding_window
from cpflex.planning.make import make_plan

PACKAGES = ("cpflex", "torch", "triton", "numpy", "einops", "transformers", "accelerate", "matplotlib")
RESULTS = ("out", "dq", "dk", "dv")
CUTS, WINDOW = [0, 10, 700, 1000], 100
SEQ_LEN, HEADS, KV_HEADS, HEAD_DIM = 1000, 4, 2, 64
TIMEOUT = timedelta(seconds=60)


def examine() -> bool:
    """Print what there is, test it, and say whether the test passed."""
    for name, value in [*_software(), *_hardware()]:
        print(f"{name:12} {value}")
    device, num_ranks = ("cuda", torch.cuda.device_count()) if torch.cuda.is_available() else ("cpu", 2)
    over = f"{num_ranks} ranks on {device} over {_backend(device)}"
    print(f"{'test':12} {over}, packed documents and a window, {_dtype(device)}")
    began = time.monotonic()
    try:
        errors = _test(device, num_ranks)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the diagnosis
        print(f"{'':12} FAILED after {time.monotonic() - began:.1f} s\n\n{error}")
        return False
    allowed = 1e-5 if device == "cpu" else 0.02
    for name, error in errors.items():
        print(f"{'':12} {name:4} is off by {error:.1e} of its largest number; {allowed:g} is allowed")
    passed = max(errors.values()) <= allowed
    print(f"{'':12} {'passed' if passed else 'FAILED'} in {time.monotonic() - began:.1f} s")
    return passed


def _software() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.platform(terse=True)}"
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"
    yield "backends", f"gloo {_yes(dist.is_gloo_available())}, NCCL {_yes(dist.is_nccl_available())}"


def _hardware() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        yield "gpu", f"none (torch {'without CUDA' if torch.version.cuda is None else 'finds no CUDA device'})"
    count = torch.cuda.device_count()
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        peers = [other for other in range(count) if other != index and torch.cuda.can_device_access_peer(index, other)]
        reach = f", reads GPUs {peers} directly" if peers else ""
        yield f"gpu {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB{reach}"
    yield "kernels", _kernels()


def _kernels() -> str:
    if not torch.cuda.is_available():
        return "reference (plain torch), the default for CPU tensors"
    major, minor = torch.cuda.get_device_capability()
    if major >= 8:
        return "triton, the default for CUDA tensors"
    return f"sm_{major}{minor} is before sm_80: pass kernel_options={{'backend': 'reference'}}"


def _yes(available: bool) -> str:
    return "yes" if available else "no"


def _backend(device: str) -> str:
    return "nccl" if device == "cuda" else "gloo"


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def _test(device: str, num_ranks: int) -> dict[str, float]:
    """Largest error of each result against torch's dense attention in float32, by their largest number."""
    with tempfile.TemporaryDirectory(prefix="cpflex-doctor-") as folder:
        spawn(_rank, (num_ranks, device, folder), nprocs=num_ranks)
        found = torch.load(Path(folder) / "found.pt", weights_only=True)
    exact = _dense(_inputs(_dtype(device)))
    return {name: ((found[name] - exact[name]).abs().max() / exact[name].abs().max()).item() for name in exact}


def _rank(rank: int, num_ranks: int, device: str, folder: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    where = f"file://{folder}/meet"
    dist.init_process_group(_backend(device), init_method=where, rank=rank, world_size=num_ranks, timeout=TIMEOUT)
    group = dist.group.WORLD
    assert group is not None, "it was just made"
    found = _attend(group, _inputs(_dtype(device)), device, _dtype(device))
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


def _inputs(dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and a gradient of the output, [1, H, SEQ_LEN, HEAD_DIM], rounded to ``dtype``."""
    random = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(1, h, SEQ_LEN, HEAD_DIM, generator=random).to(dtype) for h in heads]


def _attend(group: dist.ProcessGroup, inputs: list[Tensor], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    mask = causal() & document(cu_seqlens=CUTS) & sliding_window(WINDOW)
    plan = make_plan(mask, SEQ_LEN, group)
    *qkv, grad_out = (plan.shard(x, dim=2, pad_value=0.0).to(device, dtype) for x in inputs)
    local = [x.requires_grad_() for x in qkv]
    q, k, v = local
    out = flex_attention(q, k, v, block_mask=plan, enable_gqa=True)
    assert isinstance(out, Tensor)
    results = (out.detach(), *torch.autograd.grad(out, local, grad_out))
    return {name: plan.unshard(x, dim=2).float().cpu() for name, x in zip(RESULTS, results, strict=True)}


def _dense(inputs: list[Tensor]) -> dict[str, Tensor]:
    *leaves, grad_out = (x.float() for x in inputs)
    q, k, v = (x.requires_grad_() for x in leaves)
    at, ids = torch.arange(SEQ_LEN), torch.repeat_interleave(torch.tensor(CUTS).diff())
    distance = at[:, None] - at
    seen = (distance >= 0) & (distance < WINDOW) & (ids[:, None] == ids)
    out = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return dict(zip(RESULTS, (out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)), strict=True))


if __name__ == "__main__":
    sys.exit(not examine())

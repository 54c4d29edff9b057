"""FlashAttention-4's kernels compiled with our mods for a GPU that need not be there, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from cases import Problem
from cpflex.kernels import Call, flash
from cpflex.mods.trace import trace_score_mod


class NoHardware:
    """What a driver would say of a GPU: its multiprocessors, and as many clusters."""

    def get_device_multiprocessor_count(self) -> int:
        return 148

    def get_max_active_clusters(self, cluster_size: int) -> int:
        return 148 // cluster_size


def compile_both(architecture: int, mask: str, score: str, dim: int, v_dim: int, heads: str) -> None:
    """Forward and backward of the first step of one of two ranks."""
    import cutlass.utils  # type: ignore[import-not-found]

    cutlass.utils.HardwareInfo = NoHardware
    flash.architecture_of = lambda device: architecture
    problem = Problem(mask=mask, score=score, heads=heads, batch_size=2)
    plan = problem.plan(None, rank=0, world_size=2)
    fn = problem.score_mod([x.detach() for x in problem.captured()])
    mod = None if fn is None else trace_score_mod(fn)
    call = Call(plan.kinds["mask"].mask, 0.1, mod and mod.graph, mod.captured if mod else (), (), "flash")
    num_heads, kv_heads = problem.all_heads
    sizes = (num_heads, dim), (kv_heads, dim), (kv_heads, v_dim)
    q, k, v = (torch.empty(2, h, plan.local_len, d, dtype=torch.bfloat16) for h, d in sizes)
    out, lse = flash._results(q, v)
    tile_mask = plan.kinds["mask"].steps[0].tile_mask
    _compile(flash.library().forward, flash._forward_arguments(q, k, v, tile_mask, call, out, lse))
    likes = (torch.empty_like(x) for x in (q, k, v))
    _compile(flash.library().backward, flash._backward_arguments(q, k, v, out, lse, lse, tile_mask, call, *likes))


def _compile(fn: Callable[..., Any], arguments: dict[str, Any]) -> None:
    def on_a_gpu(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    with FakeTensorMode():
        fn(**pytree.tree_map_only(Tensor, on_a_gpu, arguments))

"""The backward loop: K/V visit again, dQ stays, dK/dV travel home."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cpflex.kernels import Call, attend_backward, begin_backward, gradient_dtype, prepare, with_whole_rows
from cpflex.ring.transport import Pair, Transport


def backward(
    grad_out: Tensor,  # [B, Hq, S_local, Dv]
    grad_lse: Tensor,  # [B, Hq, S_local] fp32
    q: Tensor,  # [B, Hq, S_local, D]
    out: Tensor,  # [B, Hq, S_local, Dv]
    lse: Tensor,  # [B, Hq, S_local] fp32
    call: Call,
    transport: Transport,
    settle: Callable[[], None] = lambda: None,  # as in forward
) -> tuple[Tensor, Pair, list[Tensor]]:
    """Gradients of q, of (k, v), and of each captured tensor in ``call.wanted`` (this rank's part); fp32 where parts
    are added up (`gradient_dtype`).

    Every step uses the global lse and delta, so its gradients are final parts and only have to be added
    (FlashAttention-2, arXiv:2307.08691, section 3.1.2).
    """
    k, v = transport.shard
    dtype = gradient_dtype(q, call, alone=transport.is_alone)
    prepare(q, k, v, transport.steps[0].tile_mask, call, (), dtype)  # while nothing has been sent
    lse, delta = begin_backward(out, grad_out, grad_lse, lse, call)
    q, grad_out = with_whole_rows(q), with_whole_rows(grad_out)
    # contiguous, whatever the strides of q: the compiler was promised so
    dq = torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    if dtype == torch.float32:
        dq.zero_()
    d_captured = [torch.zeros(call.captured[slot].shape, dtype=torch.float32, device=q.device) for slot in call.wanted]
    for index, step, (k, v) in transport.circulate():
        dk, dv = attend_backward(q, k, v, grad_out, lse, delta, step.tile_mask, call, dq, d_captured)
        del k, v  # before the next block is unpacked
        if index == 0:
            settle()
        transport.give_back(index, Pair(dk, dv))
    return dq, transport.home(), d_captured

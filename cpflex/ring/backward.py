"""The backward loop: K/V visit again, dQ stays, dK/dV travel home."""

from __future__ import annotations

import torch
from torch import Tensor

from cpflex.kernels import Call, attend_backward, begin_backward, prepare, with_whole_rows
from cpflex.ring.transport import Pair, Transport


def backward(
    grad_out: Tensor,  # [B, Hq, S_local, Dv]
    grad_lse: Tensor,  # [B, Hq, S_local] fp32
    q: Tensor,  # [B, Hq, S_local, D]
    out: Tensor,  # [B, Hq, S_local, Dv]
    lse: Tensor,  # [B, Hq, S_local] fp32
    call: Call,
    transport: Transport,
) -> tuple[Tensor, Pair, list[Tensor]]:
    """Gradients of q, of (k, v), and of each captured tensor in ``call.wanted`` (this rank's part), all fp32.

    Every step uses the global lse and delta, so its gradients are final parts and only have to be added
    (FlashAttention-2, arXiv:2307.08691, section 3.1.2).
    """
    k, v = transport.shard
    prepare(q, k, v, transport.steps[0].tile_mask, call, ("attend_backward",))  # while nothing has been sent
    lse, delta = begin_backward(out, grad_out, grad_lse, lse, call)
    q, grad_out = with_whole_rows(q), with_whole_rows(grad_out)
    # contiguous, whatever the strides of q: the compiler was promised so
    dq, *d_captured = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for x in (q, *(call.captured[slot] for slot in call.wanted))
    )
    for index, step, (k, v) in transport.circulate():
        dk, dv = attend_backward(q, k, v, grad_out, lse, delta, step.tile_mask, call, dq, d_captured)
        del k, v  # before the next block is unpacked
        transport.give_back(index, Pair(dk, dv))
    return dq, transport.home(), d_captured

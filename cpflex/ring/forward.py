"""The forward loop: queries stay, K/V visit, one softmax continues over all steps."""

from __future__ import annotations

from torch import Tensor

from cpflex.kernels import Call, attend, empty, finish
from cpflex.ring.transport import Transport


def forward(q: Tensor, v_dim: int, call: Call, transport: Transport) -> tuple[Tensor, Tensor]:
    """Attention of the local queries to every key that they see.

    Args:
        q: [B, Hq, S_local, D].

    Returns:
        out [B, Hq, S_local, Dv] in q's dtype and lse [B, Hq, S_local] fp32, natural log; 0 and -inf for a query that
        sees no key.
    """
    state = empty(q, v_dim)
    for _, step, (k, v) in transport.circulate():
        attend(q, k, v, step.tile_mask, call, state)
        del k, v  # before the next block is unpacked
    return finish(state, q.dtype)

"""The forward loop: queries stay, K/V visit, one softmax continues over all steps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cpflex.kernels import (
    Call,
    attend,
    attend_and_finish,
    empty,
    gradient_dtype,
    prepare,
    require_support,
    with_whole_rows,
)
from cpflex.ring.transport import Transport


def forward(
    q: Tensor,
    v_dim: int,
    call: Call,
    transport: Transport,
    backward: Call | None = None,
    settle: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the local queries to every key that they see.

    Args:
        q: [B, Hq, S_local, D].
        backward: the call as backward will make it, if one is to follow.
        settle: returns when what arrives may be used; called once the own keys have been attended to.

    Returns:
        out [B, Hq, S_local, Dv] in q's dtype, lse and max_scores [B, Hq, S_local] fp32, natural log, the last [0]
        unless the call wants it; 0, -inf and -inf for a query that sees no key.
    """
    # while nothing has been sent
    require_support(q, v_dim, call)
    k, v = transport.shard
    own = q, k, v, transport.steps[0].tile_mask
    prepare(*own, call, ("attend", "attend_and_finish")[len(transport.steps) == 1 :])
    if backward is not None:
        prepare(*own, backward, (), gradient_dtype(q, backward, alone=transport.is_alone))
    q, state, finished = with_whole_rows(q), None, None
    for index, step, (k, v) in transport.circulate():
        if index + 1 == len(transport.steps):
            finished = attend_and_finish(q, k, v, step.tile_mask, call, state)
        else:
            state = empty(q, v_dim) if state is None else state
            attend(q, k, v, step.tile_mask, call, state)
        del k, v  # before the next block is unpacked
        if index == 0:
            settle()
    assert finished is not None, "the own keys are always a step"
    return finished

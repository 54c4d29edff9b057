"""Reading: the partial softmax of some tokens over the keys that a rank has at hand."""

from __future__ import annotations

from torch import Tensor

from cpflex.kernels import Call, Partials, attend_pages, combine
from cpflex.paging.decode_plan import DecodePlan


def read(
    q: Tensor,  # [1, Hq, N, D]
    k: Tensor,  # [1, H, R, D], of a pool or fetched
    v: Tensor,  # [1, H, R, Dv]
    plan: DecodePlan,
    call: Call,
    into: Partials,
    wave: int | None = None,
) -> None:
    """One partial of each token, in ``into``: over the pages that the rank keeps, or over those fetched in a wave."""
    tables = plan.tables_of(wave)
    if tables.is_idle:
        into.lse.fill_(-float("inf"))
        into.out.zero_()
        return
    work = plan.work(q.device, wave)
    if tables.is_whole:
        attend_pages(q, k, v, work, call, into)
    else:
        partials = attend_pages(q, k, v, work, call)
        combine(partials, plan.parts(q.device, wave), into=into, backend=call.backend)

"""PagePool: the keys and values of one layer, of the pages of one rank."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpflex.masks import is_count

if TYPE_CHECKING:
    from cpflex.paging.decode_plan import DecodePlan
    from cpflex.paging.pages import Pages

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256


class Pending(NamedTuple):
    """Keys and values of some of the step's tokens or heads; the rest is with other ranks."""

    k: Tensor  # [1, H or some, N or some, D]
    v: Tensor


class PagePool:
    """``k`` [1, H, num_pages * page_size, D] and ``v`` [1, H, num_pages * page_size, Dv]; made by `Pages.pool`, zeroed
    once.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        pages: Pages,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str | int,
    ) -> None:
        for name, size in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim), ("v_head_dim", v_head_dim)):
            if not is_count(size, 1):
                raise ValueError(f"{name} must be an integer of at least 1; got {size!r}")
        if max(head_dim, v_head_dim) > LARGEST_HEAD_DIM:
            raise NotImplementedError(
                f"head dims must be at most {LARGEST_HEAD_DIM}; got {head_dim} and {v_head_dim} - the latent heads of "
                "MLA are not supported"
            )
        if dtype not in DTYPES:
            raise NotImplementedError(f"a pool must be of float32, bfloat16 or float16; got {dtype}")
        self.pages = pages
        rows = pages.num_pages * pages.page_size
        self.k = torch.zeros(1, num_kv_heads, rows, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(1, num_kv_heads, rows, v_head_dim, dtype=dtype, device=device)
        self.assigned: object = None
        """The step whose keys it has, or is about to get."""
        self.pending: Pending | None = None

    def assign(
        self,
        k: Tensor,  # [1, H, N, D], of the new tokens that this rank has
        v: Tensor,  # [1, H, N, Dv]
        plan: DecodePlan,
    ) -> None:
        """Keep the keys and values of a step's new tokens, before the layer's attention. Only the owner of a row writes
        it. Where ranks have different tokens or heads, what others own travels with the queries of that attention.

        Raises:
            ValueError, NotImplementedError, RuntimeError: shapes, dtypes or devices that do not fit, gradients, a plan
                that is over or of other pages; the attention of the other ranks raises, too.
        """
        from cpflex.paging.checks import check_assigned, require_plan

        require_plan(plan)
        try:
            check_assigned(k, v, self, plan)
        except Exception as error:
            plan.refuse(error)
            raise
        if plan.all_at_hand(k.shape[1], self.k.shape[1]):
            self.write(k, v, plan)
        else:
            self.pending = Pending(k, v)
        self.assigned = plan.moment

    @torch.no_grad()
    def write(self, k: Tensor, v: Tensor, plan: DecodePlan) -> None:
        """All heads of all new tokens: those that this rank owns are kept."""
        tokens, rows = plan.written(k.device)
        self.keep(k, v, tokens, rows)

    @torch.no_grad()
    def keep(self, k: Tensor, v: Tensor, chosen: Tensor, rows: Tensor) -> None:
        """All heads of the tokens at ``chosen``, in these rows: the step's that this rank owns. Both int64."""
        for pool, new in ((self.k, k), (self.v, v)):
            if len(rows) == new.shape[2]:
                pool[0].index_copy_(1, rows, new[0])
            elif len(rows):
                pool[0].index_copy_(1, rows, new[0].index_select(1, chosen))
        self.pending = None

    @torch.no_grad()
    def store(
        self,
        k: Tensor,  # [1, H, T, D]
        v: Tensor,  # [1, H, T, Dv]
        seq: Hashable,
        positions: Tensor,  # int [T]
    ) -> None:
        """Keep keys and values of tokens at ``positions`` of a sequence, all of which this rank owns: what it computed
        in a prefill that was sharded like training. `Pages.fill` counts them, on every rank.

        Raises:
            ValueError: a position that is not reserved, or that another rank owns.
        """
        pages, held = self.pages, self.pages.held(seq)
        at = np.asarray(positions.detach().cpu(), dtype=np.int64)
        page = at // pages.page_size
        if len(at) and not (at.min() >= 0 and at.max() < pages.capacity(seq)):
            raise ValueError(
                f"sequence {seq!r} has pages for {pages.capacity(seq)} tokens; got positions from {at.min()} to "
                f"{at.max()} - reserve them first"
            )
        if (elsewhere := np.flatnonzero((held.owner[page] != pages.rank) | (held.slot[page] < 0))).size:
            raise ValueError(
                f"rank {pages.rank} does not own position {at[elsewhere[0]]} of sequence {seq!r}; reserve its pages "
                "with owners=, the ranks that have computed their keys"
            )
        if (shared := pages.num_holders(held.owner[page], held.slot[page]) > 1).any():
            raise ValueError(
                f"position {at[np.flatnonzero(shared)[0]]} of sequence {seq!r} lies in a page that another sequence "
                "shares; it cannot be written"
            )
        rows = torch.from_numpy(held.slot[page].astype(np.int64) * pages.page_size + at % pages.page_size)
        for pool, new in ((self.k, k), (self.v, v)):
            if new.shape != (1, pool.shape[1], len(at), pool.shape[3]) or new.dtype != pool.dtype:
                raise ValueError(
                    f"keys and values must be {pool.dtype} [1, {pool.shape[1]}, {len(at)}, {pool.shape[3]}]; got "
                    f"{new.dtype} {tuple(new.shape)}"
                )
            pool[0].index_copy_(1, rows.to(pool.device), new[0].to(pool.device))

    @torch.no_grad()
    def copy_page(self, source: int, target: int) -> None:
        """Copy a page of this rank, all heads."""
        size = self.pages.page_size
        for pool in (self.k, self.v):
            pool[0, :, target * size : (target + 1) * size] = pool[0, :, source * size : (source + 1) * size]

    def __repr__(self) -> str:
        _, heads, rows, dim = self.k.shape
        size = (self.k.numel() + self.v.numel()) * self.k.element_size()
        return (
            f"PagePool({heads} heads of {dim} and {self.v.shape[3]}, {rows} rows, {self.k.dtype}, {self.k.device}, "
            f"{size / 2**20:.1f} MiB)"
        )

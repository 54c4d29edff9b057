"""attend and attend_backward on the visiting keys of one step, attend_pages and combine on a pool of pages, by the
backend of the call.

Two backends, the same functions: plain torch (`reference`, `pages`), the default for CPU tensors, and fused Triton
kernels (`forward`, `backward`, `decode`, `combining`), the default for CUDA tensors, imported when first needed. What
the kernels cannot do they refuse; nothing falls back to the other backend. A third, "gluon", is the second with the
kernels of sm_90 (`hopper_forward`, `hopper_backward`) wherever `tuning.GLUON` has a row for them. `call.SEATS` are
kernels of other libraries, which serve `attend` and `attend_backward` where they are installed and asked for.

The code that a mod becomes inside the kernels can be read:

>>> import cpflex
>>> from cpflex.mods.trace import trace_mask_mod
>>> from cpflex.mods.triton_source import source_of
>>> print(source_of(trace_mask_mod(cpflex.causal() & cpflex.sliding_window(7)).graph))
@triton.jit
def mask_a34ed1d255(b, h, q_idx, kv_idx, numbers, buffers, sizes):
    x0 = tl.load(buffers[0])
    return (kv_idx <= q_idx) & (kv_idx > within_int32(q_idx - x0, -1, 2147483647))
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cpflex.kernels import pages, reference
from cpflex.kernels.call import BACKENDS, OTHERWISE, SEATS, Call, with_whole_rows
from cpflex.kernels.pages import PageWork, Partials, empty_partials, partials_of, tokens_at_once
from cpflex.kernels.state import State, empty, finish
from cpflex.tile_mask import TileMask

__all__ = [
    "BACKENDS",
    "Call",
    "PageWork",
    "Partials",
    "State",
    "attend",
    "attend_and_finish",
    "attend_backward",
    "attend_pages",
    "begin_backward",
    "combine",
    "empty",
    "empty_partials",
    "finish",
    "gradient_dtype",
    "partials_of",
    "prepare",
    "prepare_pages",
    "require_library",
    "require_support",
    "tokens_at_once",
    "with_whole_rows",
]

# B batch, Hq query heads, H heads of keys and values, S local queries, K visiting keys, D and Dv head dims


def attend(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, H, K, D]
    v: Tensor,  # [B, H, K, Dv]
    tile_mask: TileMask,
    call: Call,
    state: State,
) -> None:
    """Continue ``state`` with the visiting keys, in place."""
    if _is_fused(q, call.backend):
        _forward(q, v, call).attend(q, k, v, tile_mask, call, state)
    else:
        reference.attend(q, k, v, tile_mask, call, state)


def attend_and_finish(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, H, K, D]
    v: Tensor,  # [B, H, K, Dv]
    tile_mask: TileMask,
    call: Call,
    state: State | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The last step: `attend`, then `finish`, in one pass where the backend can; without a state it is also the first.

    Returns:
        out [B, Hq, S, Dv] in q's dtype, lse [B, Hq, S] fp32, natural log, and the largest score of each query, [B, Hq,
        S] fp32 if the call wants it, else [0]; 0, -inf and -inf for a query that saw no key.
    """
    if _is_fused(q, call.backend):
        return _forward(q, v, call).attend_and_finish(q, k, v, tile_mask, call, state)
    state = empty(q, v.shape[-1]) if state is None else state
    reference.attend(q, k, v, tile_mask, call, state)
    return *finish(state, q.dtype), state.m if call.wants_max else state.m.new_empty(0)


def begin_backward(
    out: Tensor,  # [B, Hq, S, Dv]
    grad_out: Tensor,  # [B, Hq, S, Dv]
    grad_lse: Tensor,  # [B, Hq, S] fp32
    lse: Tensor,  # [B, Hq, S] fp32, natural log
    call: Call,
) -> tuple[Tensor, Tensor]:
    """(lse, delta) as `attend_backward` of the same call takes them: delta = rowsum(out * grad_out) - grad_lse, fp32;
    what lse is, is the backend's affair.
    """
    if (seat := _seat(call.backend)) is not None:
        return seat.begin_backward(out, grad_out, grad_lse, lse)
    if _is_fused(out, call.backend):
        from cpflex.kernels import delta

        return delta.begin_backward(out, grad_out, grad_lse, lse)
    return reference.begin_backward(out, grad_out, grad_lse, lse)


def attend_backward(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, H, K, D]
    v: Tensor,  # [B, H, K, Dv]
    grad_out: Tensor,  # [B, Hq, S, Dv]
    lse: Tensor,  # [B, Hq, S] fp32, over the keys of all ranks; this and delta from `begin_backward`
    delta: Tensor,  # [B, Hq, S] fp32
    tile_mask: TileMask,
    call: Call,
    dq: Tensor,  # [B, Hq, S, D] in `gradient_dtype`: fp32, added to in place; another, overwritten
    d_captured: list[Tensor],  # fp32, like call.captured at call.wanted, added to in place
) -> tuple[Tensor, Tensor]:
    """dk [B, H, K, D] and dv [B, H, K, Dv] of the visiting keys, in the dtype of dq."""
    backend = _backward(q, v, call)
    return backend.attend_backward(q, k, v, grad_out, lse, delta, tile_mask, call, dq, d_captured)


def gradient_dtype(q: Tensor, call: Call, *, alone: bool) -> torch.dtype:
    """Of dq, dk and dv of a step: fp32, in which the parts of all steps are added up; that of q where a fused kernel
    writes the only one, ``alone``.
    """
    return q.dtype if alone and _is_fused(q, call.backend) else torch.float32


def require_support(q: Tensor, v_dim: int, call: Call) -> None:
    """Raise what the forward kernels of this call would raise when launched, while no rank has sent anything yet.

    Raises:
        ValueError: an unknown backend, or "triton" or "gluon" for CPU tensors.
        NotImplementedError: "triton", asked for or chosen, cannot: no Triton, another GPU than NVIDIA's from sm_80 on,
            a head dim above 256, or an operation in a mod that has no Triton form; or "gluon" on another GPU than
            sm_90, or with a Triton that it was not compiled with; or the library of another is not installed, or has no
            kernel for the call.
    """
    kind = ("supported", q.device, q.shape[3], v_dim)
    if kind in call.decided:
        return
    if (seat := _seat(call.backend)) is not None:
        seat.require_support(q, v_dim, call)
    elif _is_fused(q, call.backend):
        from cpflex.kernels import tuning
        from cpflex.mods import triton_source

        tuning.require_support(q.device, max(q.shape[3], v_dim))
        if call.backend == "gluon":
            tuning.require_gluon(q.device)
        triton_source.mask_function(call.mask.graph)
        if call.score_graph is not None:
            triton_source.score_function(call.score_graph)
    call.decided[kind] = True


def require_library(backend: str, device: torch.device) -> None:
    """Raise what `require_support` would raise of a package and its GPUs: one rank alone may lack them.

    Args:
        backend: one of `call.SEATS`.

    Raises:
        NotImplementedError: it is not installed, or is a release with other arguments; or it has no kernels for the
            GPU.
    """
    seat = _seat(backend)
    seat.library()
    seat.architecture_of(device)


def prepare(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, H, S, D]
    v: Tensor,  # [B, H, S, Dv]
    tile_mask: TileMask,
    call: Call,
    passes: Sequence[str],
    gradients: torch.dtype | None = None,
) -> None:
    """Compile what the call will launch on a GPU, with rows that fit it, while no rank has sent anything yet: what
    takes long, or fails, does so here. After the first call of its kind it costs one look.

    Args:
        passes: of ``attend`` and ``attend_and_finish`` (both: there is more than one step).
        gradients: their dtype, if `attend_backward` is to be compiled.

    Raises:
        NotImplementedError: the kernels need more shared memory than the GPU has, whatever their row; or the library of
            another backend has no kernel for the gradients.
    """
    if (seat := _seat(call.backend)) is not None:
        seat.prepare(q, k, v, tile_mask, call, passes, gradients)
    elif q.is_cuda and _is_fused(q, call.backend):
        from cpflex.kernels import ahead

        ahead.compile_call(_forward(q, v, call), _backward(q, v, call), q, k, v, tile_mask, call, passes, gradients)


def attend_pages(
    q: Tensor,  # [1, Hq, N, D], new tokens of all sequences
    k: Tensor,  # [1, H, R, D], the rows of a pool
    v: Tensor,  # [1, H, R, Dv]
    work: PageWork,
    call: Call,
    into: Partials | None = None,
) -> Partials:
    """A partial softmax for each token of each item of ``work``, over the filled rows of the item's runs; in ``into``,
    if it is given. Rows that are not filled are not read.
    """
    if into is None:
        into = empty_partials(work.num_partials, q.shape[1], v.shape[3], q.device)
    if _is_fused(q, call.backend):
        from cpflex.kernels import decode

        return decode.attend_pages(q, k, v, work, call, into)
    return pages.attend_pages(q, k, v, work, call, into)


def combine(
    partials: Partials,
    parts: Tensor,  # int32 [N, 3]: the partials of a token are first, first + stride, ..., count of them
    dtype: torch.dtype = torch.float32,
    into: Partials | None = None,
    backend: str | None = None,
) -> Partials:
    """One partial for each token, of those that it has, be they of splits or of ranks; summed in their order, so that
    the same partials give the same bits. Its out is in ``dtype``, unless ``into`` has another; 0 and -inf for a token
    that has none, or that saw no key in any.
    """
    if into is None:
        _, heads, v_dim = partials.out.shape
        into = empty_partials(len(parts), heads, v_dim, partials.out.device)
        if dtype != torch.float32:
            into = Partials(torch.empty_like(into.out, dtype=dtype), into.lse)
    if _is_fused(partials.out, backend):
        from cpflex.kernels import combining

        return combining.combine(partials, parts, into)
    return pages.combine(partials, parts, into)


def prepare_pages(
    q: Tensor,  # [1, Hq, N, D], as `attend_pages` will get it
    k: Tensor,  # [1, H, R, D]
    v: Tensor,  # [1, H, R, Dv]
    work: PageWork,
    call: Call,
    home_heads: int | None = None,
) -> None:
    """`prepare`, for `attend_pages` and `combine`.

    Args:
        home_heads: of the partials that ranks send one another, if they are not those of ``q``.

    Raises:
        NotImplementedError: the kernel needs more shared memory than the GPU has, whatever its row.
    """
    if q.is_cuda and _is_fused(q, call.backend):
        from cpflex.kernels import ahead

        ahead.compile_pages(q, k, v, work, call, home_heads or q.shape[1])


def _forward(q: Tensor, v: Tensor, call: Call) -> Any:
    """The module of the forward kernel, as `tuning.GLUON` says."""
    if (seat := _seat(call.backend)) is not None:
        return seat
    from cpflex.kernels import tuning

    if tuning.is_served_by_gluon("forward", q, v, call.backend):
        from cpflex.kernels import hopper_forward

        return hopper_forward
    from cpflex.kernels import forward

    return forward


def _backward(q: Tensor, v: Tensor, call: Call) -> Any:
    """The module of the backward kernels: that of sm_90 if `tuning.GLUON` has a row for one of its passes."""
    if (seat := _seat(call.backend)) is not None:
        return seat
    if not _is_fused(q, call.backend):
        return reference
    from cpflex.kernels import tuning

    if any(tuning.is_served_by_gluon(which, q, v, call.backend) for which in ("dq", "dkdv")):
        from cpflex.kernels import hopper_backward

        return hopper_backward
    from cpflex.kernels import backward

    return backward


def _seat(backend: str | None) -> Any:
    """The module of another library's kernels, if they were asked for."""
    return import_module(SEATS[backend]) if backend in SEATS else None


def _is_fused(q: Tensor, backend: str | None) -> bool:
    backend = backend or ("triton" if q.is_cuda else "reference")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}; got {backend!r}")
    if backend == "reference":
        return False
    if backend in SEATS:
        return True
    if find_spec("triton") is None:
        raise NotImplementedError(f"backend {backend!r} needs the package triton, which is not installed" + OTHERWISE)
    if not q.is_cuda:
        from cpflex.kernels.launch import INTERPRETED

        if not INTERPRETED:
            raise ValueError(
                f"backend {backend!r} needs CUDA tensors; got {q.device} - pass backend='reference', or set "
                "TRITON_INTERPRET=1 before the first attention"
            )
    return True

"""attend and attend_backward by cuDNN's flex_attention, of the package nvidia-cudnn-frontend: kernels for sm_90 and
sm_100 in CuTe DSL that are told the intervals of keys that each query sees, and evaluate no mask.

A step is one of its calls. Its out, rounded to the dtype of q, and lse are merged into the state; its gradients of a
step are rounded to that dtype, too. They are added up in a fixed order.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cpflex.kernels.call import OR_PORTABLE, Call
from cpflex.kernels.parts import attend_and_finish_by, attend_by, begin_backward, no_gradients, on_device_of
from cpflex.kernels.row_intervals import row_intervals
from cpflex.kernels.state import State
from cpflex.kernels.tuning import capability_of
from cpflex.tile_mask import TileMask

__all__ = [
    "architecture_of",
    "attend",
    "attend_and_finish",
    "attend_backward",
    "begin_backward",
    "library",
    "prepare",
    "require_support",
]

# B batch, Hq query heads, H heads of keys and values, S local queries, K visiting keys, D and Dv head dims

PACKAGE = "nvidia-cudnn-frontend"
READ = "1.32.0"
"""The release whose signatures these calls were written for."""
_OR = OR_PORTABLE.replace(";", ", or", 1)

ARGUMENTS = {
    "create_mask_plan": "mask_func q k v build_backward",
    "forward": "q_tensor k_tensor v_tensor mask_plan softmax_scale return_lse",
    "backward": "q_tensor k_tensor v_tensor o_tensor do_tensor lse_tensor mask_plan softmax_scale deterministic"
    " dlse_tensor",
}


def attend(q: Tensor, k: Tensor, v: Tensor, tile_mask: TileMask, call: Call, state: State) -> None:
    """Continue ``state`` with the visiting keys, in place."""
    attend_by(_attend, q, k, v, tile_mask, call, state)


def attend_and_finish(
    q: Tensor, k: Tensor, v: Tensor, tile_mask: TileMask, call: Call, state: State | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The last step; without a state it is also the first."""
    return attend_and_finish_by(_attend, q, k, v, tile_mask, call, state)


def attend_backward(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, H, K, D]
    v: Tensor,  # [B, H, K, Dv]
    grad_out: Tensor,  # [B, Hq, S, Dv]
    lse: Tensor,  # [B, Hq, S] fp32, over the keys of all ranks
    delta: Tensor,  # [B, Hq, S] fp32
    tile_mask: TileMask,
    call: Call,
    dq: Tensor,  # [B, Hq, S, D]: fp32, added to in place; in the dtype of q, overwritten
    d_captured: list[Tensor],  # none: a score_mod is refused
) -> tuple[Tensor, Tensor]:
    """dk [B, H, K, D] and dv [B, H, K, Dv] of the visiting keys, in the dtype of dq."""
    if not tile_mask.num_tiles:
        return no_gradients(k, v, dq)
    plan = _plan(q, k, v, tile_mask, call, backward=True)
    # it computes delta as rowsum(out * grad_out) - dlse: of an out of zeros that is the delta of all ranks' keys
    out = torch.zeros_like(grad_out, memory_format=torch.contiguous_format)
    found = library().backward(
        *_by_token(q, k, v, out, grad_out),
        lse,
        mask_plan=plan,
        softmax_scale=float(call.scale),
        deterministic=True,
        dlse_tensor=-delta,
    )
    dq_step, dk, dv = _by_token(*(found[f"d{name}_tensor"] for name in "qkv"))
    if dq.dtype == torch.float32:
        dq += dq_step
    else:
        dq.copy_(dq_step)
    return dk.to(dq.dtype).contiguous(), dv.to(dq.dtype).contiguous()


def require_support(q: Tensor, v_dim: int, call: Call) -> None:
    """
    Raises:
        NotImplementedError: the package is not installed, or is another release with other arguments; another GPU,
            dtype, head dim, scale or result than it has kernels for; a score_mod.
    """
    library()
    architecture, dims = architecture_of(q.device), (q.shape[3], v_dim)
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise NotImplementedError(f"backend 'cudnn' takes bfloat16 and float16; got {q.dtype}{OR_PORTABLE}")
    larger = [(192, 128), (256, 256)][: 1 + (architecture == 90)]
    if any(dim % 8 for dim in dims) or (max(dims) > 128 and dims not in larger):
        raise NotImplementedError(
            f"backend 'cudnn' has head dims that are multiples of 8 up to 128, and {larger} on sm_{architecture}; got "
            f"{dims}{OR_PORTABLE}"
        )
    if call.score_graph is not None:
        raise NotImplementedError(f"backend 'cudnn' takes no score_mod{OR_PORTABLE}")
    if call.scale <= 0:
        raise NotImplementedError(f"backend 'cudnn' needs a scale above 0; got {call.scale}{OR_PORTABLE}")
    if call.wants_max:
        raise NotImplementedError(f"backend 'cudnn' does not know the largest scores; ask for lse alone{_OR}")


def require_backward(q: Tensor, k: Tensor, v: Tensor) -> None:
    """
    Raises:
        NotImplementedError: there is no kernel for these gradients.
    """
    if architecture_of(q.device) == 90 and q.shape[1] != k.shape[1] and q.shape[3] != v.shape[3]:
        raise NotImplementedError(
            "backend 'cudnn' has no gradient on sm_90 where query heads share keys and the head dims differ; got "
            f"{q.shape[1]} heads on {k.shape[1]}, and {q.shape[3]} and {v.shape[3]}{OR_PORTABLE}"
        )


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_mask: TileMask,
    call: Call,
    passes: Sequence[str],
    gradients: torch.dtype | None,
) -> None:
    """Compile what the call will launch, from the intervals of its own step."""
    kind = ("prepared", q.shape, k.shape, v.shape[3], bool(passes), gradients)
    if kind in call.decided:
        return
    if gradients is not None:
        require_backward(q, k, v)
    if not tile_mask.num_tiles:
        return
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    by_token = _by_token(q, k, v, out)
    kernels = []
    if passes:
        plan = _plan(q, k, v, tile_mask, call, backward=False)
        kernels += [library().Forward(*by_token, plan, lse)]
    if gradients is not None:
        plan = _plan(q, k, v, tile_mask, call, backward=True)
        likes = [torch.empty_like(x) for x in by_token[:3]]
        kernels += [library().Backward(*by_token, by_token[3], lse, *likes, plan, lse, deterministic=True)]
    with on_device_of(q):
        for kernel in kernels:
            kernel.check_support()
            kernel.compile()
    call.decided[kind] = True


# -- the library


@lru_cache
def library() -> SimpleNamespace:
    """What is called of it: create_mask_plan, forward and backward, and what compiles them, Forward and Backward.

    Raises:
        NotImplementedError: it is not installed, or its calls take other arguments.
    """
    try:
        release = metadata.version(PACKAGE)
        found = find_spec("cudnn.flex_attention")
    except metadata.PackageNotFoundError:
        raise NotImplementedError(
            f"backend 'cudnn' needs the package {PACKAGE}, which is not installed: pip install 'cpflex[cudnn]'{_OR}"
        ) from None
    if found is None:
        raise NotImplementedError(
            f"backend 'cudnn' was written for {PACKAGE} {READ}; {release} has no flex_attention: install that{_OR}"
        )
    from cudnn import flex_attention  # type: ignore[import-not-found]
    from cudnn.flex_attention import execution  # type: ignore[import-not-found]

    calls = SimpleNamespace(
        create_mask_plan=flex_attention.create_mask_plan,
        forward=execution._flex_attention_forward,
        backward=execution._flex_attention_backward,
        Forward=flex_attention.FlexAttentionFwd,
        Backward=flex_attention.FlexAttentionBwd,
    )
    require_arguments(calls, release)
    return calls


def require_arguments(calls: SimpleNamespace, release: str) -> None:
    """
    Raises:
        NotImplementedError: the calls of a release do not take what is passed here.
    """
    for name, arguments in ARGUMENTS.items():
        missing = set(arguments.split()) - set(inspect.signature(getattr(calls, name)).parameters)
        if missing:
            raise NotImplementedError(
                f"backend 'cudnn' was written for {PACKAGE} {READ}; in {release}, {name} takes no {sorted(missing)}: "
                f"install that release{_OR}"
            )


def architecture_of(device: torch.device) -> int:
    """90 or 100.

    Raises:
        NotImplementedError: another device.
    """
    capability = capability_of(device)
    if capability in (90, 100, 103):
        return 90 if capability == 90 else 100
    name = f"sm_{capability}" if capability >= 80 else "none of these"
    raise NotImplementedError(f"backend 'cudnn' needs sm_90, sm_100 or sm_103; {device} is {name}{OR_PORTABLE}")


# -- a step as one call


def _attend(q: Tensor, k: Tensor, v: Tensor, tile_mask: TileMask, call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, S, Dv] in q's dtype and lse [B, Hq, S] fp32, over the keys of the step."""
    plan = _plan(q, k, v, tile_mask, call, backward=False)
    found = library().forward(*_by_token(q, k, v), mask_plan=plan, softmax_scale=float(call.scale), return_lse=True)
    return found["o_tensor"].transpose(1, 2).contiguous(), found["lse_tensor"]


def _by_token(*tensors: Tensor) -> list[Tensor]:
    """[B, S, H, D] of [B, H, S, D], and the reverse."""
    return [x.transpose(1, 2) for x in tensors]


def _plan(q: Tensor, k: Tensor, v: Tensor, tile_mask: TileMask, call: Call, *, backward: bool) -> Any:
    """Its plan of the intervals of a step, for tensors of these shapes; kept with the step."""
    plans = vars(tile_mask).setdefault("cudnn_plans", {})
    kind = q.shape, k.shape, v.shape[3], q.dtype, q.device, backward
    if kind not in plans:
        intervals = row_intervals(tile_mask, call.mask, q.shape[0], q.shape[1]).to(q.device)
        with on_device_of(q), torch.no_grad():
            plans[kind] = library().create_mask_plan(intervals, *_by_token(q, k, v), build_backward=backward)
    return plans[kind]

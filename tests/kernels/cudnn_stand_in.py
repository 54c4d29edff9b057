"""A stand-in for cuDNN's flex_attention: its calls, with the signatures of 1.32.0, computed densely in fp32 from the
intervals as they are passed.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from flash_stand_in import Given
from torch import Tensor


def create_mask_plan(
    mask_func, q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, pack_gqa=None,
    build_backward=None, _fwd_variant=None,
):  # fmt: skip
    (batch, q_len, num_heads), kv_len = q.shape[:3], k.shape[1]
    heads, endpoints, total = mask_func.shape
    assert mask_func.dtype == torch.int32 and mask_func.is_contiguous()
    assert heads in (1, num_heads) and endpoints % 2 == 1 and total == batch * q_len
    assert (mask_func.diff(dim=1) >= 0).all() and (mask_func >= 0).all() and (mask_func <= kv_len).all()
    seen = torch.zeros(heads, total, kv_len, dtype=torch.bool)
    keys = torch.arange(kv_len)
    for first, end in [(None, 0), *zip(range(1, endpoints, 2), range(2, endpoints, 2), strict=True)]:
        begins = 0 if first is None else mask_func[:, first].unsqueeze(-1)
        seen |= (keys >= begins) & (keys < mask_func[:, end].unsqueeze(-1))
    return SimpleNamespace(seen=seen.view(heads, batch, q_len, kv_len).transpose(0, 1), has_backward=build_backward)


def forward(
    q_tensor, k_tensor, v_tensor, *, mask_plan, softmax_scale=None, return_lse=False, stream=None, return_max_logit=False
):  # fmt: skip
    assert return_lse
    given = Given(q_tensor, k_tensor, v_tensor, softmax_scale, None, None, [])
    out, lse = given.attended(mask_plan.seen)
    return {"o_tensor": out.to(q_tensor.dtype).transpose(1, 2), "lse_tensor": lse}


def backward(
    q_tensor, k_tensor, v_tensor, o_tensor, do_tensor, lse_tensor, *, mask_plan, softmax_scale=None, deterministic=False,
    dlse_tensor=None, stream=None,
):  # fmt: skip
    assert mask_plan.has_backward and deterministic
    given = Given(q_tensor, k_tensor, v_tensor, softmax_scale, None, None, [])
    grads = given.gradients(mask_plan.seen, o_tensor, do_tensor, lse_tensor, dlse_tensor)
    return {f"d{name}_tensor": grad.to(q_tensor.dtype) for name, grad in zip("qkv", grads, strict=True)}


class Compiled:
    """FlexAttentionFwd and FlexAttentionBwd, which know on what tensors they were made."""

    def __init__(self, *samples: Tensor, deterministic: bool = False) -> None:
        self.samples = samples

    def check_support(self) -> bool:
        return True

    def compile(self) -> None:
        assert not any(isinstance(x, Tensor) and x.stride(-1) != 1 for x in self.samples)


LIBRARY = SimpleNamespace(
    create_mask_plan=create_mask_plan, forward=forward, backward=backward, Forward=Compiled, Backward=Compiled
)

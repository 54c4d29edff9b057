"""Attention sinks on top of lse: each head may send attention to nothing (gpt-oss; arXiv:2309.17453).

A sink is one more score in the softmax, without a value: out * exp(lse) / (exp(lse) + exp(sink)), which is
out * sigmoid(lse - sink). As lse is of all ranks' keys and differentiable, that line is all there is to write.

    torchrun --nproc-per-node 2 examples/sinks.py

Prints how far output and sink gradients are from a dense softmax with one more column, on one rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

import cpflex

SEQ_LEN, HEADS, HEAD_DIM, WINDOW = 600, 4, 16, 128


def attention_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, plan: cpflex.Plan) -> Tensor:
    """q, k, v [B, H, S_local, D], sinks [H] -> [B, H, S_local, D]."""
    out, lse = cpflex.flex_attention(q, k, v, block_mask=plan, return_lse=True)
    return out * torch.sigmoid(lse - sinks[:, None]).unsqueeze(-1).to(out.dtype)


def dense(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    i = torch.arange(SEQ_LEN)
    seen = (i <= i[:, None]) & (i > i[:, None] - WINDOW)
    scores = (q @ k.mT / HEAD_DIM**0.5).masked_fill(~seen, -torch.inf)
    column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1] @ v


def main(group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)  # the same on every rank
    q, k, v, grad_out = torch.randn(4, 1, HEADS, SEQ_LEN, HEAD_DIM)
    sinks = torch.randn(HEADS, requires_grad=True)
    whole = dense(q, k, v, sinks)
    (expected,) = torch.autograd.grad(whole, sinks, grad_out)

    plan = cpflex.make_plan(cpflex.causal() & cpflex.sliding_window(WINDOW), SEQ_LEN, group)
    local = [plan.shard(x, dim=2, pad_value=0.0) for x in (q, k, v, grad_out)]
    out = attention_with_sinks(*local[:3], sinks, plan)
    (grad,) = torch.autograd.grad(out, sinks, local[3])
    dist.all_reduce(grad, group=group)
    difference = (plan.unshard(out, dim=2) - whole).abs().max().item()
    if plan.rank == 0:
        print(f"output: largest difference to one rank {difference:.1e}")
        print(
            f"gradient of the sinks: relative difference to one rank {(grad - expected).norm() / expected.norm():.1e}"
        )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.group.WORLD)
    dist.destroy_process_group()

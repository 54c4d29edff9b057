"""A mask and a score of your own, on global positions: candidate answers to one question, and a learned distance bias.

Answers see the question and themselves, not each other (as in reward models and best-of-n training), and attend with a
bias per head and bucket of distance, which gets a gradient. Both are plain functions, as for torch's flex_attention.

    torchrun --nproc-per-node 2 examples/custom_mods.py

Prints how far output and bias gradient are from a dense computation of the same two functions on one rank.
"""

import torch
import torch.distributed as dist

import cpflex

QUESTION, ANSWER, NUM_ANSWERS, HEADS, HEAD_DIM, BUCKETS = 200, 150, 4, 4, 16, 8
SEQ_LEN = QUESTION + ANSWER * NUM_ANSWERS


def mask(b, h, q_idx, kv_idx):
    q_answer, kv_answer = (q_idx - QUESTION) // ANSWER, (kv_idx - QUESTION) // ANSWER
    return (kv_idx <= q_idx) & ((kv_idx < QUESTION) | (q_answer == kv_answer))


def main(group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)  # the same on every rank
    q, k, v, grad_out = torch.randn(4, 1, HEADS, SEQ_LEN, HEAD_DIM)
    table = torch.randn(HEADS, BUCKETS, requires_grad=True)

    def distance_bias(score, b, h, q_idx, kv_idx):
        bucket = torch.log2(torch.clamp(q_idx - kv_idx, min=1).float()).long()
        return score + table[h, torch.clamp(bucket, max=BUCKETS - 1)]

    # dense: the two functions on all pairs at once
    i, heads = torch.arange(SEQ_LEN), torch.arange(HEADS)[:, None, None]
    scores = distance_bias(q @ k.mT / HEAD_DIM**0.5, 0, heads, i[:, None], i)
    whole = scores.masked_fill(~mask(0, heads, i[:, None], i), -torch.inf).softmax(dim=-1) @ v
    (expected,) = torch.autograd.grad(whole, table, grad_out)

    plan = cpflex.make_plan(mask, SEQ_LEN, group)
    local = [plan.shard(x, dim=2, pad_value=0.0) for x in (q, k, v, grad_out)]
    out = cpflex.flex_attention(*local[:3], score_mod=cpflex.score_mod(distance_bias), block_mask=plan)
    (grad,) = torch.autograd.grad(out, table, local[3])
    dist.all_reduce(grad, group=group)  # each rank has the part of its own queries
    difference = (plan.unshard(out, dim=2) - whole).abs().max().item()
    if plan.rank == 0:
        received, gathered = max(plan.stats["recv_tokens"]), plan.stats["all_gather_tokens"]
        print(f"a rank receives the keys of {received} tokens; an all-gather would bring {gathered}")
        print(f"output: largest difference to one rank {difference:.1e}")
        print(f"gradient of the bias: relative difference to one rank {(grad - expected).norm() / expected.norm():.1e}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.group.WORLD)
    dist.destroy_process_group()

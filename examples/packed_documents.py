"""Train on packed documents of any lengths: labels are shifted before they are sharded, and counted over all ranks.

    torchrun --nproc-per-node 2 examples/packed_documents.py

Prints what each rank holds, and how far the loss is from that of the documents one by one, on one rank, without cpflex.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import cpflex
from cpflex.loss import IGNORE_INDEX, cross_entropy, num_labels, shift_labels

CU_SEQLENS = [0, 700, 701, 1030, 1500, 2001]  # five documents, one of a single token; nothing needs to divide anything
SEQ_LEN, VOCAB, HEADS, HEAD_DIM = CU_SEQLENS[-1], 50, 2, 16


class Model(nn.Module):
    """One layer of attention; positions count from the start of each document."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.tokens, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(SEQ_LEN, width)
        self.qkv, self.head = nn.Linear(width, 3 * width), nn.Linear(width, VOCAB)

    def forward(self, tokens: Tensor, position_ids: Tensor, plan: cpflex.Plan | None) -> Tensor:
        x = self.tokens(tokens) + self.positions(position_ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        if plan is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = cpflex.flex_attention(q, k, v, block_mask=plan)
        return self.head(x + y.transpose(1, 2).flatten(2))


def main(group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)  # the same sequence and weights on every rank
    tokens, model = torch.randint(VOCAB, (1, SEQ_LEN)), Model()
    starts = torch.tensor(CU_SEQLENS)
    position_ids = (torch.arange(SEQ_LEN) - starts[:-1].repeat_interleave(starts.diff()))[None]
    labels = shift_labels(tokens, CU_SEQLENS)

    mask = cpflex.causal() & cpflex.document(cu_seqlens=CU_SEQLENS)
    plan = cpflex.make_plan(mask, SEQ_LEN, group)
    tensors = ((tokens, 0), (position_ids, 0), (labels, IGNORE_INDEX))
    local = [plan.shard(x, dim=1, pad_value=pad) for x, pad in tensors]
    share = cross_entropy(model(*local[:2], plan), local[2], group)
    share.backward()  # gradients are summed over ranks; with DDP or FSDP pass averaged_over=
    loss, count = share.detach().clone(), num_labels(local[2], group)
    dist.all_reduce(loss, group=group)
    print(f"rank {plan.rank}: {(local[2] != IGNORE_INDEX).sum()} of {count} labels, share of the loss {share:.4f}")

    one_by_one = [
        F.cross_entropy(
            model(tokens[:, a:b], position_ids[:, a:b], None)[0, :-1], tokens[0, a + 1 : b], reduction="sum"
        )
        for a, b in pairwise(CU_SEQLENS)
        if b - a > 1
    ]
    if plan.rank == 0:
        print(f"loss {loss:.6f}: difference to one rank {abs(loss - sum(one_by_one) / count):.1e}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.group.WORLD)
    dist.destroy_process_group()

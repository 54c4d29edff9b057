"""Two microbatches in flight, as in pipelined training: both go forward before either goes backward.

The plan is an argument and is saved with the graph. So each backward, and each recomputation of a checkpoint, uses the
plan of its own microbatch, whatever was planned since; there is no ambient state that could be another batch's.

    torchrun --nproc-per-node 2 examples/two_microbatches.py

Prints whether the gradients are, bit by bit, those of one microbatch after the other.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cpflex

DIM, HEADS = 64, 4
BATCHES = ([0, 300, 1000], [0, 10, 555, 700])  # cu_seqlens of two packed sequences; another length is no matter


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor, plan: cpflex.Plan) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = cpflex.flex_attention(q, k, v, block_mask=plan)
        return self.out(y.transpose(1, 2).flatten(2))


def main(group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)  # the same on every rank
    blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(i: int) -> Tensor:
        cu_seqlens = BATCHES[i]
        x = torch.randn(1, cu_seqlens[-1], DIM, generator=torch.Generator().manual_seed(i))
        mask = cpflex.causal() & cpflex.document(cu_seqlens=cu_seqlens)
        plan = cpflex.make_plan(mask, cu_seqlens[-1], group)
        x = plan.shard(x, dim=1, pad_value=0.0)
        for block in blocks:
            x = x + checkpoint(block, x, plan, use_reentrant=False)  # recomputed in backward, with this plan
        return x.square().sum()

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(blocks.parameters())))

    one_after_the_other = [gradients(forward(i)) for i in (0, 1)]
    losses = [forward(i) for i in (0, 1)]
    in_flight = [gradients(loss) for loss in losses]  # every rank goes backward in the same order
    if group.rank() == 0:
        for i, (ours, theirs) in enumerate(zip(in_flight, one_after_the_other, strict=True)):
            is_equal = all(map(torch.equal, ours, theirs))
            print(f"microbatch {i}, {BATCHES[i][-1]} tokens: gradients equal to those of it alone: {is_equal}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.group.WORLD)
    dist.destroy_process_group()

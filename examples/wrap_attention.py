"""Wrap your own attention module: projections stay as they are, one call changes, and the plan is an argument.

    torchrun --nproc-per-node 2 examples/wrap_attention.py

Prints how far the output and the gradients over all ranks are from those of the module before, on one rank.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import cpflex

SEQ_LEN, DIM, HEADS = 1000, 64, 4


class Attention(nn.Module):
    """As it was: causal self-attention of a whole sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM, bias=False)

    def heads(self, x: Tensor) -> Tensor:  # [3, B, H, S, D]
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(x), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class ShardedAttention(Attention):
    """The same of a sequence shared by ranks: x holds this rank's tokens."""

    def forward(self, x: Tensor, plan: cpflex.Plan) -> Tensor:
        y = cpflex.flex_attention(*self.heads(x), block_mask=plan)
        return self.out(y.transpose(1, 2).flatten(2))


def main(group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)  # the same sequence and weights on every rank
    x, before, after = torch.randn(1, SEQ_LEN, DIM), Attention(), ShardedAttention()
    after.load_state_dict(before.state_dict())
    whole = before(x)
    whole.square().sum().backward()

    plan = cpflex.make_plan(cpflex.causal(), SEQ_LEN, group)
    local = after(plan.shard(x, dim=1, pad_value=0.0), plan)
    local.square().sum().backward()  # of this rank's tokens; pads give 0
    for parameter in after.parameters():
        dist.all_reduce(parameter.grad, group=group)  # the loss is the sum of the ranks' losses; DDP and FSDP do this
    difference = (plan.unshard(local, dim=1) - whole).abs().max().item()

    if plan.rank == 0:
        print(f"{plan.world_size} ranks hold {plan.local_len} tokens each, of {SEQ_LEN}")
        print(f"output: largest difference to one rank {difference:.1e}")
        for (name, parameter), reference in zip(after.named_parameters(), before.parameters(), strict=True):
            error = (parameter.grad - reference.grad).norm() / reference.grad.norm()
            print(f"gradient of {name}: relative difference to one rank {error:.1e}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.group.WORLD)
    dist.destroy_process_group()

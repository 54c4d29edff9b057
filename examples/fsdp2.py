"""Data and context parallelism together: FSDP2 over both dims of a mesh, the sequence over one of them.

    torchrun --nproc-per-node 4 examples/fsdp2.py        two sequences at a time, two ranks each
    torchrun --nproc-per-node 2 examples/fsdp2.py        one sequence at a time, over both ranks

Prints the loss of each step, and how far the first one is from that of one process.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import cpflex
from cpflex.loss import IGNORE_INDEX, cross_entropy, shift_labels

SEQ_LEN, VOCAB, DIM, HEADS, CP, STEPS = 500, 20, 32, 2, 2, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, plan: cpflex.Plan) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = cpflex.flex_attention(q, k, v, block_mask=plan)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens: Tensor, plan: cpflex.Plan) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, plan)
        return self.head(x)


def share_of_loss(model: nn.Module, tokens: Tensor, plan: cpflex.Plan, mean: DeviceMesh | None) -> Tensor:
    """tokens [B, S], whole; parameters average their gradients over ``mean``."""
    labels = plan.shard(shift_labels(tokens), dim=1, pad_value=IGNORE_INDEX)
    logits = model(plan.shard(tokens, dim=1, pad_value=0), plan)
    return cross_entropy(logits, labels, mean, averaged_over=mean.size() if mean else 1)


def main(group: dist.ProcessGroup) -> None:
    mesh = init_device_mesh("cpu", (group.size() // CP, CP), mesh_dim_names=("dp", "cp"))
    dp_cp = mesh["dp", "cp"]._flatten("dp_cp")  # parameters are sharded, and gradients averaged, over all ranks
    model = Model()
    for module in (*model.blocks, model):
        fully_shard(module, mesh=dp_cp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)

    # rows differ between data ranks and are the same on the ranks of one sequence
    rows = torch.arange(mesh["dp"].size() * SEQ_LEN).view(-1, SEQ_LEN) ** 2 % 13
    row = rows[mesh["dp"].get_local_rank()][None]
    plan, alone = (cpflex.make_plan(cpflex.causal(), SEQ_LEN, ranks) for ranks in (mesh["cp"], None))
    expected = share_of_loss(Model(), rows, alone, None)
    for step in range(STEPS):
        share = share_of_loss(model, row, plan, dp_cp)
        share.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := share.detach() / dp_cp.size(), group=dp_cp.get_group())
        if group.rank() == 0:
            print(f"step {step}: loss {loss:.4f}" + ("" if step else f", difference to one rank {loss - expected:.1e}"))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.group.WORLD)
    dist.destroy_process_group()

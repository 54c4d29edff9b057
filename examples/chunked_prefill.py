"""A prompt in chunks of any lengths, over ranks: window and sinks, keys stay where they were computed.

    torchrun --nproc-per-node 2 examples/chunked_prefill.py

Each rank holds its keys of every chunk, one after the other, as `torch.cat` does; chunks that the window has left are
let go, with their plans. Prints how far the outputs are from those of the whole prompt on one rank.
"""

from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

import cpflex

CHUNKS, DIM, HEADS, WINDOW, SINKS = [400, 130, 517, 64], 64, 4, 200, 4
MASK = cpflex.causal() & (cpflex.sliding_window(WINDOW) | (lambda b, h, q_idx, kv_idx: kv_idx < SINKS))


class Attention(nn.Module):
    """One layer, with its keys so far."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.position = nn.Linear(1, DIM)
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor, plan: cpflex.Plan) -> Tensor:
        """[1, S_local, DIM] -> [1, HEADS, S_local, DIM // HEADS]"""
        x = x + self.position(plan.positions[:, None] / 1000)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        self.cache.append(torch.stack([k, v]))
        k, v = torch.cat(self.cache, dim=3)
        out = cpflex.flex_attention(q, k, v, block_mask=plan)
        assert isinstance(out, Tensor)
        return out


def main(group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)  # the same on every rank
    prompt, layer = torch.randn(1, sum(CHUNKS), DIM), Attention()
    whole = cpflex.make_plan(MASK, sum(CHUNKS))
    expected = whole.unshard(layer(whole.shard(prompt, dim=1, pad_value=0.0), whole), dim=2)
    layer.cache.clear()

    plans: list[cpflex.Plan] = []
    for begin, end in pairwise(accumulate(CHUNKS, initial=0)):
        # the first chunk has the sinks; of the others, those that the window still reaches
        kept = [i for i, held in enumerate(plans) if i == 0 or held.layout.end > begin - WINDOW]
        plans, layer.cache = [plans[i] for i in kept], [layer.cache[i] for i in kept]
        plan = cpflex.make_plan(cpflex.cached(MASK, plans), end - begin, group)
        out = plan.unshard(layer(plan.shard(prompt[:, begin:end], dim=1, pad_value=0.0), plan), dim=2)
        plans.append(plan)
        difference = (out - expected[:, :, begin:end]).abs().max().item()
        if plan.rank == 0:
            received = plan.stats["recv_tokens"]
            print(f"tokens {begin} to {end - 1}: {len(kept)} earlier chunks, K/V rows received {received}; ", end="")
            print(f"largest difference to one rank {difference:.1e}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    with torch.no_grad():
        main(dist.group.WORLD)
    dist.destroy_process_group()

"""GRPO under FSDP2: a prompt and its completions stored once, as a tree that all ranks share.

    torchrun --nproc-per-node 2 examples/grpo_tree.py

Prints the loss of each update, and how far losses and weights are from those of completions trained one by one.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import cpflex
from cpflex import trees

VOCAB, DIM, HEADS, UPDATES, BETA, RANDOM = 20, 32, 2, 3, 0.04, torch.Generator().manual_seed(0)
PROMPT, *COMPLETIONS = (torch.randint(VOCAB, (n,), generator=RANDOM).tolist() for n in (150, *range(20, 100, 10)))
REWARDS = torch.rand(len(COMPLETIONS), generator=RANDOM)  # yours are of completions that the policy sampled


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places, self.head = nn.Embedding(VOCAB, DIM), nn.Embedding(512, DIM), nn.Linear(DIM, VOCAB)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, tokens: Tensor, position_ids: Tensor, attend: partial[Tensor]) -> Tensor:  # [S, VOCAB]
        x = self.tokens(tokens) + self.places(position_ids)
        q, k, v = self.qkv(x)[None].unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.head(x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))[0])


def update(model: nn.Module, share: Tensor) -> Tensor:
    share.backward()
    torch.optim.SGD(model.parameters(), lr=0.3).step()
    model.zero_grad()
    return share.detach()


def one_by_one() -> tuple[list[Tensor], nn.Module]:
    """One rank, a forward for each completion, and the loss by its definition (arXiv:2402.03300, equation 3)."""
    model, causal, olds, losses = Model(), partial(nn.functional.scaled_dot_product_attention, is_causal=True), {}, []
    for _ in range(UPDATES):
        terms = []
        for i, completion in enumerate(COMPLETIONS):
            logits = model(torch.tensor(PROMPT + completion), torch.arange(150 + len(completion)), causal)[149:-1]
            new = -nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="none")
            old, advantage = olds.setdefault(i, new.detach()), (REWARDS[i] - REWARDS.mean()) / (REWARDS.std() + 1e-4)
            gain = torch.minimum((new - old).exp() * advantage, (new - old).exp().clamp(0.8, 1.2) * advantage)
            terms.append((BETA * ((old - new).exp() - (old - new) - 1) - gain).mean())
        losses.append(update(model, torch.stack(terms).mean()))
    return losses, model


def main(group: dist.ProcessGroup) -> None:
    mesh, (losses, trained) = init_device_mesh("cpu", (group.size(),)), one_by_one()
    say = print if group.rank() == 0 else str
    model, packed, old = fully_shard(Model(), mesh=mesh), trees.pack([(PROMPT, COMPLETIONS)], weights=REWARDS), None
    plan = cpflex.make_plan(cpflex.tree(packed.tree), packed.seq_len, mesh)
    attend, shard = partial(cpflex.flex_attention, block_mask=plan), packed.shard(plan)
    kwargs = {"advantages": trees.group_advantages(packed.weights, packed.group_ids), "averaged_over": mesh.size()}
    for expected in losses:
        log_probs = shard.log_probs(model(shard.tokens, shard.position_ids, attend))
        old = log_probs.detach() if old is None else old  # of the policy that sampled, and here of the reference too
        share = trees.policy_loss(log_probs, shard, old_log_probs=old, ref_log_probs=old, beta=BETA, **kwargs)
        dist.all_reduce(loss := update(model, share) / mesh.size(), group=mesh.get_group())
        say(f"{packed.seq_len} tokens: loss {loss:.4f}, difference to one rank {loss - expected:.1e}")
    apart = [(p.full_tensor() - q).abs().max() for p, q in zip(model.parameters(), trained.parameters(), strict=True)]
    say(f"weights after {UPDATES} updates: difference to one rank {max(apart):.1e}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.group.WORLD)
    dist.destroy_process_group()

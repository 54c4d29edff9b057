"""Train a draft model for speculative decoding on a long context: blocks of tokens that follow sampled anchors.

The draft reads the hidden states of a frozen target, which stay where the target's plan put them, and its own block:
what came before (EAGLE, which drafts token by token) or all of it (DFlash, which fills in a masked block at once). Few
queries, very many keys. What it sees is two mask kinds, whose softmaxes are made one by their lse.

    torchrun --nproc-per-node 2 examples/draft_model.py

Prints the loss, and how far it and the gradients are from those of a dense mask on one rank.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import cpflex
from cpflex.loss import IGNORE_INDEX, cross_entropy
from cpflex.masks import MaskMod

CONTEXT, BLOCK, NUM_BLOCKS, VOCAB, HEADS, WIDTH = 1500, 8, 23, 50, 2, 32
MASKED = VOCAB  # the token that stands where the draft is to fill in


def before_anchor(anchors: Tensor, context: int) -> MaskMod:
    """A block of queries sees what the target knew when its anchor, the token that the block begins with, was drawn."""
    limit = anchors.repeat_interleave(BLOCK)
    return MaskMod(lambda b, h, q, k: k < limit[q], "before the anchor", [(len(limit), context)])


def own_block(num_blocks: int, inside: str) -> MaskMod:
    own = cpflex.document(torch.arange(num_blocks).repeat_interleave(BLOCK))
    return own & cpflex.causal() if inside == "causal" else own


def attend(q: Tensor, memory: list[Tensor], block: list[Tensor], plan: cpflex.Plan) -> Tensor:
    """One softmax over the target's keys and values and those of the block; all [T_local, H, D]."""
    (out, lse), (own, own_lse) = (
        cpflex.flex_attention(q, *kv, block_mask=plan[kind], return_lse=True)
        for kind, kv in (("memory", memory), ("block", block))
    )
    lse, own_lse = (x.clamp(min=-1e30) for x in (lse, own_lse))  # -inf where no key is seen, as pads see none
    return out + torch.sigmoid(own_lse - lse).unsqueeze(-1) * (own - out)


class Draft(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB + 1, WIDTH), nn.Embedding(CONTEXT + BLOCK, WIDTH)
        self.q, self.kv, self.memory = (nn.Linear(WIDTH, n * WIDTH) for n in (1, 2, 2))
        self.out, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor, places: Tensor, hidden: Tensor, mask: cpflex.Plan | Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(places)
        q, *kv = (y.unflatten(1, (HEADS, -1)) for y in (self.q(x), *self.kv(x).chunk(2, dim=1)))
        memory = [y.unflatten(1, (HEADS, -1)) for y in self.memory(hidden).chunk(2, dim=1)]
        if isinstance(mask, cpflex.Plan):
            y = attend(q, memory, kv, mask)
        else:
            k, v = (torch.cat(pair).transpose(0, 1) for pair in zip(memory, kv, strict=True))
            y = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, mask).transpose(0, 1)
        return self.head(x + self.out(y.flatten(1)))


def main(group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)  # the same on every rank
    tokens, model = torch.randint(VOCAB, (CONTEXT + BLOCK,)), Draft()
    anchors = torch.randint(1, CONTEXT, (NUM_BLOCKS,)).sort().values
    places = (anchors[:, None] + torch.arange(BLOCK)).flatten()
    begins = torch.arange(len(places)) % BLOCK == 0
    hidden = torch.randn(CONTEXT, WIDTH)  # of the frozen target
    target = cpflex.make_plan(cpflex.causal(), CONTEXT, group)

    true, after, filled = tokens[places], tokens[places + 1], tokens[places].masked_fill(begins, IGNORE_INDEX)
    drafts = {"causal": (true, after), "bidirectional": (true.where(begins, MASKED), filled)}
    for inside, (drafted, labels) in drafts.items():
        memory, block = before_anchor(anchors, CONTEXT), own_block(NUM_BLOCKS, inside)
        plan = cpflex.make_plan({"memory": cpflex.cross(memory, target), "block": block}, len(places), group)
        local = [plan.shard(x, dim=0, pad_value=0) for x in (drafted, places)]
        logits = model(*local, target.shard(hidden, dim=0, pad_value=0.0), plan)
        share = cross_entropy(logits, plan.shard(labels, dim=0, pad_value=IGNORE_INDEX), group)
        grads = torch.autograd.grad(share, list(model.parameters()))
        for x in (loss := share.detach().clone(), *grads):
            dist.all_reduce(x, group=group)  # the ranks' shares sum to the loss; DDP and FSDP do this for gradients

        q = torch.arange(len(places))[:, None]
        seen = torch.cat([memory(*q[:2], q, torch.arange(CONTEXT)), block(*q[:2], q, q.T)], dim=1)
        expected = F.cross_entropy(model(drafted, places, hidden, seen), labels)
        theirs = torch.autograd.grad(expected, list(model.parameters()))
        worst = max(float((x - y).norm() / y.norm()) for x, y in zip(grads, theirs, strict=True))
        if plan.rank == 0:
            print(f"{inside}: loss {loss:.6f}, difference to one rank {loss - expected:.1e}")
            print(f"{inside}: gradients, relative difference to one rank {worst:.1e}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.group.WORLD)
    dist.destroy_process_group()

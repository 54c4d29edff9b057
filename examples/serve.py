"""Continuous batching over ranks: requests arrive while others are answered, and all begin with one system prompt.

    torchrun --nproc-per-node 2 examples/serve.py

The keys of the system prompt are computed once, then forked. A step takes prompts of new requests, in chunks, beside
one token of each of the others, in one call. Pages that the window leaves are given back, and those of whoever is done.
Prints how far the logits are from those of each request alone on one rank, without pages.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import cpflex

VOCAB, DIM, HEADS, CHUNK, WINDOW, SINKS = 97, 48, 4, 16, 24, 4
MASK = cpflex.causal() & (cpflex.sliding_window(WINDOW) | (lambda b, h, q_idx, kv_idx: kv_idx < SINKS))
REQUESTS = {"ann": (2, 21, 12), "bob": (2, 3, 30), "cyd": (6, 35, 9), "dee": (11, 1, 15)}  # arrives, asks, gets


class Model(nn.Module):
    """Tokens and positions [N] -> logits [N, VOCAB]; attention is passed in, (layer, q, k, v) -> out."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position, self.head = nn.Embedding(VOCAB, DIM), nn.Embedding(256, DIM), nn.Linear(DIM, VOCAB)
        self.layers = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(2))

    def forward(self, tokens: Tensor, positions: Tensor, attention) -> Tensor:
        x = self.token(tokens) + self.position(positions)
        for layer, qkv in enumerate(self.layers):
            q, k, v = qkv(x).unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3).unsqueeze(1)
            x = x + attention(layer, q, k, v)[0].transpose(0, 1).flatten(1)
        return self.head(x)


def serve(model: Model, system: Tensor, asked: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The logits of the tokens that each request gets, [gets, VOCAB]."""
    pages, mask, plan = cpflex.Pages(40, page_size=4, group=group), cpflex.mask_mod(MASK), None
    pools = [pages.pool(HEADS, DIM // HEADS) for _ in model.layers]

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor):
        pools[layer].assign(k, v, plan)
        return cpflex.flex_attention(q, pools[layer].k, pools[layer].v, block_mask=plan)

    pages.reserve("system", len(system))
    todo, found, clock = {"system": system}, {seq: [] for seq in REQUESTS}, 0
    while todo:  # of each running sequence, the tokens that are not kept yet
        new = {seq: tokens[:CHUNK] for seq, tokens in todo.items()}
        if plan is None or not plan.fits(new):
            plan = cpflex.make_decode_plan(mask, pages, new, horizon=16, into=plan)
        plan.require_same(tokens := torch.cat([*new.values()]))  # a rank that sampled another token would be found out
        logits = model(tokens, plan.q_positions, attention)
        plan.advance()
        for seq in new:
            todo[seq] = todo[seq][CHUNK:]
            if not len(todo[seq]) and seq in found:  # it gets a token
                found[seq].append(logits[plan.last_row(seq)])
                todo[seq] = found[seq][-1].argmax()[None]
                if len(found[seq]) == REQUESTS[seq][2]:
                    todo.pop(seq)
                    pages.erase(seq)
        pages.evict(mask)
        todo = {seq: tokens for seq, tokens in todo.items() if len(tokens)}  # the system prompt is gone once it is kept
        for seq in [seq for seq, (arrives, *_) in REQUESTS.items() if arrives == clock]:
            pages.fork("system", seq)
            pages.reserve(seq, sum(REQUESTS[seq][1:]))
            todo[seq] = asked[seq]
        clock += 1
    return {seq: torch.stack(logits) for seq, logits in found.items()}


def alone(model: Model, tokens: Tensor, gets: int) -> Tensor:
    """What `serve` gives of one request that begins with ``tokens``."""
    for _ in range(gets):
        at = torch.arange(len(tokens))
        shown = MASK(torch.tensor(0), torch.tensor(0), at[:, None], at)
        logits = model(tokens, at, lambda _, q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, shown))  # noqa: B023
        tokens = torch.cat([tokens, logits[-1:].argmax(-1)])
    return logits[-gets:]


@torch.no_grad()
def main(group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)  # the same on every rank
    model, system = Model(), torch.randint(VOCAB, (41,))
    asked = {seq: torch.randint(VOCAB, (asks,)) for seq, (_, asks, _) in REQUESTS.items()}
    for seq, logits in serve(model, system, asked, group).items():
        expected = alone(model, torch.cat([system, asked[seq]]), REQUESTS[seq][2])
        same, difference = torch.equal(logits.argmax(-1), expected.argmax(-1)), (logits - expected).abs().max().item()
        if group.rank() == 0:
            print(f"{len(logits)} tokens for {seq}, as alone: {same}; largest difference to one rank {difference:.1e}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.group.WORLD)
    dist.destroy_process_group()

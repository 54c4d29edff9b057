"""An encoder and a decoder over shared sequences: lines of text in, the last word of each out, spelled backwards.

Each side is packed and has a plan of its own. Tensors are [T, H, D], as flash-attn's: no batch axis, no padding.

    torchrun --nproc-per-node 2 examples/encoder_decoder.py

Prints the loss as it falls, and how far it and the gradients are from those of dense masks on one rank.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import cpflex
from cpflex.loss import IGNORE_INDEX, cross_entropy, shift_labels

HEADS, WIDTH, LINES = 2, 32, 24
TEXT = [line for line in Path(os.__file__).read_bytes().splitlines() if line[-1:].isalpha()]  # Python's own os.py
Mask = cpflex.Plan | Tensor


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = (nn.Linear(WIDTH, n * WIDTH) for n in (1, 2, 1))

    def forward(self, x: Tensor, memory: Tensor, mask: Mask) -> Tensor:
        q, k, v = (y.unflatten(1, (HEADS, -1)) for y in (self.q(x), *self.kv(memory).chunk(2, dim=1)))  # [T, H, D]
        if isinstance(mask, cpflex.Plan):
            return x + self.out(cpflex.flex_attention(q, k, v, block_mask=mask).flatten(1))
        return x + self.out(
            F.scaled_dot_product_attention(*(y.transpose(0, 1) for y in (q, k, v)), mask).transpose(0, 1).flatten(1)
        )


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(256, WIDTH), nn.Embedding(128, WIDTH), nn.Linear(WIDTH, 256)
        self.encoder, self.decoder, self.cross = Attention(), Attention(), Attention()

    def forward(self, source: list[Tensor], target: list[Tensor], masks: list[Mask]) -> Tensor:
        x, y = (self.tokens(tokens) + self.places(places) for tokens, places in (source, target))
        return self.head(self.cross(self.decoder(y, y, masks[1]), self.encoder(x, x, masks[0]), masks[2]))


def packed(documents: list[bytes], from_end: bool) -> tuple[list[Tensor], Tensor]:
    """Tokens and their places in their documents, [T]; the numbers of these, [T]."""
    lengths = torch.tensor([len(document) for document in documents])
    places = torch.cat([torch.arange(n).flip(0) if from_end else torch.arange(n) for n in lengths.tolist()])
    return [torch.tensor(list(b"".join(documents))), places], torch.arange(len(lengths)).repeat_interleave(lengths)


def main(group: dist.ProcessGroup, steps: int = 6) -> None:
    torch.manual_seed(0)  # the same weights on every rank
    optimizer = torch.optim.AdamW((model := Model()).parameters(), lr=1e-2)
    for step in range(steps):
        lines = [TEXT[(step * LINES + i) % len(TEXT)] for i in range(LINES)]
        source, lines_of = packed(lines, from_end=True)
        target, words_of = packed([b"\n" + line.split()[-1][::-1] for line in lines], from_end=False)
        labels = shift_labels(target[0], doc_ids=words_of)

        encoder = cpflex.make_plan(cpflex.document(lines_of), len(lines_of), group)
        self_mask = cpflex.causal() & cpflex.document(words_of)
        cross_mask = cpflex.cross(cpflex.document(words_of, kv_ids=lines_of), encoder)
        decoder = cpflex.make_plan({"self": self_mask, "cross": cross_mask}, len(words_of), group)
        local_source = [encoder.shard(x, dim=0, pad_value=0) for x in source]
        local_target = [decoder.shard(x, dim=0, pad_value=0) for x in target]
        logits = model(local_source, local_target, [encoder, decoder["self"], decoder["cross"]])
        share = cross_entropy(logits, decoder.shard(labels, dim=0, pad_value=IGNORE_INDEX), group)
        optimizer.zero_grad()
        share.backward()
        for x in (loss := share.detach().clone(), *(x.grad for x in model.parameters())):
            dist.all_reduce(x, group=group)  # the ranks' shares sum to the loss; DDP and FSDP do this for gradients

        own, other, seen = (
            x == y[:, None] for x, y in ((words_of, words_of), (lines_of, words_of), (lines_of, lines_of))
        )
        expected = F.cross_entropy(model(source, target, [seen, own.tril(), other]), labels)
        if group.rank() == 0 and step % 5 == 0:
            grads = torch.autograd.grad(expected, list(model.parameters()))
            worst = max(float((x.grad - y).norm() / y.norm()) for x, y in zip(model.parameters(), grads, strict=True))
            print(f"step {step}: {len(lines_of)} keys, {len(words_of)} queries, loss {loss:.4f}")
            print(f"loss: difference to one rank {loss - expected:.1e}")
            print(f"gradients: relative difference to one rank {worst:.1e}")
        optimizer.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.group.WORLD)
    dist.destroy_process_group()

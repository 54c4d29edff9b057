"""Text that looks at images, as in Flamingo: each token sees the tokens of the last image before it, through a gate.

The images' tokens are the keys, in two ways: all on every rank, or shared by the ranks like the text, with a plan of
their own. (Flamingo's gates begin at tanh(0); here they are open, so that there are gradients to compare.)

    torchrun --nproc-per-node 2 examples/image_keys.py

Prints how far the output and all gradients, the pixels' included, are from those of dense masks on one rank.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import cpflex
from cpflex.masks import MaskMod

HEADS, WIDTH, PATCHES, PIXELS = 2, 32, 49, 27
IMAGES_AT = torch.tensor([40, 41, 300, 520])  # places in the text, of 4 images; text before the first sees none
TEXT_LEN, NUM_KEYS = 700, PATCHES * len(IMAGES_AT)


def last_image(images_at: Tensor, text_len: int, patches: int) -> MaskMod:
    """Keys are the images one after another. One table for each axis: planning looks up ranges of both."""
    image_of = torch.arange(len(images_at)).repeat_interleave(patches)
    last = torch.searchsorted(images_at, torch.arange(text_len), right=True) - 1  # -1: none yet
    return MaskMod(lambda b, h, q, k: image_of[k] == last[q], "last image", [(text_len, len(image_of))])


class Attention(nn.Module):
    """Gated, of x to what is in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = (nn.Linear(WIDTH, n * WIDTH) for n in (1, 2, 1))
        self.gate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, memory: Tensor, mask: cpflex.Plan | Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (HEADS, -1)).transpose(1, 2) for y in (self.q(x), *self.kv(memory).chunk(2, dim=2)))
        if isinstance(mask, cpflex.Plan):
            y = cpflex.flex_attention(q, k, v, block_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask).nan_to_num()  # of tokens that see no image
        return x + self.gate.tanh() * self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.vision, self.text, self.look = nn.Linear(PIXELS, WIDTH), Attention(), Attention(), Attention()

    def forward(self, x: Tensor, pixels: Tensor, masks: list[cpflex.Plan | Tensor]) -> Tensor:
        images = self.patch(pixels)
        images = self.vision(images, images, masks[0])
        return self.look(self.text(x, x, masks[1]), images, masks[2])


def main(group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)  # the same on every rank
    model, x, grad_out = Model(), torch.randn(1, TEXT_LEN, WIDTH), torch.randn(1, TEXT_LEN, WIDTH)
    pixels = torch.randn(1, NUM_KEYS, PIXELS, requires_grad=True)
    wanted = [pixels, *model.parameters()]
    look = last_image(IMAGES_AT, TEXT_LEN, PATCHES)
    image_of = torch.arange(NUM_KEYS) // PATCHES
    within = image_of == image_of[:, None]
    seen = look(*torch.zeros(2), torch.arange(TEXT_LEN)[:, None], torch.arange(NUM_KEYS))
    whole = model(x, pixels, [within, torch.ones(TEXT_LEN, TEXT_LEN).tril().bool(), seen])
    expected = torch.autograd.grad(whole, wanted, grad_out)

    encoder = cpflex.make_plan(cpflex.document(image_of), NUM_KEYS, group)
    for where, keys in (("on every rank", NUM_KEYS), ("shared", encoder)):
        plan = cpflex.make_plan({"text": cpflex.causal(), "look": cpflex.cross(look, keys)}, TEXT_LEN, group)
        text, grad = (plan.shard(y, dim=1, pad_value=0.0) for y in (x, grad_out))
        # every rank encodes all images, or its share of them
        vision = (pixels, within) if keys is NUM_KEYS else (encoder.shard(pixels, dim=1, pad_value=0.0), encoder)
        out = model(text, vision[0], [vision[1], plan["text"], plan["look"]])
        grads = torch.autograd.grad(out, wanted, grad)
        for y in grads:
            # either way a rank's gradients are those of its own text, or its own images: the sum is whole, as DDP's
            dist.all_reduce(y, group=group)
        difference = (plan.unshard(out, dim=1) - whole).abs().max()
        worst = max(float((y - z).norm() / z.norm()) for y, z in zip(grads, expected, strict=True))
        if plan.rank == 0:
            print(f"images {where}: output, difference to one rank {difference:.1e}")
            print(f"images {where}: gradients, relative difference to one rank {worst:.1e}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(dist.group.WORLD)
    dist.destroy_process_group()

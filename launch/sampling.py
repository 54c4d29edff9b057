"""Completions by the model as it is, each rank sampling some of them whole; all ranks know all of them afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model import Attend, Transformer

# C completions, L tokens of the longest prompt and completion together, V vocabulary


class Sampled(NamedTuple):
    tokens: list[int]
    log_probs: list[float]  # of each token, under the policy that sampled it


def sample(
    model: Transformer,
    window: int,
    prompts: Sequence[bytes],  # C of them: one for each completion
    noise: Tensor,  # fp32 [C, most new tokens, V], of Gumbel's distribution
    end: int,
    group: dist.ProcessGroup,
) -> list[Sampled]:
    """A completion of each prompt up to the token ``end``, or of the most tokens that it may have.

    What is sampled depends on the noise and not on the number of ranks.
    """
    mine = slice(group.rank(), None, group.size())
    own = _sample(model, window, prompts[mine], noise[mine], end) if len(prompts) > group.rank() else []
    parts: list[list[Sampled]] = [[] for _ in range(group.size())]
    dist.all_gather_object(parts, own, group=group)
    return [parts[index % group.size()][index // group.size()] for index in range(len(prompts))]


@torch.no_grad()
def _sample(model: Transformer, window: int, prompts: Sequence[bytes], noise: Tensor, end: int) -> list[Sampled]:
    device, lengths = noise.device, torch.tensor([len(prompt) for prompt in prompts])
    num_rows, num_new = noise.shape[:2]
    tokens = torch.zeros(num_rows, int(lengths.max()) + num_new, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(list(prompt))
    tokens, rows = tokens.to(device), torch.arange(num_rows, device=device)
    position_ids, attend = torch.arange(tokens.shape[1], device=device)[None], dense(window)
    picked = []
    for place in range(num_new):
        at = lengths.to(device) + place  # what stands behind is not seen: attention is causal
        logits = model(tokens, position_ids.expand_as(tokens), attend)[rows, at - 1].float()
        log_probs = logits.log_softmax(dim=-1)
        chosen = (log_probs + noise[:, place]).argmax(dim=-1)
        tokens[rows, at] = chosen
        picked.append(log_probs[rows, chosen])
    found = []
    for row, length in enumerate(lengths.tolist()):
        new = tokens[row, length : length + num_new].tolist()
        num_tokens = new.index(end) + 1 if end in new else num_new
        found.append(Sampled(new[:num_tokens], [float(p[row]) for p in picked[:num_tokens]]))
    return found


def gumbel(seed: int, step: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Noise of a step, whatever was drawn before: the largest of log-probabilities and noise is a sample of them."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    uniform = torch.rand(shape, generator=generator).clamp(min=1e-20)
    return -(-uniform.log()).log().to(device)


def dense(window: int) -> Attend:
    """Causal attention of sequences alone, and within a window in sliding layers; in torch, without cpflex."""

    def attend(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
        places = torch.arange(q.shape[2], device=q.device)
        apart = places[:, None] - places
        seen = (apart >= 0) & (apart < (window if kind == "sliding" else q.shape[2]))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
        return scores.masked_fill(~seen, -math.inf).softmax(dim=-1).to(v.dtype) @ v

    return attend

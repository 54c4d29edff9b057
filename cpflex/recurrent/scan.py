"""Composing linear maps of the state: inside a block by cumulated decays, over blocks and fragments by an associative
scan.

A piece of the sequence maps the state that enters it to the state that leaves it, ``S -> M S + h``. Two pieces, one
after the other, map it to ``M2 M1 S + (M2 h1 + h2)``: again such a pair. So the pairs can be composed in any grouping,
in log2 many rounds (Blelloch 1990).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cpflex.recurrent.chain import Blocks

# B batch, N blocks or fragments, H heads, C places of a block, K rows of the state, V columns;
# T is K x K, or 1 x 1 where the state is only multiplied by a number


def apply(transition: Tensor, state: Tensor) -> Tensor:
    """``transition`` [..., T] times ``state`` [..., K, V]; also to compose two transitions."""
    return transition * state if transition.shape[-1] == 1 else transition @ state


def scan(
    transitions: Tensor,  # [B, N, H, T]
    *pieces: Tensor,  # each [B, N, H, K, V]
) -> tuple[Tensor, ...]:
    """For each piece h: ``y_n = M_n y_(n-1) + h_n``, from y = 0 on."""
    num = transitions.shape[1]
    if num <= 1:
        return pieces
    earlier, later = slice(0, num - 1, 2), slice(1, None, 2)
    second = transitions[:, later]
    halves = (apply(second, h[:, earlier]) + h[:, later] for h in pieces)
    odd = scan(apply(second, transitions[:, earlier]), *halves)  # y at places 1, 3, ...
    return tuple(_woven(transitions, h, y) for h, y in zip(pieces, odd, strict=True))


def _woven(transitions: Tensor, h: Tensor, odd: Tensor) -> Tensor:
    """y at all places, from y at places 1, 3, ..."""
    num, known = h.shape[1], odd[:, : (h.shape[1] - 1) // 2]
    even = torch.cat([h[:, :1], apply(transitions[:, 2::2], known) + h[:, 2::2]], dim=1)
    pairs = torch.stack([even[:, : num // 2], odd], dim=2).flatten(1, 2)
    return pairs if num % 2 == 0 else torch.cat([pairs, even[:, -1:]], dim=1)


def decays(log_decay: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """How much of the state that enters a block reaches each place, of what is written there leaves the block, and of
    what enters leaves: [B, N, H, C, D] twice, [B, N, H, 1, D].

    Args:
        log_decay: [B, N, H, C, D], at most 0; D is 1, or one for each row of the state.
    """
    until = log_decay.cumsum(dim=3)
    later = sum_of_later(log_decay)
    return (
        until.masked_fill(~blocks.from_entry, -torch.inf).exp(),
        later.masked_fill(~blocks.to_exit, -torch.inf).exp(),
        until[:, :, :, -1:].masked_fill(~blocks.through, -torch.inf).exp(),
    )


def sum_of_later(x: Tensor) -> Tensor:
    """At each place, the sum over the places after it; dims [..., C, D]. No difference of sums, which would cancel."""
    after = F.pad(x[..., 1:, :], (0, 0, 0, 1))
    return after.flip(-2).cumsum(dim=-2).flip(-2)


def pair_decays(log_decay: Tensor, blocks: Blocks) -> Tensor:
    """How much of what the second place writes reaches the first: [B, N, H, C, C] from [B, N, H, C, 1]. Each is a sum
    of its own: differences of cumulated decays would cancel.
    """
    size = log_decay.shape[3]
    between = log_decay.expand(*log_decay.shape[:-1], size).tril(-1).cumsum(dim=3)
    return between.masked_fill(~blocks.pairs, -torch.inf).exp()

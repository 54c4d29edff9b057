"""One recurrence on all ranks: summaries of the local fragments, one exchange, then the outputs.

For backward only the inputs and the summaries are kept; what lies between is computed again, from the inputs, without
another exchange forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpflex.recurrent.chain import Chain
from cpflex.recurrent.exchange import Facts, again, gather, sum_of_asked
from cpflex.recurrent.scan import apply, scan

# B batch, N blocks of this rank, F fragments of the sequence, H heads, K rows of the state, V columns, X numbers of a
# summary; T is K x K, or 1 x 1 where the state is only multiplied by a number

Parts = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]
"""Of this rank's blocks: how each maps the state that enters it, [B, N, H, T]; the state that leaves it if 0 enters,
[B, N, H, K, V]; and what gives the output from the states that really enter, [B, N, H, K, V].
"""


@torch._disable_dynamo  # type: ignore[attr-defined]
def recur(parts: Callable[..., Parts], inputs: Sequence[Tensor | None], chain: Chain, facts: Facts) -> Tensor:
    """The output of a recurrence on this rank's tokens.

    Args:
        parts: of the inputs; called again in backward. Runs without autocast.
        facts: on which the ranks have agreed.
    """
    return _Recurrence.apply(parts, chain, facts, *inputs)  # type: ignore[return-value]


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts: Callable[..., Parts], chain: Chain, facts: Facts, *inputs: Tensor | None) -> Tensor:
        ctx.parts, ctx.chain, ctx.facts = parts, chain, facts
        mine, shapes, complete = _local(parts, chain, inputs)
        everyones = gather(mine, chain)
        ctx.save_for_backward(everyones, *inputs)
        return complete(_before_fragments(everyones, shapes, chain))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        chain, (everyones, *inputs) = ctx.chain, ctx.saved_tensors
        again(ctx.facts, chain, grad.device)
        leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            mine, shapes, complete = _local(ctx.parts, chain, leaves)
            gathered = everyones.detach().requires_grad_()
            before = _before_fragments(gathered, shapes, chain)
            entering = before.detach().requires_grad_()
            out = complete(entering)
        (grad_entering,) = torch.autograd.grad(out, entering, grad, retain_graph=True)
        (grad_gathered,) = torch.autograd.grad(before, gathered, grad_entering)
        asked = sum_of_asked(grad_gathered, chain)
        wanted = [x for x in leaves if x is not None]
        grads = iter(torch.autograd.grad([out, mine], wanted, [grad, asked]))
        return None, None, None, *(None if x is None else next(grads) for x in leaves)


def _local(
    parts: Callable[..., Parts], chain: Chain, inputs: Sequence[Tensor | None]
) -> tuple[Tensor, tuple[torch.Size, torch.Size], Callable[[Tensor], Tensor]]:
    """What a rank computes by itself: the summaries of its fragments, [B, F_local, X]; the shapes of their two parts;
    and what gives the output from the states before all fragments, [B, F + 1, H, K, V].
    """
    device = next(x.device for x in inputs if x is not None)
    with torch.autocast(device.type, enabled=False):
        transitions, written, finish = parts(*inputs)
        blocks = chain.blocks(device)
        first = blocks.first[:, None, None, None]
        # a scan that begins anew in each fragment: there, the transition becomes one more thing to be carried
        left, passed = scan(transitions.masked_fill(first, 0.0), written, transitions.masked_fill(~first, 0.0))
        mine = torch.cat([x[:, blocks.last].flatten(2) for x in (passed, left)], dim=2)

    def complete(before_fragments: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            before = before_fragments[:, blocks.entry]
            after = apply(passed, before) + left
            return finish(torch.where(first, before, after.roll(1, dims=1)))

    return mine, (transitions.shape[2:], written.shape[2:]), complete


def _before_fragments(
    everyones: Tensor,  # [B, F, X], rank by rank
    shapes: tuple[torch.Size, torch.Size],
    chain: Chain,
) -> Tensor:  # [B, F + 1, H, K, V]
    """The state before each fragment of the sequence, in order, and after the last."""
    parts = everyones[:, chain.blocks(everyones.device).order].split([shape.numel() for shape in shapes], dim=2)
    transitions, written = (x.unflatten(2, shape) for x, shape in zip(parts, shapes, strict=True))
    with torch.autocast(everyones.device.type, enabled=False):
        (after,) = scan(transitions, written)
    return torch.cat([torch.zeros_like(after[:, :1]), after], dim=1)

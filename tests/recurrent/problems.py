"""A recurrence on a whole sequence, and the same on all ranks of a group; every rank makes the same inputs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import by_token
import torch
from torch import Tensor

import cpflex
from cases import LAYOUTS as DEALT
from cpflex import recurrent
from cpflex.recurrent import Chain

NAN = float("nan")
BATCH, HEADS, GROUPS, DIM, V_DIM, WIDTH = 2, 4, 2, 5, 3, 4


def crumbs(seq_len: int, world_size: int, work: Any = None) -> cpflex.Layout:
    """Pieces of two tokens, shorter than the halo of a convolution, dealt at random."""
    per_rank = -(-seq_len // (2 * world_size))
    dealt = torch.randperm(per_rank * world_size, generator=torch.Generator().manual_seed(seq_len))
    return cpflex.Layout(seq_len, 2, tuple(map(tuple, dealt.view(world_size, -1).sort().values.tolist())), "crumbs")


LAYOUTS = {**DEALT, "crumbs": crumbs}


class Recurrence(NamedTuple):
    oracle: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    parameters: tuple[str, ...]  # not sharded; their gradients are summed over the ranks
    dim: int  # of the tokens


RECURRENCES = {
    "gated_delta_rule": Recurrence(
        lambda documents, **x: by_token.delta_rule(**x, documents=documents, use_qk_l2norm=True),
        lambda chain, **x: recurrent.gated_delta_rule(**x, chain=chain, use_qk_l2norm=True),
        (),
        1,
    ),
    "decay_by_channel": Recurrence(
        lambda documents, **x: by_token.delta_rule(**x, documents=documents),
        lambda chain, **x: recurrent.gated_delta_rule(**x, chain=chain),
        (),
        1,
    ),
    "ssd": Recurrence(by_token.state_space, recurrent.ssd, ("A", "D"), 1),
    "causal_conv1d": Recurrence(
        by_token.convolution,
        lambda **x: recurrent.causal_conv1d(**x, activation="silu"),
        ("weight", "bias"),
        2,
    ),
}


def packed(seq_len: int, random: torch.Generator) -> Tensor:
    """[S]: some documents, one of them of a single token."""
    starts = torch.zeros(seq_len, dtype=torch.int64)
    starts[torch.randint(seq_len, (seq_len // 60 + 2,), generator=random)] = 1
    starts[seq_len // 2 : seq_len // 2 + 2] = 1
    return starts.cumsum(0)


def padded(ids: Tensor, left: int, inside: int, right: int) -> Tensor:
    """Padding before, between and after documents."""
    places, middle = torch.arange(len(ids)), len(ids) // 2
    is_padding = (places < left) | (places >= len(ids) - right) | ((places >= middle) & (places < middle + inside))
    return torch.where(is_padding, -1, 2 * ids + (places >= middle))


DOCUMENTS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "one": lambda seq_len, random: torch.zeros(1, seq_len, dtype=torch.int64),
    "packed": lambda seq_len, random: packed(seq_len, random)[None],
    "rows": lambda seq_len, random: torch.stack([packed(seq_len, random) for _ in range(BATCH)]),
    "padded": lambda seq_len, random: torch.stack([
        padded(packed(seq_len, random), *edges) for edges in ((seq_len // 3, 0, 2), (0, seq_len // 5, 3))
    ]),
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """`str` of it is a test id."""

    recurrence: str = "gated_delta_rule"
    documents: str = "rows"
    layout: str = "zigzag"
    world_size: int = 2
    seq_len: int = 203
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.recurrence}-{self.documents}-{self.layout}-w{self.world_size}-S{self.seq_len}-{dtype}"

    @property
    def parts(self) -> Recurrence:
        return RECURRENCES[self.recurrence]

    def random(self) -> torch.Generator:
        name = f"{self.recurrence} {self.documents} {self.seq_len}"
        return torch.Generator().manual_seed(zlib.crc32(name.encode()))

    @cached_property
    def ids(self) -> Tensor:
        """[1 or B, S], -1 at padding."""
        return DOCUMENTS[self.documents](self.seq_len, self.random())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Inputs of the whole sequence, and the gradient of the output; parameters are not in 16 bits."""
        random = self.random()

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=random, dtype=torch.float64)

        def uniform(*sizes: int) -> Tensor:
            return torch.rand(*sizes, generator=random, dtype=torch.float64)

        tokens, heads = (BATCH, self.seq_len), (BATCH, self.seq_len, HEADS)
        keys = (*tokens, GROUPS, DIM)
        if self.recurrence == "causal_conv1d":
            made = {"x": normal(BATCH, HEADS, self.seq_len), "weight": normal(HEADS, WIDTH), "bias": normal(HEADS)}
            made["grad"] = normal(BATCH, HEADS, self.seq_len)
        elif self.recurrence == "ssd":
            made = {"x": normal(*heads, V_DIM), "dt": uniform(*heads), "A": -3 * uniform(HEADS), "D": normal(HEADS)}
            made |= {"B": normal(*keys), "C": normal(*keys), "grad": normal(*heads, V_DIM)}
        else:
            by_channel = self.recurrence == "decay_by_channel"
            made = {"q": normal(*keys), "k": normal(*keys) / (DIM if by_channel else 1), "v": normal(*heads, V_DIM)}
            # from hardly any to all but complete
            made["g"] = -(10 ** (4 * uniform(*heads, DIM) - 2)) if by_channel else -(10 ** (4 * uniform(*heads) - 2))
            made |= {"beta": uniform(*heads), "grad": normal(*heads, V_DIM)}
        wide = torch.promote_types(self.dtype, torch.float32)
        return {name: x.to(wide if name in self.parts.parameters else self.dtype) for name, x in made.items()}

    def chain(self, plan: cpflex.Plan) -> Chain:
        return recurrent.make_chain(plan, doc_ids=self.ids, padding_mask=self.ids >= 0)

    def by_token(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Output and gradients, in one process."""
        return _by_token(self.recurrence, self.documents, self.seq_len, self.dtype, dtype)


@cache
def _by_token(
    recurrence: str, documents: str, seq_len: int, kind: torch.dtype, dtype: torch.dtype
) -> dict[str, Tensor]:
    problem = Problem(recurrence, documents, seq_len=seq_len, dtype=kind)
    inputs = {name: x.to(dtype).requires_grad_(name != "grad") for name, x in problem.tensors.items()}
    grad = inputs.pop("grad")
    out = problem.parts.oracle(**inputs, documents=problem.ids.expand(BATCH, -1))
    out = out + 0 * sum(x.sum() for x in inputs.values())  # of no token there is no graph
    return {"out": out.detach()} | dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), grad), strict=True))


def run_on_rank(group: Any, problem: Problem, ours: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Output and gradients of the local tokens; what the plan pads, and what is padding, holds NaN.

    Args:
        ours: instead of the problem's recurrence.
    """
    plan = cpflex.make_plan(cpflex.causal(), problem.seq_len, group, layout=LAYOUTS[problem.layout])
    dim = problem.parts.dim

    def local(name: str, x: Tensor) -> Tensor:
        if name in problem.parts.parameters:
            return x.clone()
        if name == "grad":
            return plan.shard(x, dim, pad_value=1.0)
        padding = (problem.ids < 0).view(len(problem.ids), *[1] * (dim - 1), -1, *[1] * (x.ndim - dim - 1))
        return plan.shard(x.masked_fill(padding, NAN), dim, pad_value=NAN)

    inputs = {name: local(name, x).requires_grad_(name != "grad") for name, x in problem.tensors.items()}
    grad = inputs.pop("grad")
    out = (ours or problem.parts.ours)(**inputs, chain=problem.chain(plan))
    grads = torch.autograd.grad(out, list(inputs.values()), grad)
    made = {"out": out.detach()} | dict(zip(inputs, grads, strict=True))
    return made | {"positions": plan.positions}


def assemble(results: Sequence[dict[str, Tensor]], problem: Problem) -> dict[str, Tensor]:
    """Of the whole sequence; gradients of parameters summed over the ranks. Nothing may have come out at pads."""
    positions = torch.cat([r["positions"] for r in results])
    order, seq_len = positions.argsort(), problem.seq_len
    whole = {}
    for name in results[0].keys() - {"positions"}:
        if name in problem.parts.parameters:
            whole[name] = torch.stack([r[name] for r in results]).sum(dim=0)
            continue
        found = torch.cat([r[name] for r in results], dim=problem.parts.dim).index_select(problem.parts.dim, order)
        assert not found.narrow(problem.parts.dim, seq_len, len(order) - seq_len).any()
        whole[name] = found.narrow(problem.parts.dim, 0, seq_len)
    return whole

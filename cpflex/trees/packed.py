"""PackedTree: completions as paths of one tree, with what each of their tokens counts for; TreeShard: a rank's part.

A token with several continuations predicts several. So predictions belong to the token that predicts: the softmax is
computed once where its logits are, and each continuation is read from it. And what a loss counts are terms, one for
each learned token of each completion: completions that share a token have a term each, of the same prediction.

    tokens        the  cat  sat  down  ran         the cat sat down; the cat ran; the cat sat down
    predictions             ^sat ^down             of ``cat``: sat and ran; of ``sat``: down
                            ^ran
    terms         sat down | ran | sat down        by completion; both of ``sat`` are the one prediction of it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cpflex.links.processes import Group, links_of
from cpflex.loss import sum_over_ranks
from cpflex.trees.tree import Tree

if TYPE_CHECKING:
    from cpflex.planning.plan import Plan

# S tokens of the tree, C completions, N terms: learned tokens of all completions; of a rank: S_local tokens, N_local
# terms, E predictions

Numbers = Tensor | np.ndarray | Sequence[float]


@dataclass(frozen=True, eq=False)
class PackedTree:
    """Completions in one sequence. Made by `pack`, `pack_sequences` and `pack_segments`; whole, on every rank."""

    tokens: Tensor  # int64 [S]
    tree: Tree
    rows: Tensor  # int64 [C]
    """At the end of which segment of the tree each completion ends."""
    term_tokens: Tensor  # int64 [N]
    """The token of each term, by its place in the sequence: completion by completion, along the path."""
    cu_terms: Tensor  # int64 [C + 1]
    """Where the terms of each completion start, and N."""
    kept: tuple[np.ndarray, ...]  # of each completion, bool [tokens after the prompt]
    """Which of its tokens are learned."""
    group_ids: Tensor  # int64 [C]
    """By prompt: completions that are compared with each other."""
    weights: Tensor  # floating [C]
    """Of each completion: its advantage, or 1."""
    values: Mapping[str, Tensor]  # floating [N] each
    """What is known of each term, for instance its log-probability when it was sampled."""

    @property
    def seq_len(self) -> int:
        """S: tokens of the tree."""
        return len(self.tokens)

    @property
    def position_ids(self) -> Tensor:
        """int64 [S]: how many tokens come before each on its path."""
        return self.tree.depths

    @property
    def num_completions(self) -> int:
        return len(self.rows)

    @property
    def num_terms(self) -> int:
        """N: learned tokens of all completions."""
        return len(self.term_tokens)

    @cached_property
    @torch.inference_mode(False)
    def lengths(self) -> Tensor:
        """int64 [C]: learned tokens of each completion."""
        return self.cu_terms.diff()

    @cached_property
    @torch.inference_mode(False)
    def multiplicity(self) -> Tensor:
        """int64 [S]: how many terms each token has: of how many completions it is a learned token."""
        return torch.bincount(self.term_tokens, minlength=self.seq_len)

    @property
    def predictors(self) -> Tensor:
        """int64 [S]: the place of the token before each on its path, which predicts it; -1 at roots."""
        return self.tree.before

    @torch.inference_mode(False)
    def shard(self, plan: Plan) -> TreeShard:
        """This rank's tokens, and the predictions and terms whose logits it will have. Nothing is sent.

        Args:
            plan: on the tokens of the tree.

        Raises:
            ValueError: a plan of another length.
        """
        if plan.seq_len != self.seq_len:
            raise ValueError(
                f"the tree has {self.seq_len} tokens, the plan {plan.seq_len}; pass packed.seq_len to make_plan"
            )
        positions, term_tokens = plan.positions.numpy(), self.term_tokens.numpy()
        real = positions < self.seq_len
        local_of = np.full(self.seq_len, -1)  # another rank's
        local_of[positions[real]] = np.flatnonzero(real)
        by = local_of[self.predictors.numpy()]  # which local token predicts each; roots have no term
        term_idx = np.flatnonzero(by[term_tokens] >= 0)
        predicted = np.zeros(self.seq_len, bool)
        predicted[term_tokens[term_idx]] = True
        mine = torch.from_numpy(term_idx)
        return TreeShard(
            tokens=plan.shard(self.tokens, dim=0, pad_value=0),
            position_ids=plan.shard(self.position_ids, dim=0, pad_value=0),
            predictors=torch.from_numpy(by[predicted]),
            targets=torch.from_numpy(self.tokens.numpy()[predicted]),
            predictions=torch.from_numpy((predicted.cumsum() - 1)[term_tokens[term_idx]]),
            term_idx=mine,
            completion_ids=torch.from_numpy(np.searchsorted(self.cu_terms.numpy(), term_idx, side="right") - 1),
            values={name: x[mine] for name, x in self.values.items()},
            lengths=self.lengths,
            group_ids=self.group_ids,
            weights=self.weights,
            world_size=plan.world_size,
        )

    def unpack(
        self,
        x: Tensor,  # floating [N_local], of this rank's terms
        shard: TreeShard,
        group: Group | None,
    ) -> list[Tensor]:  # [learned tokens] of each completion, the same on every rank
        """What each completion has at its learned tokens, from all ranks: log-probabilities for instance.

        Differentiable as `cpflex.loss.sum_over_ranks` is: every rank goes on to compute the same thing from it, and
        the loss is whole on each rank. All ranks must call it.

        >>> log_probs = packed.unpack(shard.log_probs(logits), shard, mesh["cp"])
        >>> [part.sum() for part in log_probs]                                 # of whole completions
        """
        shard.check_terms(x, "x")
        shard.check_group(group)
        whole = x.new_zeros(self.num_terms).index_copy(0, shard.term_idx, x)
        return self.split(sum_over_ranks(whole, group))

    def split(self, x: Tensor) -> list[Tensor]:
        """Of a tensor on all terms, [N, ...], the part of each completion."""
        if len(x) != self.num_terms:
            raise ValueError(f"dim 0 must have the {self.num_terms} terms; got {tuple(x.shape)}")
        return list(x.split(self.lengths.tolist()))

    @torch.inference_mode(False)
    def with_values(self, **values: Sequence[Numbers]) -> PackedTree:
        """The same with more of them: of each completion a number for each of its tokens, those that are not learned
        included and left out.
        """
        added = {name: torch.cat(self._kept(name, parts)) for name, parts in values.items()}
        return replace(self, values={**self.values, **added})

    def _kept(self, name: str, parts: Sequence[Numbers]) -> list[Tensor]:
        if len(parts) != self.num_completions:
            raise ValueError(
                f"{name} must have a list for each of {self.num_completions} completions; got {len(parts)}"
            )
        found = []
        for index, (part, kept) in enumerate(zip(parts, self.kept, strict=True)):
            numbers = floats(part, f"{name}[{index}]")
            if len(numbers) != len(kept):
                raise ValueError(
                    f"{name}[{index}] must have a number for each of the {len(kept)} tokens of completion {index}; "
                    f"got {len(numbers)}"
                )
            found.append(torch.from_numpy(numbers.numpy()[kept]))
        return found


@dataclass(frozen=True, eq=False)
class TreeShard:
    """What a rank holds of a `PackedTree`: its tokens, and the terms that they predict."""

    tokens: Tensor  # int64 [S_local]
    position_ids: Tensor  # int64 [S_local]
    predictors: Tensor  # int64 [E], local tokens
    targets: Tensor  # int64 [E], token ids
    """What each of them predicts: several entries for a token with several continuations, none for most of a prompt."""
    predictions: Tensor  # int64 [N_local], below E
    """Which prediction each term is of."""
    term_idx: Tensor  # int64 [N_local], rising
    """Which terms of all these are."""
    completion_ids: Tensor  # int64 [N_local]
    values: Mapping[str, Tensor]  # floating [N_local] each
    lengths: Tensor  # int64 [C], of all ranks
    group_ids: Tensor  # int64 [C]
    weights: Tensor  # floating [C]
    world_size: int

    @property
    def num_completions(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str | int) -> TreeShard:
        """The same, with all tensors on a device."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: x.to(device) for name, x in held.items() if isinstance(x, Tensor)}
        return replace(self, values={name: x.to(device) for name, x in self.values.items()}, **moved)

    def log_probs(
        self,
        logits: Tensor,  # [S_local, V] or [1, S_local, V], any floating dtype
        *,
        temperature: float = 1.0,
    ) -> Tensor:  # [N_local], at least fp32
        """The log-probability of each term under ``logits / temperature``. Nothing is exchanged.

        Of tokens that predict something a softmax is computed in fp32, once, whatever the number of continuations.

        Raises:
            ValueError: logits of other tokens, or a temperature that is not above 0.
        """
        used, row = self.predictors.unique(return_inverse=True)
        rows = self._of_tokens(logits, "logits", temperature).index_select(0, used)
        return _picked(rows, row, self.targets, temperature).index_select(0, self.predictions)

    def log_probs_of(
        self,
        hidden: Tensor,  # [S_local, E] or [1, S_local, E]
        head: Callable[[Tensor], Tensor],  # [rows, E] -> [rows, V]
        *,
        rows_at_once: int = 1024,
        temperature: float = 1.0,
    ) -> Tensor:  # [N_local], at least fp32
        """As `log_probs` of ``head(hidden)``, whose logits are never there all at once: those of tokens that predict
        something, a slice at a time, and again in backward. Every rank calls ``head`` equally often, as often as it
        would for all its tokens: the head may gather parameters.

        Raises:
            ValueError: hidden states of other tokens, a temperature that is not above 0, or no rows at once.
        """
        if rows_at_once < 1:
            raise ValueError(f"rows_at_once must be at least 1; got {rows_at_once}")
        flat = self._of_tokens(hidden, "hidden", temperature)
        used, row = self.predictors.unique(return_inverse=True)
        order = row.argsort(stable=True)  # predictions by the token that predicts
        targets, row = self.targets[order], row[order]
        parts, num_slices = [], -(-len(self.tokens) // rows_at_once)
        for index in range(num_slices):
            first, end = (len(used) * edge // num_slices for edge in (index, index + 1))
            mine = slice(*torch.searchsorted(row, torch.tensor([first, end], device=row.device)).tolist())

            def picked(rows: Tensor, mine: slice = mine, first: int = first) -> Tensor:
                return _picked(head(rows), row[mine] - first, targets[mine], temperature)

            parts.append(checkpoint(picked, flat.index_select(0, used[first:end]), use_reentrant=False))
        return torch.cat(parts)[order.argsort()[self.predictions]]  # type: ignore[arg-type]

    def _of_tokens(self, x: Tensor, name: str, temperature: float) -> Tensor:
        """[S_local, ...]"""
        flat = x.squeeze(0) if x.ndim == 3 else x
        if flat.ndim != 2 or len(flat) != len(self.tokens):
            raise ValueError(
                f"{name} must be those of this rank's {len(self.tokens)} tokens, [S_local, ...] or [1, S_local, ...]; "
                f"got {tuple(x.shape)}"
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0; got {temperature}")
        return flat

    def check_terms(self, x: Tensor, name: str) -> None:
        if x.shape != self.term_idx.shape:
            raise ValueError(
                f"{name} must have a number for each of this rank's {len(self.term_idx)} terms; got {tuple(x.shape)}"
            )

    def check_group(self, group: Group | None) -> None:
        """Sums over other ranks than have the terms would be of a part of them."""
        ranks = 1 if group is None else links_of(group).world_size
        if ranks != self.world_size:
            raise ValueError(
                f"the tree was sharded over {self.world_size} ranks, and the group has {ranks}; pass that of the plan"
            )


def _picked(logits: Tensor, row: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The log-probability of each target at its row of the logits, at least fp32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = wide if temperature == 1.0 else wide / temperature
    return wide[row, targets] - wide.logsumexp(dim=-1)[row]


def floats(given: Numbers, name: str) -> Tensor:
    """[length], fp32, or fp64 where it was."""
    x = torch.as_tensor(given)
    if x.ndim != 1 or x.is_complex():
        raise ValueError(f"{name} must be a list of numbers; got {x.dtype} {tuple(x.shape)}")
    x = x.detach().cpu()
    return x if x.dtype == torch.float64 else x.float()

"""Chain: the order in which a recurrence runs through the ranks' fragments, and where its state is forgotten.

Pure, made once per batch. The tokens of each fragment are cut into blocks of `BLOCK`, computed in parallel; the last
block of a fragment may have empty places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from cpflex.links.processes import Group
from cpflex.planning.plan import Plan
from cpflex.recurrent.documents import ages

# B batch (or 1, if all rows are alike), S_local tokens of this rank, N blocks, C places of a block (BLOCK)

BLOCK = 64
"""Tokens of a block at most."""

Result = TypeVar("Result")


class Blocks(NamedTuple):
    """The local tokens in blocks, on one device."""

    tokens: Tensor  # int64 [N * C]: local token at each place; empty places read some token
    places: Tensor  # int64 [S_local]: place of each local token; pads read some place
    real: Tensor  # bool [B, N * C]: the place holds a token of a document
    tells: Tensor  # bool [B, S_local]: the token belongs to a document
    starts: Tensor  # bool [B, N, 1, C]: a document starts here
    pairs: Tensor  # bool [B, N, 1, C, C]: the second is at or before the first, in its document
    from_entry: Tensor  # bool [B, N, 1, C, 1]: the state that enters the block reaches this place
    to_exit: Tensor  # bool [B, N, 1, C, 1]: what is written here leaves the block
    through: Tensor  # bool [B, N, 1, 1, 1]: what enters the block leaves it
    first: Tensor  # bool [N]: first block of its fragment
    last: Tensor  # int64 [num fragments of this rank]: last block of each
    entry: Tensor  # int64 [N]: how many fragments of the sequence lie before the block's
    order: Tensor  # int64 [num_fragments]: fragments in order, counted rank by rank


class Halo(NamedTuple):
    """Tokens of other ranks before this rank's fragments, and where each token finds those before it."""

    sends: tuple[Tensor, ...]  # int64, for each rank: local tokens that it wants
    counts: tuple[int, ...]  # tokens wanted from each rank
    taps: Tensor  # int64 [width + 1, S_local]: the token 0, 1, ... places before each, among local ones and halo
    reach: Tensor  # bool [width + 1, B, 1, S_local]: it exists, in the same document


@dataclass(frozen=True, eq=False)
class Chain:
    """How a recurrence runs through a sequence on one plan; what the functions of `cpflex.recurrent` take."""

    plan: Plan
    age: Tensor
    """Place of each local token within its document, int64 [1 or B, S_local]; -1 for tokens of no document."""
    key: str
    """Equal on two ranks iff their documents are."""
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def num_fragments(self) -> int:
        """Of all ranks."""
        return sum(map(len, self.plan.fragments))

    @property
    def facts(self) -> Mapping[str, Any]:
        """What ranks must agree on besides the plan."""
        return {"documents of the recurrence": self.key}

    def bind(self, group: Group | None) -> Chain:
        """This chain on a group, as `Plan.bind`: for one that was made elsewhere, with ``rank`` and ``world_size``."""
        return Chain(self.plan.bind(group), self.age, self.key)

    def check(self, batch_size: int, local_len: int) -> None:
        """Raises ValueError if tensors of this batch size and length are not what the chain was made for."""
        rows = self.age.shape[0]
        if local_len != self.plan.local_len or rows not in (1, batch_size):
            held = "any number of" if rows == 1 else str(rows)
            raise ValueError(
                f"the chain was made for {self.plan.local_len} local tokens in {held} rows; got {local_len} tokens in "
                f"{batch_size} rows"
            )

    def blocks(self, device: torch.device) -> Blocks:
        """Made once for each device."""
        return self._once((device,), lambda: Blocks(*(x.to(device) for x in _blocks(self))))

    def halo(self, width: int, device: torch.device) -> Halo:
        """Of ``width`` tokens before each fragment; made once for each device."""

        def make() -> Halo:
            sends, counts, taps, reach = _halo(self, width)
            return Halo(tuple(x.to(device) for x in sends), counts, taps.to(device), reach.to(device))

        return self._once((device, width), make)

    def _once(self, name: Any, make: Callable[[], Result]) -> Result:
        if name not in self._made:
            with torch.inference_mode(False):
                self._made[name] = make()
        return self._made[name]


@torch.inference_mode(False)
def make_chain(
    plan: Plan,
    *,
    doc_ids: Tensor | None = None,  # integers [S] or [B, S]
    position_ids: Tensor | None = None,  # integers [S], [1, S] or [B, S]
    padding_mask: Tensor | None = None,  # [B, S], zero or False at padding
) -> Chain:
    """Where a recurrence starts anew, for the whole sequence. Pure: never communicates.

    Args:
        plan: of any mask kinds; only its layout and group are used.
        doc_ids: equal within a document.
        position_ids: instead of ``doc_ids``, as Hugging Face packs: a document starts where they do not rise by one.
        padding_mask: padding belongs to no document: it is skipped, whatever it holds, and gets 0.

    Raises:
        NotImplementedError: the plan is of a chunk of a longer sequence, not the first.
        ValueError: shapes that do not fit, both of the two, a document in two pieces, or padding inside of one.
    """
    if plan.start:
        raise NotImplementedError(
            f"this plan is of a chunk that starts at {plan.start}; a recurrent layer would need the state of what came "
            "before, which is not supported - compute it on a plan of the whole sequence"
        )
    age = ages(plan.seq_len, doc_ids, position_ids, padding_mask)
    key = hashlib.sha256(f"{tuple(age.shape)}".encode() + age.numpy().tobytes()).hexdigest()[:16]
    return Chain(plan, plan.shard(age, dim=1, pad_value=-1), key)


def _blocks(chain: Chain) -> Blocks:
    plan = chain.plan
    lengths = [stop - start for start, stop in plan.fragments[plan.rank]]
    size = min(BLOCK, max(16, 1 << (max(lengths, default=1) - 1).bit_length()))
    counts = [-(-length // size) for length in lengths]
    tokens = np.full(max(sum(counts), 1) * size, -1, dtype=np.int64)  # a rank of pads has one empty block
    places = np.zeros(plan.local_len, dtype=np.int64)
    token = block = 0
    for length, count in zip(lengths, counts, strict=True):
        tokens[block * size : block * size + length] = np.arange(token, token + length)
        places[token : token + length] = np.arange(block * size, block * size + length)
        token, block = token + length, block + count
    age = torch.where(torch.from_numpy(tokens) >= 0, chain.age[:, torch.from_numpy(tokens.clip(min=0))], -1)
    starts = (age == 0).unflatten(1, (-1, size))
    document = starts.cumsum(dim=-1)[:, :, None]  # [B, N, 1, C]: counted from that which enters the block
    pairs = (document[..., :, None] == document[..., None, :]).tril()
    last = np.cumsum(counts, dtype=np.int64) - 1
    is_first = np.zeros(len(tokens) // size, dtype=bool)
    is_first[[0, *(last[:-1] + 1)]] = True
    order, before = _order(plan)
    return Blocks(
        tokens=torch.from_numpy(tokens.clip(min=0)),
        places=torch.from_numpy(places),
        real=age >= 0,
        tells=chain.age >= 0,
        starts=starts[:, :, None],
        pairs=pairs,
        from_entry=(document == 0)[..., None],
        to_exit=(document == document[..., -1:])[..., None],
        through=(document[..., -1:] == 0)[..., None],
        first=torch.from_numpy(is_first),
        last=torch.from_numpy(last),
        entry=torch.from_numpy(np.repeat(before, counts) if counts else np.zeros(1, dtype=np.int64)),
        order=torch.from_numpy(order),
    )


def _order(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """(fragments of all ranks in order, counted rank by rank; how many lie before each of this rank's), int64."""
    starts = np.array([start for held in plan.fragments for start, _ in held], dtype=np.int64)
    order = np.argsort(starts)
    rank_of = np.repeat(np.arange(plan.world_size), [len(held) for held in plan.fragments])
    return order, np.flatnonzero(rank_of[order] == plan.rank)


def _halo(chain: Chain, width: int) -> Halo:
    plan = chain.plan
    layout, rank = plan.layout, plan.rank
    positions = layout.positions(rank)

    def wanted(of: int) -> np.ndarray:
        """Positions up to ``width`` before the fragments of a rank that others hold, by holder, then rising."""
        starts = np.array([start for start, _ in plan.fragments[of]], dtype=np.int64)
        near = np.unique(starts[:, None] - np.arange(1, width + 1))
        holder = layout.owner[near[near >= 0] // layout.chunk_len]
        foreign = holder != of
        return np.stack([holder[foreign], near[near >= 0][foreign]])[:, np.argsort(holder[foreign], kind="stable")]

    holders, halo = wanted(rank)
    sends = []
    for peer in range(plan.world_size):
        held_by, position = wanted(peer) if peer != rank else np.empty((2, 0), dtype=np.int64)
        sends.append(torch.from_numpy(np.searchsorted(positions, position[held_by == rank])))
    known = np.concatenate([positions, halo])
    by_position = np.argsort(known)
    targets = positions - np.arange(width + 1)[:, None]
    found = np.searchsorted(known, targets, sorter=by_position).clip(max=len(known) - 1)
    reach = chain.age >= torch.arange(width + 1)[:, None, None]
    counts = tuple(np.bincount(holders, minlength=plan.world_size).tolist())
    return Halo(tuple(sends), counts, torch.from_numpy(by_position[found]), reach[:, :, None])

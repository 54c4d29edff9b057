"""pack: prompts and their completions to one sequence, in which what they share is stored once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cpflex.trees.packed import Numbers, PackedTree, floats
from cpflex.trees.prefixes import share_prefixes
from cpflex.trees.tree import Tree

# C completions

Tokens = Tensor | np.ndarray | Sequence[int]
"""Token ids, [length], not below 0."""


@torch.inference_mode(False)
def pack(
    groups: Sequence[tuple[Tokens, Sequence[Tokens]]],  # (prompt, completions)
    *,
    learned: Sequence[Sequence[bool] | Tensor] | None = None,  # of each completion, [its tokens]
    weights: Numbers | None = None,  # [C]
    values: Mapping[str, Sequence[Numbers]] | None = None,  # of each completion, [its tokens]
) -> PackedTree:
    """Prompts and their completions as one tree: whatever any of them begin with alike is stored once, be it a prompt,
    the instructions of all prompts, or the first tokens of some completions. Equal completions are stored once and
    count as many times as they were given.

    Completions are numbered through all groups, in the order given. Pure: the same on every rank.

    >>> packed = cpflex.trees.pack([(prompt, completions)], weights=advantages, values={"old_log_probs": old})
    >>> plan = cpflex.make_plan(cpflex.tree(packed.tree), packed.seq_len, mesh["cp"])
    >>> shard = packed.shard(plan)
    >>> logits = model(shard.tokens, shard.position_ids, plan)
    >>> log_probs = shard.log_probs(logits)                                    # of this rank's learned tokens

    Args:
        groups: a prompt has at least one token, as its last one predicts the first of each completion.
        learned: which tokens of a completion count; all if None. Outputs of tools, for instance, do not.
        weights: of each completion; 1 if None.
        values: by name, what is known of each token of each completion. Sharded with the terms.

    Raises:
        ValueError: no completion, an empty prompt, token ids that are none, or lists that do not fit.
    """
    sequences, prompt_lens, group_ids = [], [], []
    for group, (prompt, completions) in enumerate(groups):
        start = _token_ids(prompt, f"the prompt of group {group}")
        if not len(start):
            raise ValueError(f"the prompt of group {group} is empty; it must have a token that predicts the first")
        for index, completion in enumerate(completions):
            rest = _token_ids(completion, f"completion {index} of group {group}")
            sequences.append(np.concatenate([start, rest]))
            prompt_lens.append(len(start))
            group_ids.append(group)
    if not sequences:
        raise ValueError(f"there must be at least one completion; got {len(groups)} groups without any")
    tokens, tree, rows = share_prefixes(sequences)
    kept = _kept(learned, [len(s) - start for s, start in zip(sequences, prompt_lens, strict=True)])
    return _packed(tokens, tree, rows, prompt_lens, kept, group_ids, weights, values)


@torch.inference_mode(False)
def pack_sequences(
    sequences: Sequence[Tokens],
    *,
    learned: Sequence[Sequence[bool] | Tensor] | None = None,  # of each sequence, [its tokens]
    group_ids: Sequence[int] | Tensor | None = None,  # [C]
    weights: Numbers | None = None,  # [C]
    values: Mapping[str, Sequence[Numbers]] | None = None,  # of each sequence, [its tokens]
) -> PackedTree:
    """As `pack`, of whole sequences: all tokens but the first are learned, or those that ``learned`` says.

    Args:
        group_ids: which sequences are compared with each other; each is a group of its own if None.

    Raises:
        ValueError: as `pack`; an empty sequence, or a first token that is to be learned: nothing predicts it.
    """
    found = [_token_ids(sequence, f"sequence {index}") for index, sequence in enumerate(sequences)]
    empty = [index for index, sequence in enumerate(found) if not len(sequence)]
    if empty or not found:
        raise ValueError(f"there must be at least one sequence, none of them empty; got {len(found)}, empty {empty}")
    tokens, tree, rows = share_prefixes(found)
    return _whole(tokens, tree, rows, [len(sequence) for sequence in found], learned, group_ids, weights, values)


@torch.inference_mode(False)
def pack_segments(
    segments: Sequence[Tokens],
    parents: Sequence[int],
    *,
    learned: Sequence[bool] | None = None,  # of each segment
    group_ids: Sequence[int] | Tensor | None = None,  # [C]
    weights: Numbers | None = None,  # [C]
    values: Mapping[str, Sequence[Numbers]] | None = None,  # of each leaf's path, [its tokens]
) -> PackedTree:
    """As `pack`, of a tree that is known: an agent's turns. Segments are stored as given; each path to a leaf is a
    completion, numbered in the order of `Tree.leaves`. A segment that several continue counts in each of their paths.

    Args:
        parents: as `Tree` takes them.
        learned: segments whose tokens count: the agent's own, and not those of its tools. All if None.
        group_ids: of each leaf; leaves of one root if None.

    Raises:
        ValueError: what `Tree` refuses; a root that is to be learned by ``learned``: nothing predicts its first token.
    """
    found = [_token_ids(segment, f"segment {row}") for row, segment in enumerate(segments)]
    tree = Tree(parents, [len(segment) for segment in found])
    if learned is not None and len(learned) != len(found):
        raise ValueError(f"learned must have a bool for each of {len(found)} segments; got {len(learned)}")
    tokens, rows = np.concatenate(found), np.array(tree.leaves)
    paths = [tree.path(row) for row in tree.leaves]
    if group_ids is None:
        group_ids = torch.stack([tree.roots[path[0]] for path in paths]).unique(return_inverse=True)[1]
    of_paths = None
    if learned is not None:
        of_token = torch.tensor([bool(x) for x in learned])[tree.segment_ids]
        of_paths = [of_token[path] for path in paths]
    return _whole(tokens, tree, rows, [len(path) for path in paths], of_paths, group_ids, weights, values)


def _whole(
    tokens: np.ndarray,
    tree: Tree,
    rows: np.ndarray,
    lengths: Sequence[int],
    learned: Sequence[Sequence[bool] | Tensor] | None,
    group_ids: Sequence[int] | Tensor | None,
    weights: Numbers | None,
    values: Mapping[str, Sequence[Numbers]] | None,
) -> PackedTree:
    """Of completions that begin at roots."""
    kept = _kept(learned, lengths)
    for index, mask in enumerate(kept):
        if learned is None:
            mask[0] = False
        elif mask[0]:
            raise ValueError(f"the first token of sequence {index} cannot be learned, as nothing predicts it")
    groups = torch.arange(len(rows)) if group_ids is None else torch.as_tensor(group_ids)
    if groups.ndim != 1 or groups.is_floating_point() or groups.dtype == torch.bool:
        raise ValueError(f"group_ids must be integers [C]; got {groups.dtype} {tuple(groups.shape)}")
    return _packed(tokens, tree, rows, [0] * len(rows), kept, groups.tolist(), weights, values)


def _packed(
    tokens: np.ndarray,
    tree: Tree,
    rows: np.ndarray,
    prompt_lens: Sequence[int],
    kept: list[np.ndarray],
    group_ids: Sequence[int],
    weights: Numbers | None,
    values: Mapping[str, Sequence[Numbers]] | None,
) -> PackedTree:
    starts = np.cumsum(tree.lengths) - tree.lengths
    paths = (_path(tree, starts, int(row)) for row in rows)
    terms = [path[start:][mask] for path, start, mask in zip(paths, prompt_lens, kept, strict=True)]
    if len(group_ids) != len(rows):
        raise ValueError(f"group_ids must have one for each of {len(rows)} completions; got {len(group_ids)}")
    of_completions = torch.ones(len(rows)) if weights is None else floats(weights, "weights")
    if len(of_completions) != len(rows):
        raise ValueError(f"weights must have one for each of {len(rows)} completions; got {len(of_completions)}")
    packed = PackedTree(
        tokens=torch.from_numpy(tokens),
        tree=tree,
        rows=torch.from_numpy(rows),
        term_tokens=torch.from_numpy(np.concatenate(terms)),
        cu_terms=torch.tensor([0, *np.cumsum([len(part) for part in terms]).tolist()]),
        kept=tuple(kept),
        group_ids=torch.tensor(group_ids),
        weights=of_completions,
        values={},
    )
    return packed.with_values(**values) if values else packed


def _path(tree: Tree, starts: np.ndarray, row: int) -> np.ndarray:
    """As `Tree.path`, without a thread: of hundreds of short paths, threads of torch would take most of the time."""
    parts = []
    while row >= 0:
        parts.append(np.arange(starts[row], starts[row] + tree.lengths[row]))
        row = tree.parents[row]
    return np.concatenate(parts[::-1])


def _token_ids(given: Tokens, what: str) -> np.ndarray:
    ids = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if ids.ndim == 1 and not len(ids):
        return np.zeros(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0:
        raise ValueError(f"{what} must be token ids, integers [length] not below 0; got {given!r:.80}")
    return ids.astype(np.int64)


def _kept(learned: Sequence[Sequence[bool] | Tensor] | None, lengths: Sequence[int]) -> list[np.ndarray]:
    """Of each completion, bool [length]."""
    if learned is None:
        return [np.ones(length, bool) for length in lengths]
    if len(learned) != len(lengths):
        raise ValueError(f"learned must have a list for each of {len(lengths)} completions; got {len(learned)}")
    found = [torch.as_tensor(mask).cpu().bool().numpy() for mask in learned]
    for index, (mask, length) in enumerate(zip(found, lengths, strict=True)):
        if mask.shape != (length,):
            raise ValueError(
                f"learned[{index}] must have a bool for each of the {length} tokens of completion {index}; "
                f"got {mask.shape}"
            )
    return found

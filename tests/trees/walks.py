"""Trees by walking: each token's parent, one at a time."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from cpflex.trees import Tree


def parent_tokens(tree: Tree) -> list[int]:
    """Of each stored token, the one before it on its path; -1 at a root."""
    before: list[int] = []
    last: list[int] = []  # token of each segment
    for parent, length in zip(tree.parents, tree.lengths, strict=True):
        for place in range(length):
            before.append(len(before) - 1 if place else last[parent] if parent >= 0 else -1)
        last.append(len(before) - 1)
    return before


def steps_up(tree: Tree) -> Tensor:
    """How many steps from q up to k, int64 [S, S]; -1 where k is not on the path of q."""
    before, found = parent_tokens(tree), torch.full((tree.num_tokens, tree.num_tokens), -1)
    for q in range(tree.num_tokens):
        k, steps = q, 0
        while k >= 0:
            found[q, k] = steps
            k, steps = before[k], steps + 1
    return found


def random_tree(seed: int, most_segments: int = 14, longest: int = 6) -> Tree:
    """Deep, wide, one-token and long segments, forests; in any order in which parents come first."""
    draw = random.Random(seed)
    num_segments, deep, forest = draw.randint(1, most_segments), draw.random(), draw.random() / 3
    parents = []
    for row in range(num_segments):
        is_root = row == 0 or draw.random() < forest
        parents.append(-1 if is_root else row - 1 if draw.random() < deep else draw.randrange(row))
    return Tree(parents, [draw.choice([1, draw.randint(1, longest)]) for _ in parents])


def depth_first(tree: Tree) -> Tree:
    """The same tree, its segments stored in the order of the walk."""
    order = sorted(range(tree.num_segments), key=lambda row: int(tree.enter[tree.starts[row]]))
    place = {row: i for i, row in enumerate(order)} | {-1: -1}
    return Tree([place[tree.parents[row]] for row in order], [tree.lengths[row] for row in order])


def matrix(mask, size: int) -> Tensor:
    token = torch.arange(size)
    return mask(torch.tensor(0), torch.tensor(0), token[:, None], token).expand(size, size)

"""Sequences that share prefixes, stored once as a tree: completions of one prompt, turns of agents, drafted tokens."""

from cpflex.trees.bins import deal_trees, pairs_of
from cpflex.trees.losses import (
    cross_entropy,
    dpo_loss,
    group_advantages,
    k1,
    k2,
    k3,
    over_completions,
    over_length,
    over_tokens,
    policy_loss,
    sequence_ratios,
    token_ratios,
)
from cpflex.trees.packed import PackedTree, TreeShard
from cpflex.trees.packing import pack, pack_segments, pack_sequences
from cpflex.trees.tree import Tree, tree

__all__ = [
    "PackedTree",
    "Tree",
    "TreeShard",
    "cross_entropy",
    "deal_trees",
    "dpo_loss",
    "group_advantages",
    "k1",
    "k2",
    "k3",
    "over_completions",
    "over_length",
    "over_tokens",
    "pack",
    "pack_segments",
    "pack_sequences",
    "pairs_of",
    "policy_loss",
    "sequence_ratios",
    "token_ratios",
    "tree",
]

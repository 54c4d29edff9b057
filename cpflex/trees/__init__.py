"""Sequences that share prefixes, stored once as a tree: completions of one prompt, turns of agents, drafted tokens."""

from cpflex.trees.tree import Tree, tree

__all__ = ["Tree", "tree"]

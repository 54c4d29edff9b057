"""The graph of a mod: what its builder takes for one node and what for two."""

from __future__ import annotations

import itertools

import torch

from cpflex.mods.graph import GraphBuilder
from cpflex.mods.trace import trace_score_mod


def test_numbers_that_python_calls_equal_are_different_nodes():
    builder = GraphBuilder()
    numbers = [True, 1, 1.0, 0.0, -0.0]
    refs = [builder.add("const", number, dtype=torch.float32) for number in numbers]
    assert len(set(refs)) == len(numbers)
    assert all(
        builder.add("const", number, dtype=torch.float32) == ref for number, ref in zip(numbers, refs, strict=True)
    )


def test_both_zeros_may_be_in_one_mod():
    mod = trace_score_mod(lambda score, b, h, q, k: torch.atan2(score * 0.0, score) + torch.atan2(score * -0.0, score))
    products = [node for node in mod.graph.nodes if node.op == "mul"]
    assert len(products) == 2
    assert all(str(a.args[1]) != str(b.args[1]) for a, b in itertools.combinations(products, 2))

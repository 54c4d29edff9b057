"""Trees and their masks, against walks from each token to its root."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from walks import depth_first, matrix, parent_tokens, random_tree, steps_up

import cpflex
from cpflex.mods.trace import trace_mask_mod
from cpflex.planning.needs import classifier
from cpflex.planning.squares import classify_squares
from cpflex.tile_mask import Tiles
from cpflex.trees import Tree
from oracle import dense_attention

SEEDS = range(40)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_query_sees_what_a_walk_to_its_root_meets(seed: int):
    tree = random_tree(seed)
    steps = steps_up(tree)
    assert torch.equal(matrix(cpflex.tree(tree), tree.num_tokens), steps >= 0)
    assert torch.equal(matrix(cpflex.tree(tree.parents, torch.tensor(tree.lengths)), tree.num_tokens), steps >= 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_window_counts_along_the_path(seed: int):
    tree = random_tree(seed)
    steps = steps_up(tree)
    for window in (1, 2, 5, 100):
        one_sided = cpflex.tree(tree) & cpflex.sliding_window(window, positions=tree.depths)
        two_sided = cpflex.tree(tree) & cpflex.sliding_window(window - 1, 0, positions=tree.depths)
        for mask in (one_sided, two_sided, cpflex.tree(tree, window=window)):
            assert torch.equal(matrix(mask, tree.num_tokens), (steps >= 0) & (steps < window))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_tree_says_of_its_tokens_is_what_walks_find(seed: int):
    tree = random_tree(seed)
    steps, before = steps_up(tree), parent_tokens(tree)
    assert torch.equal(tree.depths, steps.amax(dim=1))
    assert torch.equal(tree.segment_ids.bincount(), torch.tensor(tree.lengths))
    assert (tree.segment_ids.diff() >= 0).all()
    assert torch.equal(tree.starts[tree.segment_ids], torch.searchsorted(tree.segment_ids, tree.segment_ids))
    roots = [int(steps[q].argmax()) for q in range(tree.num_tokens)]
    assert torch.equal(tree.roots, tree.segment_ids[roots])
    assert sorted(tree.enter.tolist()) == list(range(tree.num_tokens))
    below = (tree.enter[None] <= tree.enter[:, None]) & (tree.enter[:, None] < tree.leave[None])
    assert torch.equal(below, steps >= 0)
    assert tree.leaves == tuple(row for row in range(tree.num_segments) if row not in tree.parents)
    for row, path in zip(tree.leaves, tree.paths(), strict=True):
        assert torch.equal(path, tree.path(row))
        assert [-1, *path[:-1].tolist()] == [before[token] for token in path]
        assert path[-1] == tree.starts[row] + tree.lengths[row] - 1


@pytest.mark.parametrize("seed", SEEDS)
def test_every_path_is_causal_and_sees_nothing_else(seed: int):
    tree = random_tree(seed)
    seen = matrix(cpflex.tree(tree), tree.num_tokens)
    for path in tree.paths():
        assert torch.equal(seen[path][:, path], torch.ones(len(path), len(path)).tril().bool())
        assert torch.equal(seen[path].sum(dim=1), torch.arange(1, len(path) + 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_stored_depth_first_a_tree_is_the_same_and_its_mask_reads_one_table(seed: int):
    tree = random_tree(seed)
    stored = depth_first(tree)
    assert stored.is_depth_first
    assert torch.equal(stored.enter, torch.arange(tree.num_tokens))
    assert tree.is_depth_first == (stored.parents == tree.parents and stored.lengths == tree.lengths)
    seen = matrix(cpflex.tree(stored), tree.num_tokens)
    assert torch.equal(seen[tree.enter][:, tree.enter], matrix(cpflex.tree(tree), tree.num_tokens))
    assert len(trace_mask_mod(cpflex.tree(stored)).captured) == 1


def test_trees_of_a_forest_do_not_see_each_other():
    tree = Tree([-1, 0, -1, 2, 0, 2], [3, 2, 1, 4, 1, 1])
    same = tree.roots[:, None] == tree.roots
    assert not matrix(cpflex.tree(tree), 12)[~same].any()
    within = cpflex.tree(tree) & cpflex.document(tree.roots)
    assert torch.equal(matrix(within, 12), matrix(cpflex.tree(tree), 12))


def test_documents_cut_paths_and_complements_and_prefixes_compose():
    tree = Tree([-1, 0, 0], [4, 3, 2])
    seen, same = matrix(cpflex.tree(tree), 9), tree.segment_ids[:, None] == tree.segment_ids
    assert torch.equal(matrix(cpflex.tree(tree) & cpflex.document(tree.segment_ids), 9), seen & same)
    assert torch.equal(matrix(cpflex.tree(tree) | cpflex.document(tree.segment_ids), 9), seen | same)
    chunks = tree.depths[:, None] // 3 == tree.depths // 3
    assert torch.equal(matrix(cpflex.tree(tree) & cpflex.document(tree.depths // 3), 9), seen & chunks)
    assert torch.equal(matrix(~cpflex.tree(tree), 9), ~seen)


@pytest.mark.parametrize("length", [1, 3])
def test_a_chain_of_many_levels_is_one_causal_sequence(length: int):
    chain = Tree([*range(-1, 999)], [length] * 1000)
    assert torch.equal(matrix(cpflex.tree(chain), 1000 * length), matrix(cpflex.causal(), 1000 * length))
    assert torch.equal(chain.depths, torch.arange(1000 * length))
    assert torch.equal(chain.path(999), torch.arange(1000 * length))
    comb = Tree([-1, *(max(0, row - 2 + row % 2) for row in range(1, 2001))])  # a tooth at every level
    assert int(comb.depths.max()) == 1000
    assert torch.equal(matrix(cpflex.tree(comb), 2001).sum(dim=1) - 1, comb.depths)
    assert torch.equal(matrix(cpflex.tree(comb, window=30), 2001).sum(dim=1), (comb.depths + 1).clamp(max=30))


def test_one_segment_and_one_token_are_trees():
    assert torch.equal(matrix(cpflex.tree([-1], [5]), 5), matrix(cpflex.causal(), 5))
    assert matrix(cpflex.tree([-1]), 1).tolist() == [[True]]
    assert torch.equal(matrix(cpflex.tree([-1, -1, -1]), 3), torch.eye(3).bool())


def test_trees_are_plain_data():
    tree = Tree(torch.tensor([-1, 0, 0], dtype=torch.int32), np.array([3, 2, 1]), seq_len=6)
    assert (tree.parents, tree.lengths, repr(tree)) == ((-1, 0, 0), (3, 2, 1), "Tree(3 segments, 6 tokens)")
    assert tree == Tree([-1, 0, 0], [3, 2, 1]) != Tree([-1, 0, 1], [3, 2, 1])
    assert {tree: 1}[Tree((-1, 0, 0), (3, 2, 1))] == 1
    bare = len(pickle.dumps(tree))
    assert int(tree.leave.max()) == 6
    assert len(pickle.dumps(tree)) == bare, "what can be computed again does not travel"
    assert pickle.loads(pickle.dumps(tree)) == copy.deepcopy(tree) == tree


def test_trees_of_inference_mode_serve_training():
    with torch.inference_mode():
        tree = Tree([-1, 0, 0], [3, 2, 1])
        mask = cpflex.tree(tree) & cpflex.sliding_window(2, positions=tree.depths)
        tensors = [*tree.reach(2), tree.starts, tree.roots, tree.enter, tree.leave, tree.segment_ids, *tree.paths()]
    assert not any(x.is_inference() for x in [*tensors, *trace_mask_mod(mask).captured])


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a parent that does not exist": (
        lambda: Tree([-1, 0, 7], [1, 1, 1]),
        r"rows 0 .. 2, or -1 for a root; row 2 has 7",
    ),
    "a parent below -1": (lambda: Tree([-1, -2]), "row 1 has -2"),
    "a parent after its child": (lambda: Tree([-1, 2, 0], [1, 1, 1]), "before its children; row 1 has parent 2 - sort"),
    "its own parent": (lambda: Tree([-1, 1], [1, 1]), "no segment may continue itself; .*: 1 -> 1"),
    "a cycle": (lambda: Tree([-1, 3, 1, 2], [1] * 4), "no segment may continue itself; .*: 1 -> 3 -> 2 -> 1"),
    "below a cycle": (lambda: Tree([2, 2, 1]), "no segment may continue itself; .*: 2 -> 1 -> 2"),
    "an empty segment": (lambda: Tree([-1, 0], [3, 0]), "at least 1 token; row 1 has 0 - leave it out"),
    "a negative length": (lambda: Tree([-1, 0], [-3, 1]), "at least 1 token; row 0 has -3"),
    "too many tokens": (lambda: Tree([-1, 0], [3, 4], seq_len=5), "sum to seq_len=5; they sum to 7: row 1 ends at 7"),
    "too few tokens": (lambda: Tree([-1, 0], [3, 4], seq_len=9), "sum to seq_len=9; they sum to 7: row 1 is the last"),
    "no segments": (lambda: Tree([], []), "one or more; got 0 and 0 rows"),
    "fewer lengths": (lambda: cpflex.tree([-1, 0], [3]), "of the same segments, one or more; got 2 and 1 rows"),
    "parents of floats": (lambda: Tree([-1, 0.0], [1, 1]), "parents must be integers; row 1 is 0.0"),
    "lengths of bools": (lambda: Tree([-1], [True]), "lengths must be integers; row 0 is True"),
    "no root named None": (lambda: Tree([None, 0], [1, 1]), "parents must be integers; row 0 is None"),
    "a float tensor": (lambda: Tree(torch.tensor([-1.0]), [1]), r"parents must be integers \[N\]; got torch.float32"),
    "a tensor of bools": (lambda: Tree([-1], torch.tensor([True])), r"lengths must be integers \[N\]; got torch.bool"),
    "a batch of parents": (lambda: Tree(torch.tensor([[-1]]), [1]), r"parents must be integers \[N\]; .* \(1, 1\)"),
    "a window of nothing": (lambda: cpflex.tree([-1], [3], window=0), "window must be an integer of at least 1; got 0"),
    "a window of True": (
        lambda: cpflex.tree([-1], [3], window=True),
        "window must be an integer of at least 1; got True",
    ),
    "lengths given twice": (lambda: cpflex.tree(Tree([-1], [2]), [2]), "a Tree has its lengths; pass it alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_tree_is_refused_by_its_row(name: str):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


# -- planning


def left_open(mask: cpflex.MaskMod, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles that intervals left open, and those in which some pairs are seen and others are not; bool [T, T]."""
    tiles = Tiles(num_tokens, 1)
    seen = matrix(mask, num_tokens).numpy()
    some, every = (
        f.reduceat(f.reduceat(seen, tiles.lo, axis=0), tiles.lo, axis=1) for f in (np.logical_or, np.logical_and)
    )
    is_open = np.zeros_like(some)
    is_open[classify_squares(classifier(trace_mask_mod(mask), 1, 1), tiles).partial] = True
    return is_open, some & ~every


@pytest.mark.parametrize("seed", range(6))
def test_intervals_settle_every_tile_of_a_tree_stored_depth_first(seed: int):
    tree = depth_first(random_tree(seed, most_segments=30, longest=400))
    is_open, is_mixed = left_open(cpflex.tree(tree), tree.num_tokens)
    assert np.array_equal(is_open, is_mixed)


@pytest.mark.parametrize("window", [16, 200, 1000])
def test_intervals_settle_every_tile_of_a_window_along_its_paths(window: int):
    for seed in range(6):
        tree = depth_first(random_tree(seed, most_segments=30, longest=400))
        is_open, is_mixed = left_open(cpflex.tree(tree, window=window), tree.num_tokens)
        assert np.array_equal(is_open, is_mixed)


def test_a_window_by_depth_leaves_open_tiles_where_branches_meet():
    """Segments of a few tiles. Branches of different depths share a tile where one ends: its bounds are those of both."""
    needless = mixed = 0
    for seed in range(6):
        tree = depth_first(random_tree(seed, most_segments=30, longest=400))
        mask = cpflex.tree(tree) & cpflex.sliding_window(16, positions=tree.depths)
        is_open, is_mixed = left_open(mask, tree.num_tokens)
        assert not (is_mixed & ~is_open).any()
        needless, mixed = needless + int((is_open & ~is_mixed).sum()), mixed + int(is_mixed.sum())
    assert 0 < needless <= 0.4 * mixed


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_of_a_window_are_those_that_walks_find(seed: int):
    tree = random_tree(seed)
    steps = steps_up(tree)
    for window in (1, 3, 6, 2**40):
        first, leave = tree.reach(window)
        sees = (steps >= 0) & (steps < window)
        assert torch.equal(first, sees.int().argmax(dim=1))
        assert torch.equal(leave, torch.where(sees, tree.enter[:, None], -1).amax(dim=0) + 1)


# -- trees of drafted tokens

MEDUSA = [(0,), (0, 0), (1,), (0, 1), (2,), (0, 0, 0), (1, 0), (0, 2), (3,), (0, 3), (4,), (0, 0, 1), (0, 4), (5,)]
"""Which of the likeliest continuations is taken at each step: paths as Medusa lists them (arXiv:2401.10774)."""


def drafts_of(choices: list[tuple[int, ...]], context: int) -> Tree:
    """The context, then one token for each choice, which continues the one that it is longer than by a step."""
    ordered = sorted(choices, key=len)
    rows = {(): 0} | {choice: row for row, choice in enumerate(ordered, start=1)}
    return Tree([-1, *(rows[choice[:-1]] for choice in ordered)], [context, *[1] * len(ordered)])


@pytest.mark.parametrize("context", [1, 37])
def test_drafts_see_the_context_and_the_drafts_that_they_continue(context: int):
    tree, ordered = drafts_of(MEDUSA, context), sorted(MEDUSA, key=len)
    seen = matrix(cpflex.tree(tree), tree.num_tokens)
    assert torch.equal(seen[:context, :context], matrix(cpflex.causal(), context))
    assert seen[context:, :context].all() and not seen[:context, context:].any()
    continues = [[q[: len(k)] == k for k in ordered] for q in ordered]
    assert torch.equal(seen[context:, context:], torch.tensor(continues))
    assert tree.depths[context:].tolist() == [context + len(choice) - 1 for choice in ordered]
    windowed = matrix(cpflex.tree(tree) & cpflex.sliding_window(2, positions=tree.depths), tree.num_tokens)
    assert windowed[context + ordered.index((0, 0))].nonzero().flatten().tolist() == [
        context + ordered.index((0,)),
        context + ordered.index((0, 0)),
    ]


def test_drafts_alone_attend_to_a_context_whose_keys_are_another_sequence():
    """Queries are the drafts, keys the context and the drafts: the last rows of the whole attention."""
    context, heads, dim = 200, 2, 16
    tree = drafts_of(MEDUSA, context)
    whole, size = cpflex.tree(tree), tree.num_tokens
    q, k, v = torch.randn(3, 1, heads, size, dim, generator=torch.Generator().manual_seed(0)).unbind()
    expected = dense_attention(q, k, v, torch.zeros_like(q), torch.zeros(1, heads, size), whole).out
    drafts = cpflex.cross(lambda b, h, q_idx, kv_idx: whole(b, h, q_idx + context, kv_idx), size)
    plan = cpflex.make_plan({"drafts": drafts}, size - context)
    own = plan.shard(q[:, :, context:], dim=2, pad_value=0.0)
    out = cpflex.flex_attention(own, k, v, block_mask=plan["drafts"])
    torch.testing.assert_close(plan.unshard(out, dim=2).double(), expected[:, :, context:], rtol=1e-5, atol=2e-6)

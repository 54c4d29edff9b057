"""Packing: prefixes against a trie of single tokens, predictions and terms against the completions one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from separate import BATCHES, Batch, ids
from torch import Tensor

import cpflex
from cpflex import trees
from cpflex.testing import run_ranks
from cpflex.trees.packed import TreeShard
from cpflex.trees.prefixes import share_prefixes
from patience import patience

# -- longest shared prefixes


def random_sequences(seed: int) -> list[list[int]]:
    """Of few tokens, so that they share much: some are equal, some begin others."""
    random = np.random.default_rng(seed)
    found = [random.integers(0, 2, random.integers(1, 9)).tolist() for _ in range(random.integers(1, 14))]
    return found + [found[0], found[-1][:1]]


@pytest.mark.parametrize("seed", range(30))
def test_the_tree_is_the_trie_of_the_sequences(seed: int):
    sequences = random_sequences(seed)
    tokens, tree, rows = share_prefixes([np.array(s) for s in sequences])
    prefixes = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    assert tree.num_tokens == len(tokens) == len(prefixes), "each prefix is stored once"
    for sequence, row in zip(sequences, rows, strict=True):
        assert tokens[tree.path(int(row)).numpy()].tolist() == sequence
    assert tree.is_depth_first
    parted = {row for row in range(tree.num_segments) if tree.parents.count(row) > 1}
    assert set(range(tree.num_segments)) == parted | set(rows.tolist()), "cut only where sequences part or end"


def test_what_comes_first_stays_first():
    tokens, tree, rows = share_prefixes([np.array(s) for s in ([9, 1], [9, 8, 8], [2], [9, 8, 3])])
    assert tokens.tolist() == [9, 1, 8, 8, 3, 2]
    assert (tree.parents, tree.lengths) == ((-1, 0, 0, 2, 2, -1), (1, 1, 1, 1, 1, 1))
    assert rows.tolist() == [1, 3, 5, 4]


def test_sequences_that_share_nothing_are_a_pack_of_documents():
    tokens, tree, rows = share_prefixes([np.array([3, 3]), np.array([1]), np.array([2, 1])])
    assert (tokens.tolist(), tree.parents, rows.tolist()) == ([3, 3, 1, 2, 1], (-1, -1, -1), [0, 1, 2])


def test_many_long_completions_take_a_fraction_of_a_second():
    random = np.random.default_rng(0)
    prompt = random.integers(0, 150_000, 2000)
    sequences = [np.concatenate([prompt, random.integers(0, 150_000, 8000)]) for _ in range(256)]
    began = time.perf_counter()
    packed = trees.pack([(prompt, [s[2000:] for s in sequences])])
    assert packed.seq_len == 2000 + 256 * 8000
    assert time.perf_counter() - began < patience(1.5)


# -- predictions and terms


def learned_of(batch: Batch) -> list[list[bool]]:
    """A tool's output in the middle of some completions."""
    return [[not (i % 3 == 0 and 2 <= at < 5) for at in range(len(c))] for i, (_, c) in enumerate(batch.pairs)]


def shards_of(packed: trees.PackedTree, world_size: int) -> list[TreeShard]:
    mask = cpflex.tree(packed.tree)
    plans = (cpflex.make_plan(mask, packed.seq_len, rank=r, world_size=world_size) for r in range(world_size))
    return [packed.shard(plan) for plan in plans]


@pytest.mark.parametrize("masked", [False, True], ids=["all learned", "some learned"])
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_each_learned_token_has_one_term_where_the_token_before_it_is(batch: Batch, world_size: int, masked: bool):
    learned = learned_of(batch) if masked else None
    packed = trees.pack(batch.groups, learned=learned)
    found = []
    for shard in shards_of(packed, world_size):
        for term, prediction, completion in zip(
            shard.term_idx.tolist(), shard.predictions.tolist(), shard.completion_ids.tolist(), strict=True
        ):
            at = int(shard.predictors[prediction])
            before, target = int(shard.tokens[at]), int(shard.targets[prediction])
            found.append((term, completion, int(shard.position_ids[at]), before, target))
    expected = []
    for index, (prompt, completion) in enumerate(batch.pairs):
        sequence = prompt + completion
        for at in range(len(prompt), len(sequence)):
            if learned is None or learned[index][at - len(prompt)]:
                expected.append((len(expected), index, at - 1, sequence[at - 1], sequence[at]))
    assert sorted(found) == expected


def test_a_token_with_several_continuations_predicts_each_once():
    packed = trees.pack([([5, 6], [[1, 2], [3], [1, 2], [1, 4], [1]])])
    (shard,) = shards_of(packed, 1)
    assert packed.tokens.tolist() == [5, 6, 1, 2, 4, 3]
    assert list(zip(shard.predictors.tolist(), shard.targets.tolist(), strict=True)) == [(1, 1), (2, 2), (2, 4), (1, 3)]
    assert packed.multiplicity.tolist() == [0, 0, 4, 2, 1, 1]
    assert shard.predictions.bincount().tolist() == [4, 2, 1, 1]


def test_positions_are_those_of_the_completions_one_by_one():
    batch = BATCHES["all at once"]
    packed = trees.pack(batch.groups)
    for row, (prompt, completion) in zip(packed.rows.tolist(), batch.pairs, strict=True):
        path = packed.tree.path(row)
        assert packed.tokens[path].tolist() == prompt + completion
        assert packed.position_ids[path].tolist() == list(range(len(path)))


def test_weights_and_values_are_carried_to_the_rank_that_needs_them():
    batch = BATCHES["all at once"]
    learned = learned_of(batch)
    values = [[100.0 * index + at for at in range(len(c))] for index, (_, c) in enumerate(batch.pairs)]
    packed = trees.pack(batch.groups, learned=learned, weights=batch.advantages, values={"old": values})
    kept = [[x for x, keep in zip(part, mask, strict=True) if keep] for part, mask in zip(values, learned, strict=True)]
    assert [part.tolist() for part in packed.split(packed.values["old"])] == kept
    assert packed.lengths.tolist() == [len(part) for part in kept]
    for shard in shards_of(packed, 3):
        assert torch.equal(shard.values["old"] // 100, shard.completion_ids.float())
        assert torch.equal(shard.weights, batch.advantages)
    again = packed.with_values(ref=values)
    assert torch.equal(again.values["ref"], packed.values["old"])
    assert set(again.values) == {"old", "ref"}


def test_turns_of_an_agent_are_packed_as_they_are_stored():
    segments, parents = [[1, 2, 3], [4, 5], [6], [4, 5], [7, 8]], [-1, 0, 1, 0, 2]
    packed = trees.pack_segments(segments, parents, learned=[False, True, False, True, True])
    assert packed.tokens.tolist() == [1, 2, 3, 4, 5, 6, 4, 5, 7, 8]
    assert packed.tree == trees.Tree(parents, [3, 2, 1, 2, 2])
    assert [packed.tokens[part].tolist() for part in packed.split(packed.term_tokens)] == [[4, 5], [4, 5, 7, 8]]
    assert packed.group_ids.tolist() == [0, 0]
    (shard,) = shards_of(packed, 1)  # the root's last token predicts 4 twice, as is stored twice
    assert [t for at, t in zip(shard.predictors.tolist(), shard.targets.tolist(), strict=True) if at == 2] == [4, 4]


def test_sequences_are_learned_from_their_second_token_on():
    packed = trees.pack_sequences([[1, 2, 3], [1, 2, 4], [5]], weights=[1.0, 2.0, 3.0])
    assert packed.lengths.tolist() == [2, 2, 0]
    assert packed.group_ids.tolist() == [0, 1, 2]
    assert packed.tokens.tolist() == [1, 2, 3, 4, 5]
    assert trees.pack_segments([[1, 2], [3]], [-1, 0]).lengths.tolist() == [2]


@pytest.mark.parametrize("given", [list, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32), np.array])
def test_tokens_may_be_lists_tensors_or_arrays(given: Callable[[list[int]], Any]):
    packed = trees.pack([(given([1, 2]), [given([3]), given([3, 4])])], values={"old": [[0.5], given([1, 2])]})
    assert packed.tokens.tolist() == [1, 2, 3, 4]
    assert packed.values["old"].tolist() == [0.5, 1.0, 2.0]


def test_an_empty_completion_has_no_term():
    packed = trees.pack([([1, 2], [[], [3]])])
    assert packed.lengths.tolist() == [0, 1]
    assert [part.tolist() for part in packed.split(torch.tensor([7.0]))] == [[], [7.0]]


def test_a_pack_made_in_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        packed = trees.pack([([1, 2], [[3], [4]])], weights=[1.0, 2.0])
        (shard,) = shards_of(packed, 1)
    logits = torch.randn(len(shard.tokens), 6, requires_grad=True)
    trees.cross_entropy(shard.log_probs(logits), shard).backward()
    assert logits.grad is not None


# -- log-probabilities


def unpacked_on(group: Any, temperature: float, dtype: torch.dtype) -> dict[str, Any]:
    batch = BATCHES["all at once"]
    packed = trees.pack(batch.groups, learned=learned_of(batch))
    plan = cpflex.make_plan(cpflex.tree(packed.tree), packed.seq_len, group)
    shard, logits = packed.shard(plan), whole_logits(packed.seq_len, dtype).requires_grad_()
    local = shard.log_probs(plan.shard(logits, dim=0, pad_value=float("nan"))[None], temperature=temperature)
    parts = packed.unpack(local, shard, group)
    (grad,) = torch.autograd.grad(squares(parts), logits)
    return {"parts": [part.detach() for part in parts], "grad": grad}


def whole_logits(seq_len: int, dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(seq_len, 13, generator=torch.Generator().manual_seed(4))).to(dtype)


def squares(parts: Sequence[Tensor]) -> Tensor:
    """No sum over tokens."""
    return sum((index + 1) * part.sum() ** 2 for index, part in enumerate(parts))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("world_size", [1, 3])
def test_log_probabilities_come_back_by_completion_with_gradients(
    world_size: int, temperature: float, dtype: torch.dtype
):
    batch = BATCHES["all at once"]
    packed = trees.pack(batch.groups, learned=learned_of(batch))
    leaf = whole_logits(packed.seq_len, dtype).double().requires_grad_()
    log_p, expected = (leaf / temperature).log_softmax(dim=-1), []
    for row, (prompt, completion), mask in zip(packed.rows.tolist(), batch.pairs, learned_of(batch), strict=True):
        path = packed.tree.path(row)
        part = log_p[path[len(prompt) - 1 : -1], torch.tensor(completion, dtype=torch.int64)]
        expected.append(part[torch.tensor(mask)])
    (grad,) = torch.autograd.grad(squares(expected), leaf)
    results = run_ranks(lambda group: unpacked_on(group, temperature, dtype), world_size)
    for found in results:
        assert found["parts"][0].dtype == torch.float32
        for part, other in zip(found["parts"], expected, strict=True):
            torch.testing.assert_close(part.double(), other.detach(), rtol=1e-5, atol=1e-5)
    total = torch.stack([found["grad"].double() for found in results]).sum(dim=0)
    assert (total - grad).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * grad.norm()


@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_head_on_a_few_rows_at_a_time_gives_the_same(world_size: int, rows_at_once: int):
    packed = trees.pack(BATCHES["all at once"].groups)
    head, hidden = torch.nn.Linear(6, 13), torch.randn(packed.seq_len, 6)
    for shard in shards_of(packed, world_size):
        local = torch.cat([hidden, torch.zeros(99, 6)])[: len(shard.tokens)].requires_grad_()
        seen: list[int] = []
        hook = head.register_forward_hook(lambda _, given, __, seen=seen: seen.append(len(given[0])))
        found = shard.log_probs_of(local[None], head, rows_at_once=rows_at_once, temperature=0.7)
        assert len(seen) == -(-len(shard.tokens) // rows_at_once), "as often on every rank"
        assert max(seen) <= rows_at_once
        weights, inputs = torch.randn(len(found)), [local, *head.parameters()]
        grads = torch.autograd.grad((weights * found).sum(), inputs)
        hook.remove()
        expected = shard.log_probs(head(local), temperature=0.7)
        torch.testing.assert_close(found, expected)
        for grad, other in zip(grads, torch.autograd.grad((weights * expected).sum(), inputs), strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)


def test_a_rank_that_predicts_nothing_has_a_graph():
    packed = trees.pack([(ids(20, 0), [[1]])])
    shard = shards_of(packed, 2)[0]
    assert not len(shard.term_idx)
    logits = torch.randn(len(shard.tokens), 13, requires_grad=True)
    for log_probs in (shard.log_probs(logits), shard.log_probs_of(logits, torch.nn.Identity())):
        share = trees.policy_loss(log_probs, shard)
        (grad,) = torch.autograd.grad(share, logits)
        assert (share.item(), grad.abs().max().item()) == (0.0, 0.0)


# -- what does not fit

PACKED = trees.pack([([1, 2], [[3, 4], [3]])])
(SHARD,) = shards_of(PACKED, 1)
HALF = shards_of(PACKED, 2)[0]
PLAN, P = cpflex.make_plan(cpflex.causal(), 9), torch.zeros(16, 5)

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no completion": (lambda: trees.pack([([1], [])]), "at least one completion"),
    "an empty prompt": (lambda: trees.pack([([1], [[2]]), ([], [[3]])]), "prompt of group 1 is empty"),
    "negative ids": (lambda: trees.pack([([1], [[2, -100]])]), "completion 0 of group 0 must be token ids"),
    "ids that are no integers": (lambda: trees.pack([([1.5], [[2]])]), "the prompt of group 0 must be token ids"),
    "rows of ids": (lambda: trees.pack([([[1]], [[2]])]), "the prompt of group 0 must be token ids"),
    "too few lists of learned": (lambda: trees.pack([([1], [[2], [3]])], learned=[[True]]), "each of 2 completions"),
    "learned of another length": (lambda: trees.pack([([1], [[2]])], learned=[[True, True]]), r"learned\[0\]"),
    "weights of others": (lambda: trees.pack([([1], [[2]])], weights=[1, 2]), "weights must have one for each of 1"),
    "values of others": (lambda: trees.pack([([1], [[2]])], values={"old": [[1.0], [2.0]]}), "old must have a list"),
    "values of other tokens": (lambda: trees.pack([([1], [[2]])], values={"old": [[1, 2]]}), r"old\[0\] must have"),
    "rows of values": (lambda: trees.pack([([1], [[2]])], values={"old": [[[1.0]]]}), r"old\[0\] must be a list"),
    "an empty sequence": (lambda: trees.pack_sequences([[1], []]), r"empty \[1\]"),
    "a first token to be learned": (lambda: trees.pack_sequences([[1, 2]], learned=[[True, True]]), "first token of"),
    "a root to be learned": (lambda: trees.pack_segments([[1], [2]], [-1, 0], learned=[True, True]), "first token of"),
    "learned of other segments": (lambda: trees.pack_segments([[1]], [-1], learned=[]), "each of 1 segments"),
    "groups of others": (lambda: trees.pack_sequences([[1, 2]], group_ids=[0, 1]), "group_ids must have one for each"),
    "groups that are no integers": (lambda: trees.pack_sequences([[1, 2]], group_ids=[0.5]), "group_ids must be int"),
    "a plan of another length": (lambda: PACKED.shard(PLAN), "the tree has 4 tokens, the plan 9"),
    "logits of other tokens": (lambda: SHARD.log_probs(torch.zeros(3, 5)), "this rank's 16 tokens"),
    "rows of logits": (lambda: SHARD.log_probs(torch.zeros(2, 4, 5)), "this rank's 16 tokens"),
    "no temperature": (lambda: SHARD.log_probs(torch.zeros(16, 5), temperature=0.0), "temperature must be above 0"),
    "hidden states of others": (lambda: SHARD.log_probs_of(torch.zeros(3, 5), torch.nn.Identity()), "hidden must be"),
    "no rows at once": (lambda: SHARD.log_probs_of(P, torch.nn.Identity(), rows_at_once=0), "rows_at_once must be"),
    "terms of others": (lambda: PACKED.unpack(torch.zeros(2), SHARD, None), "this rank's 3 terms"),
    "a part of the terms": (lambda: PACKED.unpack(torch.zeros(len(HALF.term_idx)), HALF, None), "over 2 ranks"),
    "a tensor of other terms": (lambda: PACKED.split(torch.zeros(2)), "the 3 terms"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


# -- many trees to sequences


def random_trees(count: int, seed: int) -> list[trees.Tree]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        branches = int(random.integers(1, 9))
        found.append(trees.Tree([-1] + [0] * branches, random.integers(1, 60, branches + 1)))
    return found


@pytest.mark.parametrize("window", [None, 7])
def test_pairs_are_those_of_the_mask(window: int | None):
    for tree in random_trees(5, 0):
        mask = cpflex.tree(tree)
        mask = mask & cpflex.sliding_window(window, positions=tree.depths) if window else mask
        at, zero = torch.arange(tree.num_tokens), torch.tensor(0)
        assert trees.pairs_of(tree, window) == mask(zero, zero, at[:, None], at).sum()


@pytest.mark.parametrize("multiple_of", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_sequences_hold_every_tree_once_within_the_budget_and_are_equal_work(seed: int, multiple_of: int):
    given, budget = random_trees(60, seed), 1500
    parts = trees.deal_trees(given, budget, multiple_of=multiple_of)
    assert sorted(index for part in parts for index in part) == list(range(60))
    tokens = [sum(given[i].num_tokens for i in part) for part in parts]
    assert max(tokens) <= budget
    assert len(parts) % multiple_of == 0
    assert len(parts) <= -(-sum(tokens) // budget) + multiple_of, "hardly more than are needed"
    work = [sum(trees.pairs_of(given[i]) for i in part) for part in parts]
    assert max(work) <= 1.1 * sum(work) / len(work)


def test_work_is_dealt_and_not_tokens():
    """Tokens alone would put the long completion beside one tree and give both as many tokens."""
    long, short = trees.Tree([-1], [400]), trees.Tree([-1] + [0] * 8, [10] * 9)
    parts = trees.deal_trees([short, long, short, short, short], 800, multiple_of=2)
    assert parts == [[1], [0, 2, 3, 4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 20}, "tree 1 has"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"max_tokens": 900, "multiple_of": 4}, "at least multiple_of=4 trees; got 3"),
        ({"max_tokens": 900, "window": -1}, "window must be"),
    ],
)
def test_trees_that_fit_no_sequence_are_refused(options: dict[str, int], message: str):
    given = [trees.Tree([-1], [length]) for length in (10, 30, 20)]
    with pytest.raises(ValueError, match=message):
        trees.deal_trees(given, **options)

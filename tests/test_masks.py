"""Masks: each drawn as a matrix, their algebra, and their use in torch's own flex_attention."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

import cpflex
from cases import MASKS, Problem


def draw(mask, size: int = 8, b: int = 0, h: int = 0) -> str:
    seen = matrix(mask, size, b, h)
    return "\n".join("".join("1" if x else "." for x in row) for row in seen.tolist())


def matrix(mask, size: int = 8, b: int = 0, h: int = 0) -> Tensor:
    positions = torch.arange(size)
    return mask(torch.tensor(b), torch.tensor(h), positions[:, None], positions[None, :]).expand(size, size)


def diagram(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


DRAWN = {
    "causal": (
        lambda: cpflex.causal(),
        """1.......
           11......
           111.....
           1111....
           11111...
           111111..
           1111111.
           11111111""",
    ),
    "full": (lambda: cpflex.full(), "\n".join(["11111111"] * 8)),
    "one-sided window of 3": (
        lambda: cpflex.sliding_window(3),
        """11111111
           11111111
           11111111
           .1111111
           ..111111
           ...11111
           ....1111
           .....111""",
    ),
    "causal window of 3": (
        lambda: cpflex.causal() & cpflex.sliding_window(3),
        """1.......
           11......
           111.....
           .111....
           ..111...
           ...111..
           ....111.
           .....111""",
    ),
    "window of the token itself": (
        lambda: cpflex.causal() & cpflex.sliding_window(1),
        """1.......
           .1......
           ..1.....
           ...1....
           ....1...
           .....1..
           ......1.
           .......1""",
    ),
    "two-sided window": (
        lambda: cpflex.sliding_window(2, 1),
        """11......
           111.....
           1111....
           .1111...
           ..1111..
           ...1111.
           ....1111
           .....111""",
    ),
    "a window by positions": (
        lambda: cpflex.causal() & cpflex.sliding_window(2, positions=torch.tensor([0, 1, 2, 3, 2, 3, 4, 1])),
        """1.......
           11......
           .11.....
           ..11....
           .1111...
           ..1111..
           ...1.11.
           11111111""",
    ),
    "a two-sided window by positions": (
        lambda: cpflex.sliding_window(1, 2, positions=torch.tensor([0, 1, 2, 3, 4, 7, 8, 9], dtype=torch.int16)),
        """111.....
           1111....
           .1111...
           ..111...
           ...11...
           .....111
           .....111
           ......11""",
    ),
    "a prefix of each document": (
        lambda: (
            cpflex.document(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
            & cpflex.prefix_lm(2, positions=torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
        ),
        """11......
           11......
           111.....
           1111....
           ....11..
           ....11..
           ....111.
           ....1111""",
    ),
    "a tree": (
        lambda: cpflex.tree([-1, 0, 1, 0], [3, 2, 1, 2]),
        """1.......
           11......
           111.....
           1111....
           11111...
           111111..
           111...1.
           111...11""",
    ),
    "a forest, breadth first": (
        lambda: cpflex.tree(torch.tensor([-1, -1, 0, 1, 0]), torch.tensor([2, 1, 2, 1, 2])),
        """1.......
           11......
           ..1.....
           11.1....
           11.11...
           ..1..1..
           11....1.
           11....11""",
    ),
    "a tree of tokens": (
        lambda: cpflex.tree([-1, 0, 0, 1, 1, 2, 3, 3]),
        """1.......
           11......
           1.1.....
           11.1....
           11..1...
           1.1..1..
           11.1..1.
           11.1...1""",
    ),
    "documents by ids": (
        lambda: cpflex.document(torch.tensor([7, 7, 7, 2, 2, 2, 2, 9])),
        """111.....
           111.....
           111.....
           ...1111.
           ...1111.
           ...1111.
           ...1111.
           .......1""",
    ),
    "a document that comes back": (
        lambda: cpflex.document(torch.tensor([1, 1, 0, 0, 1, 1, 0, 0])),
        """11..11..
           11..11..
           ..11..11
           ..11..11
           11..11..
           11..11..
           ..11..11
           ..11..11""",
    ),
    "documents by cu_seqlens, one of them empty": (
        lambda: cpflex.document(cu_seqlens=[0, 3, 3, 8]),
        """111.....
           111.....
           111.....
           ...11111
           ...11111
           ...11111
           ...11111
           ...11111""",
    ),
    "causal documents": (
        lambda: cpflex.document(cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32)) & cpflex.causal(),
        """1.......
           11......
           111.....
           ...1....
           ...11...
           ...111..
           ...1111.
           ...11111""",
    ),
    "prefix LM": (
        lambda: cpflex.prefix_lm(3),
        """111.....
           111.....
           111.....
           1111....
           11111...
           111111..
           1111111.
           11111111""",
    ),
    "a prefix of nothing is causal": (lambda: cpflex.prefix_lm(0) & cpflex.full(), draw(cpflex.causal())),
    "complement of causal": (
        lambda: ~cpflex.causal(),
        """.1111111
           ..111111
           ...11111
           ....1111
           .....111
           ......11
           .......1
           ........""",
    ),
    "global token or window": (
        lambda: (cpflex.causal() & cpflex.sliding_window(2)) | (lambda b, h, q, k: k < 1),
        """1.......
           11......
           111.....
           1.11....
           1..11...
           1...11..
           1....11.
           1.....11""",
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_each_mask_looks_as_drawn(name: str):
    make, picture = DRAWN[name]
    assert draw(make()) == diagram(picture)


def test_documents_of_a_batch_are_those_of_its_rows():
    ids = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    mask = cpflex.document(ids)
    for b, row in enumerate(ids):
        torch.testing.assert_close(matrix(mask, 4, b=b), row[:, None] == row[None, :])


def test_positions_of_a_batch_are_those_of_its_rows():
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 1]])
    for mask, at in (
        (cpflex.sliding_window(2, positions=positions), lambda row: row[None, :] > row[:, None] - 2),
        (cpflex.prefix_lm(1, positions=positions), lambda row: (row[None, :] < 1) | matrix(cpflex.causal(), 4)),
    ):
        for b, row in enumerate(positions):
            torch.testing.assert_close(matrix(mask, 4, b=b), at(row).expand(4, 4))


@pytest.mark.parametrize("window", [1, 2, 4, 100])
def test_a_window_counts_the_token_itself_as_hugging_face_does(window: int):
    """`sliding_window_overlay` of transformers.masking_utils: ``kv_idx > q_idx - sliding_window``."""
    positions = torch.arange(8)
    hugging_face = (positions[None, :] > positions[:, None] - window) & (positions[None, :] <= positions[:, None])
    torch.testing.assert_close(matrix(cpflex.causal() & cpflex.sliding_window(window)), hugging_face)
    torch.testing.assert_close(matrix(cpflex.sliding_window(window - 1, 0)), hugging_face)


OPERANDS = {
    "causal": cpflex.causal(),
    "window": cpflex.sliding_window(3),
    "document": cpflex.document(torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])),
    "lambda": lambda b, h, q, k: (q + k) % 3 == 0,
}


@pytest.mark.parametrize(("left", "right"), [*itertools.permutations(OPERANDS, 2)], ids="-".join)
def test_the_algebra_of_masks_is_that_of_sets(left: str, right: str):
    a, b = OPERANDS[left], OPERANDS[right]
    x, y = matrix(a), matrix(b)
    torch.testing.assert_close(matrix(a & b), x & y)
    torch.testing.assert_close(matrix(a | b), x | y)
    both, either = a & b, a | b
    torch.testing.assert_close(matrix(~both), ~(x & y))
    torch.testing.assert_close(matrix(~either), ~x & ~y)
    torch.testing.assert_close(matrix(~~both), x & y)
    torch.testing.assert_close(matrix(both | ~cpflex.causal()), (x & y) | ~matrix(cpflex.causal()))
    torch.testing.assert_close(matrix(a & (b | cpflex.full())), x)


def test_combining_masks_with_python_words_is_refused():
    a, b = cpflex.causal(), cpflex.full()
    for misuse in (lambda: a and b, lambda: a or b, lambda: not a, lambda: bool(a), lambda: 1 if a else 2):
        with pytest.raises(TypeError, match="combine masks with `&`, `\\|` and `~`"):
            misuse()


@pytest.mark.parametrize("other", [3, None, torch.ones(2), "causal"], ids=["number", "none", "tensor", "text"])
def test_only_masks_combine_with_masks(other: object):
    if not isinstance(other, torch.Tensor):
        with pytest.raises(TypeError, match="not a mask_mod"):
            other & cpflex.causal()
    with pytest.raises(TypeError, match="not a mask_mod"):
        cpflex.causal() | other


def test_the_name_of_a_mask_says_what_it_is():
    mask = cpflex.causal() & ~cpflex.sliding_window(4) | cpflex.prefix_lm(2)
    assert repr(mask) == "((causal & ~sliding_window(4)) | prefix_lm(2))"


REFUSED = {
    "window of nothing": (lambda: cpflex.sliding_window(0), "window must be an integer of at least 1; got 0"),
    "negative window": (lambda: cpflex.sliding_window(-3), "window must be an integer of at least 1"),
    "window of a float": (lambda: cpflex.sliding_window(4.0), "window must be an integer"),
    "window of a bool": (lambda: cpflex.sliding_window(True), "window must be an integer"),
    "window of a negative left": (lambda: cpflex.sliding_window(-1, 2), "left must be an integer of at least 0"),
    "window of a negative right": (lambda: cpflex.sliding_window(2, -1), "right must be an integer of at least 0"),
    "negative prefix": (lambda: cpflex.prefix_lm(-1), "prefix_len must be an integer of at least 0"),
    "positions of floats": (
        lambda: cpflex.sliding_window(2, positions=torch.zeros(3)),
        r"positions must be a tensor of integers \[S\] or \[B, S\]; got torch.float32 \(3,\)",
    ),
    "positions of bools": (lambda: cpflex.prefix_lm(2, positions=torch.ones(3).bool()), "got torch.bool"),
    "positions that are no tensor": (lambda: cpflex.sliding_window(1, 1, positions=[0, 1]), "got list"),
    "no positions": (lambda: cpflex.sliding_window(1, positions=torch.zeros(0).long()), r"got torch.int64 \(0,\)"),
    "document of nothing": (lambda: cpflex.document(), "exactly one of doc_ids and cu_seqlens"),
    "document of both": (lambda: cpflex.document(torch.zeros(2).long(), cu_seqlens=[0, 2]), "exactly one of"),
    "float ids": (lambda: cpflex.document(torch.zeros(4)), "doc_ids must be integers"),
    "ids of three dims": (lambda: cpflex.document(torch.zeros(1, 2, 3).long()), r"\[S\] or \[B, S\]"),
    "no ids": (lambda: cpflex.document(torch.zeros(0).long()), "doc_ids must be integers"),
    "cu_seqlens that begin late": (lambda: cpflex.document(cu_seqlens=[1, 4]), "must start at 0 and never fall"),
    "cu_seqlens that fall": (lambda: cpflex.document(cu_seqlens=[0, 5, 4]), "must start at 0 and never fall"),
    "cu_seqlens of one number": (lambda: cpflex.document(cu_seqlens=[0]), "cu_seqlens must be integers"),
    "cu_seqlens of floats": (lambda: cpflex.document(cu_seqlens=[0.0, 2.0]), "cu_seqlens must be integers"),
    "cu_seqlens of two dims": (lambda: cpflex.document(cu_seqlens=torch.zeros(2, 2).long()), "cu_seqlens must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_make_no_mask_are_refused(name: str):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "mask",
    [
        cpflex.document(cu_seqlens=[0, 3, 8]),
        cpflex.causal() & cpflex.document(torch.zeros(1, 8).long()),
        cpflex.sliding_window(3, positions=torch.zeros(1, 8).long()),
        cpflex.prefix_lm(3, positions=torch.zeros(8).long()),
        cpflex.tree([-1, 0, 0], [5, 1, 2]),
        cpflex.tree([-1, -1, 0], [5, 1, 2]),
    ],
    ids=["cu_seqlens", "ids", "window", "prefix", "tree", "forest"],
)
def test_tables_of_another_length_than_the_sequence_are_refused(mask):
    with pytest.raises(ValueError, match=r"made for \[8\] tokens; seq_len=9"):
        cpflex.make_plan(mask, 9, batch_size=1)


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_of_the_zoo_means_the_same_to_torch(name: str):
    """torch calls a mask_mod under vmap, on one position at a time."""
    problem = Problem(mask=name, seq_len=70, heads="gqa")
    torchs = create_mask(problem.mask_mod, problem.batch_size, problem.num_heads, 70, 70, device="cpu")
    for b in range(problem.batch_size):
        for h in range(problem.num_heads):
            torch.testing.assert_close(torchs[b, h], matrix(problem.mask_mod, 70, b, h))


@pytest.mark.parametrize("name", ["causal", "doc_sliding_causal", "prefix_lm", "two_sided", "doc_per_batch"])
def test_masks_work_in_torchs_own_flex_attention(name: str):
    problem = Problem(mask=name, seq_len=130)
    q, k, v = (problem.tensors[x] for x in "qkv")
    block_mask = create_block_mask(problem.mask_mod, 2, 2, 130, 130, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wants to be compiled
        torchs = flex_attention(q, k, v, block_mask=block_mask)
    plan = problem.plan(None)
    ours = cpflex.flex_attention(*(plan.shard(x, dim=2, pad_value=0.0) for x in (q, k, v)), block_mask=plan)
    torch.testing.assert_close(plan.unshard(ours, dim=2), torchs)


def test_a_new_window_is_new_data_and_not_a_new_program():
    from cpflex.mods.trace import trace_mask_mod

    keys = {trace_mask_mod(cpflex.sliding_window(w) & cpflex.prefix_lm(w)).key for w in (1, 7, 4096)}
    assert len(keys) == 1

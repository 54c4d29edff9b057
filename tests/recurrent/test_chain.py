"""Where a recurrence starts anew, and what is refused before anything is exchanged."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from problems import LAYOUTS
from torch import Tensor

import cpflex
from cpflex import recurrent
from cpflex.testing import run_ranks

CPU = torch.device("cpu")


def plan_of(seq_len: int, **options: Any) -> cpflex.Plan:
    return cpflex.make_plan(cpflex.causal(), seq_len, **options)


def age_of(**documents: Any) -> list[list[int]]:
    given = {name: torch.tensor(rows) for name, rows in documents.items()}
    seq_len = next(iter(given.values())).shape[-1]
    return recurrent.make_chain(plan_of(seq_len), **given).age[:, :seq_len].tolist()


AGES = {
    "nothing said: one document": ({"padding_mask": [[1, 1, 1, 1]]}, [[0, 1, 2, 3]]),
    "doc_ids of all rows": ({"doc_ids": [7, 7, 3, 3, 3]}, [[0, 1, 0, 1, 2]]),
    "doc_ids of each row": ({"doc_ids": [[0, 0, 1], [0, 1, 1]]}, [[0, 1, 0], [0, 0, 1]]),
    "positions that begin anew": ({"position_ids": [[0, 1, 2, 0, 1, 0]]}, [[0, 1, 2, 0, 1, 0]]),
    "positions that begin later": ({"position_ids": [5, 6, 9, 10]}, [[0, 1, 0, 1]]),
    "padding on the left": ({"padding_mask": [[0, 0, 1, 1]]}, [[-1, -1, 0, 1]]),
    "padding on the left, with positions": (
        {"position_ids": [0, 1, 2, 3], "padding_mask": [[False, True, True, True], [True] * 4]},
        [[-1, 0, 1, 2], [0, 1, 2, 3]],
    ),
    "padding on the right": ({"padding_mask": [[1, 1, 0, 0], [1, 1, 1, 1]]}, [[0, 1, -1, -1], [0, 1, 2, 3]]),
    "padding between documents": (
        {"doc_ids": [1, 1, 0, 0, 2], "padding_mask": [[1, 1, 0, 0, 1]]},
        [[0, 1, -1, -1, 0]],
    ),
    "nothing but padding": ({"padding_mask": [[0, 0]]}, [[-1, -1]]),
}


@pytest.mark.parametrize("name", AGES)
def test_each_token_knows_its_place_in_its_document(name: str):
    documents, expected = AGES[name]
    assert age_of(**documents) == expected


REFUSED = {
    "both": ({"doc_ids": [0, 0], "position_ids": [0, 1]}, "doc_ids or position_ids, not both"),
    "another length": ({"doc_ids": [0, 0, 0], "padding_mask": [[1, 1]]}, r"integers \[S\] or \[B, S\] of seq_len=3"),
    "three dims": ({"position_ids": [[[0, 1]]]}, r"position_ids must be integers \[S\] or \[B, S\]"),
    "floats": ({"padding_mask": [[1.0, 1.0]]}, "padding_mask must be integers"),
    "a document in pieces": ({"doc_ids": [0, 1, 0]}, "row 0 of doc_ids has one in pieces"),
    "padding in the middle": ({"padding_mask": [[1, 0, 1]]}, "row 0 has padding inside of one, before token 2"),
    "padding in the middle, with positions": (
        {"padding_mask": [[1, 0, 1, 1]], "position_ids": [0, 1, 2, 3]},
        "row 0 has padding inside of one, before token 2",
    ),
    "other rows": (
        {"padding_mask": [[1, 1], [1, 1]], "doc_ids": [[0, 0]] * 3},
        "doc_ids has 3 rows and padding_mask 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_documents_that_a_recurrence_cannot_have_are_refused(name: str):
    documents, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        age_of(**documents)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_made_for_a_rank_needs_no_group(layout: str):
    """As a plan: any rank of any job, anywhere."""
    for rank in range(5):
        chain = recurrent.make_chain(plan_of(97, rank=rank, world_size=5, layout=LAYOUTS[layout]))
        assert chain.blocks(CPU).real.sum() == sum(stop - start for start, stop in chain.plan.fragments[rank])


def test_a_chain_that_was_made_elsewhere_is_bound_to_a_group():
    """In a worker that loads data, for instance, and pickled."""
    ids = torch.arange(64).unsqueeze(0) // 40
    elsewhere = [
        pickle.dumps(recurrent.make_chain(plan_of(64, rank=rank, world_size=2), doc_ids=ids)) for rank in range(2)
    ]

    def outputs(group: Any, made: Callable[[Any], recurrent.Chain]) -> Tensor:
        return recurrent.gated_delta_rule(**inputs(made(group)))

    bound = run_ranks(partial(outputs, made=lambda group: pickle.loads(elsewhere[group.rank]).bind(group)), 2)
    here = run_ranks(partial(outputs, made=lambda group: chain_of(group, ids)), 2)
    assert all(torch.equal(one, other) for one, other in zip(bound, here, strict=True))


# -- refused on every rank


def inputs(chain: recurrent.Chain, /, **changed: Any) -> dict[str, Any]:
    """Of `gated_delta_rule`."""
    tokens = 2, chain.plan.local_len, 2
    made: dict[str, Any] = {name: torch.ones(*tokens, 4) for name in "qkv"}
    made |= {"g": -torch.ones(tokens), "beta": torch.ones(tokens), "chain": chain}
    return made | {name: value(made[name]) for name, value in changed.items()}


WRONG: dict[str, tuple[dict[str, Callable[[Any], Any]], type[Exception], str]] = {
    "heads": ({"v": lambda v: v[:, :, :1]}, ValueError, "H a multiple of Hk"),
    "length": ({name: lambda x: x[:, 1:] for name in ("q", "k", "v", "g", "beta")}, ValueError, "local tokens"),
    "rows": ({name: lambda x: x[:1] for name in ("q", "k", "v", "g", "beta")}, ValueError, "in 2 rows; got"),
    "decay": ({"g": lambda g: g[..., None]}, ValueError, "beta must be"),
    "integers": ({"k": Tensor.long}, TypeError, "k must be floating"),
    "no tensor": ({"beta": lambda beta: 0.5}, TypeError, "beta must be a local Tensor; got float"),
    "no chain": ({"chain": lambda chain: chain.plan}, TypeError, "made by cpflex.recurrent.make_chain; got Plan"),
}


def chain_of(group: Any, doc_ids: Tensor | None = None) -> recurrent.Chain:
    return recurrent.make_chain(
        plan_of(64, group=group), doc_ids=torch.zeros(2, 64).long() if doc_ids is None else doc_ids
    )


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_by_name(name: str):
    changed, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        recurrent.gated_delta_rule(**inputs(chain_of(None), **changed))


def messages(call: Callable[[Any], Any], world_size: int = 2) -> list[str]:
    """What each rank raises."""

    def caught(group: Any) -> str:
        with pytest.raises((ValueError, cpflex.RankMismatch)) as raised:
            call(group)
        return f"{type(raised.value).__name__}: {raised.value}"

    return run_ranks(caught, world_size, timeout=30)


def test_what_one_rank_refuses_all_ranks_refuse():
    changed = WRONG["decay"][0]
    own, other = messages(
        lambda group: recurrent.gated_delta_rule(**inputs(chain_of(group), **({} if group.rank else changed)))
    )
    assert own.startswith("ValueError: beta must be")
    assert other.startswith("RankMismatch: nothing was exchanged: group rank 0 raised ValueError: beta must be")


def test_ranks_that_were_given_other_documents_are_told():
    ids = torch.arange(64) // 32
    said = messages(lambda group: recurrent.gated_delta_rule(**inputs(chain_of(group, ids if group.rank else None))))
    assert all("the ranks disagree about documents of the recurrence" in text for text in said)


def test_ranks_that_call_other_layers_are_told():
    def call(group: Any) -> None:
        chain = chain_of(group)
        if group.rank:
            recurrent.gated_delta_rule(**inputs(chain))
        recurrent.causal_conv1d(torch.ones(2, 3, chain.plan.local_len), torch.ones(3, 4), None, chain)

    assert all("disagree about layer" in text for text in messages(call))


def test_a_plan_without_a_group_is_refused():
    chain = recurrent.make_chain(plan_of(64, rank=1, world_size=2))
    with pytest.raises(RuntimeError, match=r"no group; call chain = chain.bind\(group\) first"):
        recurrent.gated_delta_rule(**inputs(chain))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"A": torch.ones(3)}, "A \\[H\\]"),
        ({"B": torch.ones(2, 64, 1, 3)}, "B and C must be"),
        ({"D": torch.ones(1)}, "D must be"),
        ({"C": torch.ones(2, 64, 3, 3), "B": torch.ones(2, 64, 3, 3)}, "a multiple of G"),
    ],
)
def test_shapes_of_a_state_space_are_refused(changed: dict[str, Tensor], message: str):
    made = {"x": torch.ones(2, 64, 2, 4), "dt": torch.ones(2, 64, 2), "A": -torch.ones(2), "D": torch.ones(2)}
    made |= {"B": torch.ones(2, 64, 2, 3), "C": torch.ones(2, 64, 2, 3)}
    with pytest.raises(ValueError, match=message):
        recurrent.ssd(**(made | changed), chain=recurrent.make_chain(plan_of(64)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.ones(3, 1, 4)}, "weight \\[C, K\\]"),
        ({"bias": torch.ones(4)}, "bias must be \\[C\\], C=3"),
        ({"activation": "gelu"}, "apply it to the result"),
    ],
)
def test_shapes_of_a_convolution_are_refused(changed: dict[str, Any], message: str):
    made = {"x": torch.ones(2, 3, 64), "weight": torch.ones(3, 4), "bias": None} | changed
    with pytest.raises(ValueError, match=message):
        recurrent.causal_conv1d(**made, chain=recurrent.make_chain(plan_of(64)))

"""Agreement: before the first exchange on a plan, all ranks compare what they are about to do.

A rank that finds a mistake in its own arguments says so here, and all ranks raise together: one that raised alone would
leave the others waiting. The comparison also warms up the communicator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cpflex.links import Links


class RankMismatch(RuntimeError):
    """The ranks of a group are about to compute different things."""


def agree(links: Links, facts: Mapping[str, Any]) -> None:
    """Compare ``facts`` with every rank's.

    Raises:
        RankMismatch: on every rank, naming the ranks and what differs, or the error that one of them found.
    """
    answers = links.all_gather_object({"facts": dict(facts)})
    _raise_refusals(answers)
    reference = answers[0]["facts"]
    for name in reference:
        values = [answer["facts"].get(name) for answer in answers]
        if any(value != values[0] for value in values):
            said = "; ".join(f"{_ranks(values, value)}: {value}" for value in _distinct(values))
            raise RankMismatch(f"the ranks disagree about {name}: {said}")


def refuse(links: Links, error: Exception) -> None:
    """Tell the other ranks, waiting in `agree`, that this one is about to raise ``error``."""
    links.all_gather_object({"refusal": f"{type(error).__name__}: {error}"})


def _raise_refusals(answers: list[dict[str, Any]]) -> None:
    refusals = {rank: answer["refusal"] for rank, answer in enumerate(answers) if "refusal" in answer}
    if refusals:
        said = "; ".join(f"group rank {rank} raised {text}" for rank, text in refusals.items())
        raise RankMismatch(f"nothing was exchanged: {said}")


def _distinct(values: list[Any]) -> list[Any]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _ranks(values: list[Any], value: Any) -> str:
    ranks = [str(rank) for rank, other in enumerate(values) if other == value]
    return f"group rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"

"""Agreement: before each attention call, forward and backward, all ranks compare what they are about to do.

The first call of a kind is compared in words, every later one by a number: ranks that call their layers in another
order are told so, instead of attending to another layer's keys. A rank that finds a mistake in its own arguments says
so here, and all ranks raise together: one that raised alone would leave the others waiting. The comparison also warms
up the communicator.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch

from cpflex.links.protocol import Links
from cpflex.links.whereabouts import Astray

IN_WORDS, REFUSED = 0, -1
"""Instead of a call's number: it was never compared; it will not be made."""


log = logging.getLogger(__name__)


class RankMismatch(RuntimeError):
    """The ranks of a group are about to compute different things."""


def number_of(facts: Mapping[str, Any]) -> int:
    """A positive number that two calls have in common only if all facts about them are equal."""
    digest = hashlib.blake2b(repr(sorted((name, repr(value)) for name, value in facts.items())).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1 | 1


def agree(links: Links, plan: str, facts: Mapping[str, Any], number: int, known: bool) -> None:
    """Compare ``facts`` with every rank's: by their number if they are ``known`` from an earlier call, else in words.

    In a group of NCCL alone a number that differs stops the device, on all ranks, as the host does not wait for it.

    Args:
        plan: fingerprint, by which ranks that wait for one another in different groups are found.

    Raises:
        RankMismatch: on every rank, naming the ranks and what differs, or the error that one of them found.
        ConnectionError: a rank did not come, or is gone.
    """
    numbers = _gathered(links, number if known else IN_WORDS, plan)
    if known and numbers.is_cuda:
        torch.ops.aten._assert_async.msg((numbers == number).all(), "the ranks disagree about this attention call")
    elif not known or (numbers != number).any():
        _compare(links, facts)


def refuse(links: Links, plan: str, error: Exception) -> None:
    """Tell the other ranks, which are in `agree` or on their way to it, that this one is about to raise ``error``."""
    # now, as the others may be long in coming
    log.error("group rank %d refuses a call: %s: %s", links.rank, type(error).__name__, error)
    _gathered(links, REFUSED, plan)
    links.all_gather_object({"refusal": f"{type(error).__name__}: {error}"})


def _gathered(links: Links, number: int, plan: str) -> torch.Tensor:
    try:
        return links.all_gather_number(number, plan)
    except Astray as error:
        raise RankMismatch(str(error)) from None


def _compare(links: Links, facts: Mapping[str, Any]) -> None:
    log.debug("group rank %d: a new kind of call: %s", links.rank, facts)
    answers = links.all_gather_object({"facts": dict(facts)})
    _raise_refusals(answers)
    for name in dict.fromkeys(name for answer in answers for name in answer["facts"]):
        values = [answer["facts"].get(name) for answer in answers]
        if any(value != values[0] for value in values):
            said = "; ".join(f"{_ranks(values, value)}: {value}" for value in _distinct(values))
            raise RankMismatch(f"the ranks disagree about {name}: {said}")


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

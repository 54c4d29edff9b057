"""Agreement: before each attention call, forward and backward, all ranks compare what they are about to do.

They compare a number, a hash of it in words: ranks that call their layers in another order are told so, instead of
attending to another layer's keys. A rank that finds a mistake in its own arguments has a number of its own, and all
ranks raise together: one that raised alone would leave the others waiting. Words travel only when numbers differ, by a
way that every group has and on which nobody waits for a rank that is elsewhere (`links/words.py`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cpflex.links.protocol import Apart, Links, Words
from cpflex.links.whereabouts import Astray

REFUSAL = "refusal"
"""The one word of a call that will not be made."""

NUM_REMEMBERED = 256
"""Kinds of calls of a group, those of a few batches."""

log = logging.getLogger(__name__)


class RankMismatch(RuntimeError):
    """The ranks of a group are about to compute different things."""


def words_of(facts: Mapping[str, Any]) -> Words:
    return {name: str(value) for name, value in facts.items()}


def number_of(words: Words) -> int:
    """A positive number that two calls have in common only if all their words are equal."""
    digest = hashlib.blake2b(repr(sorted(words.items())).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1 | 1


def checksum(x: Tensor) -> str:
    """A tensor in a word: shape, dtype, and the sum of its elements, each times an odd number of its place, in 64 bits.
    Computed where it lies; the host waits for the sum.
    """
    numbers = x.detach().reshape(-1)
    if numbers.is_floating_point():
        numbers = numbers.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()])
    places = torch.arange(1, len(numbers) + 1, device=x.device) * -7046029254386353131  # 2**64 / golden ratio, odd
    total = (numbers.long() * (places ^ places >> 31 | 1)).sum().item()
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} {int(total) % 2**64:016x}"


def agree(links: Links, plan: str, words: Words, number: int, device: torch.device | None) -> None:
    """Compare ``words`` with every rank's, by their number.

    The host waits for a number that is new in the group. For one that all ranks had before it goes on: devices stop on
    all ranks if they differ then; hosts that compare among themselves read no message before `settle`.

    Args:
        plan: fingerprint, by which ranks that wait for one another in different groups are found.
        device: of the tensors that will be exchanged.

    Raises:
        RankMismatch: on every rank, naming the ranks and what differs, or the error that one of them found.
        ConnectionError: a rank did not come, or is gone.
    """
    new = number not in links.agreed
    if new:
        log.debug("group rank %d: a new kind of call: %s", links.rank, words)
    with in_words(links):
        try:
            links.compare(number, plan, device, None if new else partial(_log_difference, links))
        except Apart:
            links.say(number, words)
            raise
    if new:
        links.agreed[number] = words
    if len(links.agreed) > NUM_REMEMBERED:
        links.agreed.pop(next(iter(links.agreed)))


def settle(links: Links) -> None:
    """Return when all ranks are known to make the call that was agreed on, as far as a host can know it without waiting
    for its device. Raises as `agree` does.
    """
    with in_words(links):
        links.settle()


def refuse(links: Links, plan: str, error: Exception) -> None:
    """Tell the other ranks, which are in `agree` or on their way to it, that this one is about to raise ``error``."""
    # now, as the others may be long in coming
    log.error("group rank %d refuses a call: %s: %s", links.rank, type(error).__name__, error)
    words = {REFUSAL: f"{type(error).__name__}: {error}"}
    number = -number_of(words)
    links.say(number, words)  # first: whoever sees the number finds it
    try:
        links.compare(number, plan)
    except Apart:
        return
    except Astray as astray:
        raise RankMismatch(str(astray)) from None


@contextmanager
def in_words(links: Links) -> Iterator[None]:
    """What fails inside because ranks differ, or because the device was stopped, now or before, is raised as what the
    ranks disagree about.
    """
    try:
        if numbers := links.apart():
            raise Apart(numbers)
        yield
    except Apart as found:
        raise RankMismatch(difference(links, found.numbers)) from None
    except Astray as error:
        raise RankMismatch(str(error)) from None
    except (RuntimeError, ConnectionError) as error:
        if isinstance(error, RankMismatch) or not (numbers := links.apart()):
            raise
        raise RankMismatch(difference(links, numbers)) from error


def _log_difference(links: Links, numbers: list[int]) -> None:
    log.error("group rank %d: the device was stopped: %s", links.rank, difference(links, numbers))


def difference(links: Links, numbers: list[int]) -> str:
    """What ranks with these numbers disagree about."""
    known = {number: links.agreed[number] for number in numbers if number in links.agreed}
    for number, words in known.items():
        links.say(number, words)  # for ranks whose first call of a kind meets another's later one
    known |= links.find(set(numbers) - known.keys() - {0})
    calls = [known.get(number) for number in numbers]
    refusals = {
        rank: "an error that it did not tell" if words is None else words[REFUSAL]
        for rank, (number, words) in enumerate(zip(numbers, calls, strict=True))
        if number < 0
    }
    if refusals:
        said = "; ".join(f"group rank {rank} raised {text}" for rank, text in refusals.items())
        return f"nothing was exchanged: {said}"
    told = [words or {} for words in calls]
    for name in dict.fromkeys(name for words in told for name in words):
        values = [words.get(name, "(it did not tell)") for words in told]
        if any(value != values[0] for value in values):
            said = "; ".join(f"{_ranks(values, value)}: {value}" for value in dict.fromkeys(values))
            return f"the ranks disagree about {name}: {said}"
    raise AssertionError(f"different numbers stand for the same words: {numbers}, {told}")


def _ranks(values: list[str], value: str) -> str:
    ranks = [str(rank) for rank, other in enumerate(values) if other == value]
    return f"group rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"

"""Together: the ranks of a step compare what they are about to do, in or just ahead of the messages that they exchange.

A header says, by numbers, which attention this is: the plan and the kind of call, how many attentions and steps came
before, and the new tokens. On hosts it travels while the rank computes, and no other message is sent before all headers
are known to be equal: none of another size can arrive. On a device it is part of the first message, and the device
stops if one differs; there, ranks meet before the first call of a kind (`ring/agreement.py`).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from cpflex.links.protocol import Links, Words, Work, swap
from cpflex.paging.steps import Steps
from cpflex.ring import agreement
from cpflex.ring.agreement import REFUSAL, RankMismatch, difference, number_of, words_of

HEADER = 4
"""Numbers, int64: of the kind of call, or of a refusal, below 0; attentions and steps before it; of its tokens."""

log = logging.getLogger(__name__)


class Meeting:
    """The ranks' headers of one attention, under way."""

    def __init__(self, steps: Steps, facts: dict[str, Any], device: torch.device) -> None:
        links = steps.pages.links
        assert links is not None, "one rank meets nobody"
        kind = tuple(facts.items())
        is_new = kind not in steps.kinds_of_calls
        if is_new:
            words = words_of({**steps.facts, **facts})
            steps.kinds_of_calls[kind] = words, number_of(words)
        self.links, self.steps, self.rides = links, steps, rides(device)
        self.words, number = steps.kinds_of_calls[kind]
        if self.rides and is_new:
            agreement.agree(links, steps.fingerprint, self.words, number, device)
        self.header = _header(steps, number)
        self._headers = torch.zeros(links.world_size, HEADER, dtype=torch.int64)
        self._work = None if self.rides else _begun(self.header, self._headers, links)
        steps.num_calls += 1

    def settle(self) -> None:
        """Return when hosts know that all headers are equal.

        Raises:
            RankMismatch: they differ; on every rank, naming what and who.
            ConnectionError: a rank is gone, or elsewhere; naming it.
        """
        if self._work is not None:
            try:
                self._work.wait()
            except (ConnectionError, TimeoutError) as error:
                raise self._placed(error) from error
            self._work = None
            if not (self._headers == self.header).all():
                raise RankMismatch(_difference(self.links, self.steps, self._headers, self.words))

    def _placed(self, error: Exception) -> Exception:
        """With where it happened."""
        return type(error)(
            f"group rank {self.links.rank}, attention {self.steps.num_calls} of a decode plan, in its step "
            f"{self.steps.num_done}: {error}"
        )

    def exchange(self, sent: list[Tensor], received: list[Tensor], *, is_first: bool) -> None:
        """`swap`, after the headers are settled; on a device each first message begins with the header.

        Args:
            sent, received: contiguous, by rank; with ``is_first`` the first bytes, `room` of them, are the header's.
        """
        self.settle()
        carries = is_first and self.rides
        header = self.header.view(torch.uint8)
        if carries:
            header = header.to(sent[0].device)
            sent, received = ([x.view(-1).view(torch.uint8) for x in each] for each in (sent, received))
            for message in {x.data_ptr(): x for x in sent}.values():
                message[: len(header)] = header
            self.steps.first_messages = [x.numel() for x in sent], [x.numel() for x in received]
        try:
            swap(sent, received, self.links)
        except (ConnectionError, TimeoutError) as error:
            raise self._placed(error) from error
        if carries:
            same = [(x[: len(header)] == header).all() for x in received]
            torch._assert_async(  # type: ignore[attr-defined]
                torch.stack(same).all(), "the ranks of a decode step do different things"
            )

    def room(self, row_bytes: int) -> int:
        """Rows of so many bytes that a first message begins with."""
        return -(-HEADER * 8 // row_bytes) if self.rides else 0


def rides(device: torch.device) -> bool:
    """Whether headers are part of messages."""
    return device.type == "cuda"


def refuse(steps: Steps, error: Exception) -> None:
    """Make the other ranks' next attention on the plan raise too, before this one raises ``error``."""
    links = steps.pages.links
    if links is None or links.world_size == 1:
        return
    log.error("group rank %d refuses an attention: %s: %s", links.rank, type(error).__name__, error)
    words = {REFUSAL: f"{type(error).__name__}: {error}"}
    header = _header(steps, -number_of(words))
    steps.num_calls += 1
    devices = [pool.k.device for pool in steps.pages.pools.values() if rides(pool.k.device)]
    if devices and steps.first_messages is None:  # the others are about to meet
        agreement.refuse(links, steps.fingerprint, error)
        return
    if devices:
        sent, received = (
            [torch.zeros(size, dtype=torch.uint8, device=devices[0]) for size in sizes]
            for sizes in steps.first_messages
        )
        for message in sent:
            message[: HEADER * 8] = header.to(devices[0]).view(torch.uint8)
        swap(sent, received, links)
        return
    headers = torch.zeros(links.world_size, HEADER, dtype=torch.int64)
    links.say(_number(header.tolist()), words)  # first: whoever sees the number finds it
    _begun(header, headers, links).wait()


def _header(steps: Steps, number: int) -> Tensor:
    return torch.tensor([number, steps.num_calls, steps.num_done, steps.tokens_hash])


def _begun(header: Tensor, headers: Tensor, links: Links) -> Work:
    headers[links.rank] = header
    peers = [peer for peer in range(links.world_size) if peer != links.rank]
    return links.exchange([(peer, header) for peer in peers], [(peer, headers[peer]) for peer in peers])


def _number(header: list[int]) -> int:
    """Of a header: by it ranks find what it stands for. Below 0 of a refusal."""
    return number_of({"header": str(header)}) * (-1 if header[0] < 0 else 1)


def _difference(links: Links, steps: Steps, headers: Tensor, words: Words) -> str:
    """What ranks with these headers disagree about."""
    _, calls, done, tokens = headers[links.rank].tolist()
    told = {**words, "steps before this one": str(done), "attentions before this one": str(calls)}
    told["new tokens of this step"] = f"{tokens:x}"
    numbers = [_number(header) for header in headers.tolist()]
    links.say(numbers[links.rank], told)
    return difference(links, numbers)

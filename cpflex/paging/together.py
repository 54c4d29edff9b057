"""Together: the ranks of a step compare what they are about to do, in the messages that they exchange.

A header says, by numbers, which attention this is: the plan and the kind of call, how many attentions and steps came
before, and the new tokens. It begins the first message of an attention.

A message between hosts must be as long as its receiver expects. So among hosts the first one, an opening, is as long as
all ranks agreed on in the attention before, whatever this one is about: what a step sends has room in it if it is like
the step before, as tokens are that follow one another. Else the opening has the header alone, and travels while the
rank computes; what is left to say is sent when all headers are known to be equal. On a device the header begins the
message itself, and the device stops if one differs; there, ranks meet before the first call of a kind
(`ring/agreement.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpflex.links.protocol import Links, Words, Work, swap
from cpflex.paging.steps import Steps
from cpflex.ring import agreement
from cpflex.ring.agreement import REFUSAL, RankMismatch, difference, number_of, words_of

HEADER = 4
"""Numbers, int64: of the kind of call, or of a refusal, below 0; attentions and steps before it; of its tokens."""

HEADER_BYTES = 8 * HEADER

SizesFn = Callable[[], tuple[list[int], list[int]]]
"""Bytes of what a rank sends and receives, by rank."""

LONGEST_OPENING = 1 << 16
"""Bytes: what is longer travels on its own."""

log = logging.getLogger(__name__)


class Meeting:
    """The ranks' headers of one attention, under way."""

    def __init__(self, steps: Steps, facts: dict[str, Any], device: torch.device, num_bytes: int) -> None:
        """
        Args:
            num_bytes: of the longest first message of a rank, its header included.
        """
        links = steps.pages.links
        assert links is not None, "one rank meets nobody"
        kind = tuple(facts.items())
        is_new = kind not in steps.kinds_of_calls
        if is_new:
            words = words_of({**steps.facts, **facts})
            steps.kinds_of_calls[kind] = words, number_of(words)
        self.links, self.steps, self.num_bytes = links, steps, num_bytes
        self.on_device = compares_on(device)
        self.words, number = steps.kinds_of_calls[kind]
        if self.on_device and is_new:
            agreement.agree(links, steps.fingerprint, self.words, number, device)
        self.header = _header(steps, number)
        self.has_room = num_bytes <= opening_bytes(links)
        self._begun = None if self.on_device or self.has_room else _begun(self.header, links)
        steps.num_calls += 1

    def exchange_first(self, sent: list[Tensor], received: list[Tensor], sizes: SizesFn | None = None) -> None:
        """`swap`, of messages that begin with a header. All headers are equal when it returns; a device stops where one
        is not.

        Args:
            sent, received: contiguous, by rank; the first `HEADER_BYTES` bytes of each are the header's. Those of this
                rank are the same, or have the same bytes.
            sizes: of them in a step, if they change from step to step.

        Raises:
            RankMismatch: headers differ; on every rank, naming what and who.
            ConnectionError: a rank is gone, or elsewhere; naming it.
        """
        once = {id(x): x.view(-1).view(torch.uint8) for x in sent}
        for message in once.values():
            message[:HEADER_BYTES] = self.header.view(torch.uint8).to(message.device)
        sent, received = [once[id(x)] for x in sent], [x.view(-1).view(torch.uint8) for x in received]
        if self.on_device:
            lengths = list(map(len, sent)), list(map(len, received))
            self.steps.first_messages = sizes or (lambda: lengths)
            self._exchange_on_device(sent, received)
        elif self.has_room:
            self._exchange_openings(sent, received)
        else:
            self._settle()
            self.exchange(*([x[HEADER_BYTES:] for x in each] for each in (sent, received)))

    def exchange(self, sent: list[Tensor], received: list[Tensor]) -> None:
        """`swap`, of what comes later."""
        try:
            swap(sent, received, self.links)
        except (ConnectionError, TimeoutError) as error:
            raise self._placed(error) from error

    def _exchange_on_device(self, sent: list[Tensor], received: list[Tensor]) -> None:
        self.exchange(sent, received)
        mine = sent[self.links.rank][:HEADER_BYTES]
        same = [(x[:HEADER_BYTES] == mine).all() for i, x in enumerate(received) if i != self.links.rank]
        torch._assert_async(  # type: ignore[attr-defined]
            torch.stack(same).all(), "the ranks of a decode step do different things"
        )

    def _exchange_openings(self, sent: list[Tensor], received: list[Tensor]) -> None:
        length = opening_bytes(self.links)
        whole = [x if len(x) == length else x.new_zeros(length) for x in received]
        self.exchange([_padded(x, length) for x in sent], whole)
        whole[self.links.rank] = sent[self.links.rank]
        self._compare(torch.stack([x[:HEADER_BYTES] for x in whole]))
        for x, opening in zip(received, whole, strict=True):
            if x is not opening:
                x.copy_(opening[: len(x)])

    def _settle(self) -> None:
        """Return when all headers that travel alone are known to be equal."""
        assert self._begun is not None
        work, openings = self._begun
        try:
            work.wait()
        except (ConnectionError, TimeoutError) as error:
            raise self._placed(error) from error
        self._compare(openings[:, :HEADER_BYTES].contiguous())

    def _compare(self, headers: Tensor) -> None:
        """And agree on how long the next openings are, by what all ranks know alike."""
        numbers = headers.view(torch.int64)
        if not (numbers == self.header).all():
            self.links.opening_bytes = 0
            raise RankMismatch(_difference(self.links, self.steps, numbers, self.words))
        if self.num_bytes > LONGEST_OPENING:
            self.links.opening_bytes = 0
        elif not self.num_bytes <= opening_bytes(self.links) <= 4 * self.num_bytes:  # layers take turns
            self.links.opening_bytes = self.num_bytes

    def _placed(self, error: Exception) -> Exception:
        """With where it happened."""
        return type(error)(
            f"group rank {self.links.rank}, attention {self.steps.num_calls} of a decode plan, in its step "
            f"{self.steps.num_done}: {error}"
        )


def _padded(message: Tensor, length: int) -> Tensor:
    return message if len(message) == length else torch.cat([message, message.new_zeros(length - len(message))])


def compares_on(device: torch.device) -> bool:
    """Whether the device compares headers, rather than hosts."""
    return device.type == "cuda"


def opening_bytes(links: Links) -> int:
    """The length of the next opening, on all ranks."""
    return max(HEADER_BYTES, links.opening_bytes)


def refuse(steps: Steps, error: Exception) -> None:
    """Make the other ranks' next attention on the plan raise too, before this one raises ``error``."""
    links = steps.pages.links
    if links is None or links.world_size == 1:
        return
    log.error("group rank %d refuses an attention: %s: %s", links.rank, type(error).__name__, error)
    words = {REFUSAL: f"{type(error).__name__}: {error}"}
    header = _header(steps, -number_of(words))
    steps.num_calls += 1
    devices = [pool.k.device for pool in steps.pages.pools.values() if compares_on(pool.k.device)]
    if devices and steps.first_messages is None:  # the others are about to meet
        agreement.refuse(links, steps.fingerprint, error)
        return
    if devices:
        sent, received = (
            [torch.zeros(size, dtype=torch.uint8, device=devices[0]) for size in sizes]
            for sizes in steps.first_messages()
        )
        for message in sent:
            message[:HEADER_BYTES] = header.view(torch.uint8).to(devices[0])
        swap(sent, received, links)
        return
    links.say(_number(header.tolist()), words)  # first: whoever sees the number finds it
    _begun(header, links)[0].wait()
    links.opening_bytes = 0


def _header(steps: Steps, number: int) -> Tensor:
    return torch.tensor([number, steps.num_calls, steps.num_done, steps.tokens_hash])


def _begun(header: Tensor, links: Links) -> tuple[Work, Tensor]:
    """Openings of headers alone, under way, uint8 [ranks, bytes]."""
    openings = torch.zeros(links.world_size, opening_bytes(links), dtype=torch.uint8)
    openings[links.rank, :HEADER_BYTES] = header.view(torch.uint8)
    peers = [peer for peer in range(links.world_size) if peer != links.rank]
    work = links.exchange([(peer, openings[links.rank]) for peer in peers], [(peer, openings[peer]) for peer in peers])
    return work, openings


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
